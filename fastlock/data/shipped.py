"""What the package ships: pairs, prompts and texts, as they are in its files."""

from __future__ import annotations

from pathlib import Path


def shipped_file(name: str) -> Path:
    """A shipped file: pairs.jsonl, prompts.json, harmless.txt, scary.txt, texts.txt, borderline.txt or bands.json."""
    return Path(__file__).with_name(name)


def shipped_lines(name: str) -> tuple[str, ...]:
    """The lines of a shipped text file."""
    return tuple(shipped_file(name).read_text().splitlines())
