"""The table of recipes."""

from __future__ import annotations

from fastlock.errors import FastlockError
from fastlock.recipes.answer_recipes import ANSWER_START, SAFETYLOCK
from fastlock.recipes.prompt_recipe import PROMPT_END
from fastlock.recipes.recipe import Recipe

RECIPES = {recipe.name: recipe for recipe in (SAFETYLOCK, ANSWER_START, PROMPT_END)}


def recipe_named(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        FastlockError: there is none.
    """
    if name not in RECIPES:
        raise FastlockError(f"there is no recipe {name!r}. Choose one of {', '.join(RECIPES)}.")
    return RECIPES[name]
