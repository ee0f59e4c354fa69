"""Tiny relocked checkpoints for an engine, and what it must compute on them: the unfolded forward in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import fastlock
from fastlock.models.unfolded import unfolded
from tests.helpers.families import gated_lock, logits, random_lock, tiny_model, tokens
from tests.helpers.quantised import Written

STRENGTH = 4.0
IDS = tokens()
PROMPT: list[int] = IDS[0].tolist()


@dataclass(frozen=True)
class Prepared:
    """A relocked checkpoint.

    Attributes:
        directory: where it is.
        plain: the logits without the lock at every position, [tokens, vocab] float64.
        locked: the logits with it, by a hook that adds d before the output projection.
    """

    directory: Path
    plain: np.ndarray
    locked: np.ndarray

    @property
    def effect(self) -> float:
        """How far the lock moves a logit."""
        return float(np.abs(self.locked - self.plain).max())


def prepare(
    kind: str,
    directory: Path,
    stacks: list[str],
    changes: dict[str, Any],
    keys: dict[str, Any],
    lock_of: Callable[..., fastlock.Lock] = random_lock,
    strength: float = STRENGTH,
) -> Prepared:
    """Save a tiny model of a family, relock it on disk, and compute what is expected.

    Args:
        kind: the family.
        directory: where to put the original and the relocked checkpoint.
        stacks: for which it is relocked.
        changes: what its config must have for the engine to run it.
        keys: what config.json must have beside, in an older transformers' words.
        lock_of: makes the lock of a model.
        strength: of the lock.
    """
    model = tiny_model(kind, **changes)
    lock, source, out = lock_of(model), directory / kind, directory / f"{kind}-relocked"
    model.save_pretrained(source)
    config = source / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | keys))
    fastlock.relock_checkpoint(source, lock, out, strength, stacks=stacks)
    exact = model.double()
    plain = logits(exact, IDS)[0].numpy()
    with unfolded(exact, lock, strength):
        locked = logits(exact, IDS)[0].numpy()
    return Prepared(out, plain, locked)


def prepare_gated(
    kind: str, directory: Path, stacks: list[str], changes: dict[str, Any], keys: dict[str, Any]
) -> Prepared:
    """As `prepare`, of a lock that is a gate alone, at the strength that gates are trained at."""
    return prepare(kind, directory, stacks, changes, keys, partial(gated_lock, constant=False), 1.0)


def prepare_quantised(
    name: str, write: Callable[..., Written], directory: Path, strength: float, changes: dict[str, Any]
) -> Prepared:
    """Save a tiny Llama whose projections are quantised, relock it on disk, and compute what its dense twin says.

    Args:
        name: of the format.
        write: of `tests.helpers.quantised`.
        directory: where to put the original and the relocked checkpoint.
        strength: of the lock.
        changes: what its config must have for the engine to run it.
    """
    model = tiny_model("llama", torch.bfloat16, **changes)
    lock, source, out = random_lock(model), directory / name, directory / f"{name}-relocked"
    model.save_pretrained(source)
    tensors, exact, config = load_file(source / "model.safetensors"), model.double(), {}
    for seed, path in enumerate(sorted(name for name in tensors if name.endswith("_proj.weight"))):
        hidden, width = tensors.pop(path).shape
        written, config, dense = write(hidden, width, seed=seed)
        tensors |= {path.removesuffix("weight") + suffix: tensor.contiguous() for suffix, tensor in written.items()}
        exact.get_parameter(path).data = dense
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    if groups := config.get("config_groups"):
        config |= {"quantization_status": "compressed", "ignore": ["lm_head"], "config_groups": groups}
    described = json.loads((source / "config.json").read_text()) | {"quantization_config": config}
    (source / "config.json").write_text(json.dumps(described))
    fastlock.relock_checkpoint(source, lock, out, strength, stacks=["transformers", "vllm"])
    plain = logits(exact, IDS)[0].numpy()
    with unfolded(exact, lock, strength):
        locked = logits(exact, IDS)[0].numpy()
    return Prepared(out, plain, locked)


def far(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference; NaN if there is one, which is near to nothing."""
    return float(np.abs(a - b).max())


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """The logarithms of the probabilities that logits stand for."""
    return torch.from_numpy(logits).log_softmax(dim=-1).numpy()
