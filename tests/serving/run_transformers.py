"""The logits of checkpoints before and after relocking, by the transformers that runs this: run_transformers.py DIR...

DIR holds `original`, `relocked` and `shifts.pt`: by projection, d, V and U of d + U Vᵀ x, which is to be added to its
input x. Prints, by DIR, how
far the shift moves a logit of the original, and how far the relocked one is from it then, as JSON; or what went wrong.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import torch
from transformers import AutoModelForCausalLM

IDS = torch.tensor([[5, 9, 17, 33, 65, 99, 4, 8, 100, 3, 7, 11]])


def load(directory: str) -> Any:
    """Load a checkpoint as everybody does."""
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()


def logits(model: Any) -> torch.Tensor:
    """The logits at every position."""
    with torch.no_grad():
        return model(IDS).logits


def compare(directory: str) -> dict[str, float]:
    """Compare both, in one and the same transformers."""
    original = load(f"{directory}/original")
    plain = logits(original)
    for name, shift in torch.load(f"{directory}/shifts.pt").items():
        original.get_submodule(name).register_forward_pre_hook(
            lambda _, args, d=shift[0], v=shift[1], u=shift[2]: (args[0] + d + (args[0] @ v) @ u.T, *args[1:])
        )
    locked = logits(original)
    try:
        found = logits(load(f"{directory}/relocked"))
    except Exception as error:  # transformers raises whatever its parts raise
        raise AssertionError(f"the relocked one: {type(error).__name__}: {error}") from error
    return {"effect": (locked - plain).abs().max().item(), "error": (found - locked).abs().max().item()}


def main() -> None:
    """Compare all of them."""
    found: dict[str, Any] = {}
    for directory in sys.argv[1:]:
        try:
            found[directory] = compare(directory)
        except Exception as error:  # transformers raises whatever its parts raise
            found[directory] = f"{type(error).__name__}: {error}"
    print(json.dumps(found))


if __name__ == "__main__":
    main()
