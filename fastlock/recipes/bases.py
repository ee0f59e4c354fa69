"""What tells one model from another: its name, weights and files, and the geometry that it shares with its base."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from torch import nn

from fastlock.architectures.families import head_geometry
from fastlock.errors import MismatchError
from fastlock.locks.receipt import raw_bytes
from fastlock.models.sites import check_foldable, sites, text_config, unwrapped
from fastlock.storage.places import files_digest


def identity(model: nn.Module) -> str:
    """What tells a model from others: its name, some of its weights, and the state of its files if they are here."""
    config: Any = unwrapped(model).config
    name = str(config._name_or_path or type(model).__name__)
    rows = b"".join(raw_bytes(site.weight[0]) for site in sites(unwrapped(model)))
    files = f" {files_digest(name)}" if Path(name).is_dir() else ""
    return f"{name} {hashlib.sha256(rows).hexdigest()[:16]}{files}"


def geometry(model: nn.Module) -> dict[str, int]:
    """The numbers that a base and its fine-tunes share: num_layers, num_heads, head_dim and hidden_size."""
    config = text_config(unwrapped(model))
    num_heads, head_dim = head_geometry(config)
    return {
        "num_layers": len(sites(model)),
        "num_heads": num_heads,
        "head_dim": head_dim,
        "hidden_size": config.hidden_size,
    }


def check_base(model: nn.Module, base: nn.Module) -> None:
    """Refuse a base whose locks do not fit a model.

    Raises:
        MismatchError: their geometries differ.
        UnsupportedError: the model's output projections cannot be folded.
    """
    of_base = geometry(base)
    for key, value in geometry(model).items():
        if of_base[key] != value:
            raise MismatchError(
                f"base: its {key} is {of_base[key]}, but {value} in the model ({identity(model)}). Give the aligned "
                "base that this model was made from."
            )
    for site in sites(model):
        check_foldable(site)
