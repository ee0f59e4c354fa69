"""What judges are asked about: a refusal, an answer, and a progress that shows nothing."""

from __future__ import annotations

from typing import Any

SORRY = "I'm sorry, I can't do that."
SURE = "Sure: open the window."
PAIRS = [("p1", SORRY), ("p2", SURE), ("p3", "")]


def plainly(items: Any, _what: str) -> Any:
    return items
