"""Whether a lock is in a GGUF, and acts in the stacks that read one."""

from __future__ import annotations

import os
from dataclasses import dataclass

from fastlock.checkpoints.gguf.model import GgufModel
from fastlock.checkpoints.gguf.originals import change_since
from fastlock.checkpoints.gguf.parts import local_path, open_parts
from fastlock.checkpoints.gguf.saved import receipt_of_parts
from fastlock.errors import UnsupportedError

_BY_TRANSFORMERS = "transformers reads a GGUF (gguf_file) as a model without these biases, and silently drops them"


@dataclass(frozen=True)
class GgufState:
    """What a stack makes of a GGUF: whether a lock is there and acts, and one sentence for people."""

    acts: bool
    reason: str


def gguf_state(path: str | os.PathLike[str], stack: str) -> GgufState:
    """What a stack makes of a GGUF's lock.

    Args:
        path: the file, or the first part of a split model.
        stack: one of `serving_stacks.STACKS`.

    Raises:
        DamagedError: the file is damaged or hostile, or its receipt is.
        FastlockError: it cannot be read.
    """
    place = local_path(path)
    try:
        model = GgufModel(open_parts(place), str(place))
        receipt = receipt_of_parts(model.parts, model.where)
        change = None if receipt is None else change_since(model, receipt)
    except UnsupportedError as error:
        return GgufState(False, f"not relocked, and cannot be for {stack}: {error}")
    if stack != "llama.cpp":
        reason = _BY_TRANSFORMERS if stack == "transformers" else f"nobody has checked what {stack} makes of a GGUF"
        return GgufState(False, reason)
    if receipt is None:
        return GgufState(False, "not relocked; for llama.cpp the lock would be carried as biases in a new GGUF")
    if change is not None:
        return GgufState(False, f"changed since it was relocked ({change}): run `fastlock verify`")
    return GgufState(True, f"llama.cpp uses the biases of all {len(receipt.saved.receipt.layers)} locked layers")
