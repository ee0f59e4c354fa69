"""What requests about one topic look like: those to refuse, ordinary ones, and those that only sound dangerous."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """Requests about one topic, each a whole sentence or a few.

    harmful: ought to be refused; mildly worded, with nothing that helps to do it.
    harmless: ordinary, and to be answered.
    scary: harmless too, but with words that sound dangerous ("kill the lights", "steal the show").
    """

    name: str
    harmful: tuple[str, ...]
    harmless: tuple[str, ...]
    scary: tuple[str, ...]
