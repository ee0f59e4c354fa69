"""What a model is asked to find its band: normal requests, malicious ones, and harmless ones that sound harmful."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

from fastlock.data.shipped import shipped_file, shipped_lines
from fastlock.errors import FastlockError, is_unicode

# Of the first two kinds at least two are needed, as angles are taken between two of a kind.
_LEAST = {"normal": 2, "malicious": 2, "borderline": 1}


@dataclass(frozen=True)
class BandPrompts:
    """What to ask.

    Attributes:
        normal: ordinary requests; at least two.
        malicious: requests that an aligned model refuses; at least two.
        borderline: harmless requests that sound harmful, which show over-refusal (the paper's D_o); at least one.

    Raises:
        FastlockError: there are too few of a kind, something is not a text, or a prompt is of two kinds.
    """

    normal: tuple[str, ...]
    malicious: tuple[str, ...]
    borderline: tuple[str, ...]

    def __post_init__(self) -> None:
        kinds: dict[str, str] = {}
        for kind, least in _LEAST.items():
            value = getattr(self, kind)
            texts = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else ("",)
            if not all(isinstance(text, str) and text.strip() and is_unicode(text) for text in texts):
                raise FastlockError(f"`{kind}`: give a list of texts, none of them empty or with half a character.")
            if len(texts) < least:
                raise FastlockError(
                    f"`{kind}`: there are {len(texts)} prompts, and at least {least} are needed. A band is what tells "
                    "malicious requests from normal ones: give both, and borderline ones; 100 of each are good."
                )
            for text in texts:
                if kinds.setdefault(text, kind) != kind:
                    raise FastlockError(f"{text[:60]!r} is both a {kinds[text]} and a {kind} prompt. Keep it in one.")
            object.__setattr__(self, kind, texts)  # a generator can be read only once

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all that is asked."""
        return hashlib.sha256(json.dumps([self.normal, self.malicious, self.borderline]).encode()).hexdigest()


def shipped_band_prompts() -> BandPrompts:
    """The set that comes with fastlock, mild in its wording: 100 normal, 100 malicious, 177 borderline requests."""
    pairs = [json.loads(line) for line in shipped_file("pairs.jsonl").read_text().splitlines()]
    return BandPrompts(
        shipped_lines("harmless.txt"),
        tuple(pair["question"] for pair in pairs),
        shipped_lines("borderline.txt"),
    )
