"""What a model is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn


def base_name(model: nn.Module) -> str | None:
    """The model's name on a hub, or that of its directory: this machine's path says nothing on another."""
    config: Any = model.config
    path = Path(config._name_or_path or "")
    return path.resolve().name if path.name and path.is_dir() else str(path) if path.name else None
