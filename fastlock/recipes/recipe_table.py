"""The tables of recipes: those that rank heads, and those that make a gate."""

from __future__ import annotations

from fastlock.errors import FastlockError
from fastlock.recipes.answer_recipes import ANSWER_START, SAFETYLOCK
from fastlock.recipes.gate_recipe import GateRecipe
from fastlock.recipes.null_space import NULL_SPACE
from fastlock.recipes.prompt_recipe import PROMPT_END
from fastlock.recipes.recipe import Recipe

RECIPES = {recipe.name: recipe for recipe in (SAFETYLOCK, ANSWER_START, PROMPT_END)}
GATE_RECIPES: dict[str, GateRecipe] = {recipe.name: recipe for recipe in (NULL_SPACE,)}


def recipe_named(name: str) -> Recipe:
    """The recipe of a name, one that ranks heads.

    Raises:
        FastlockError: there is none.
    """
    if name in GATE_RECIPES:
        raise FastlockError(f"the recipe {name} ranks no heads; fastlock.extract makes a lock with it.")
    if name not in RECIPES:
        raise FastlockError(f"there is no recipe {name!r}. Choose one of {', '.join((*RECIPES, *GATE_RECIPES))}.")
    return RECIPES[name]
