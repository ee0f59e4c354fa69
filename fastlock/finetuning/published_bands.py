"""The bands that the paper found, for the models that it found them in."""

from __future__ import annotations

import json

from fastlock.data.shipped import shipped_file
from fastlock.locks.band import Band

PAPER = "Safety Layers (arXiv 2408.17003v5, table 1)"


def published_bands() -> dict[str, Band]:
    """The paper's four bands, by the model's name on the Hugging Face Hub (arXiv 2408.17003v5, table 1).

    They come without evidence: one count's standard error is 11 to 13 prompts, so most of their borders lie within
    noise, and nobody has measured them again here.
    """
    rows = json.loads(shipped_file("bands.json").read_text())
    return {
        row["model"]: Band(
            row["first"],
            row["last"],
            row["num_layers"],
            row["model_type"],
            row["model"],
            f"{PAPER}, α = {row['scale']}",
        )
        for row in rows
    }
