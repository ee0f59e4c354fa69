"""GGUF files, as llama.cpp runs them: relocked into new files, unlocked, and looked at."""

from fastlock.checkpoints.gguf.diagnosis import GgufState, gguf_state
from fastlock.checkpoints.gguf.model import GgufModel, GgufSite, WithoutHeadsError
from fastlock.checkpoints.gguf.originals import change_since, original_biases
from fastlock.checkpoints.gguf.parts import is_gguf, local_path, open_parts
from fastlock.checkpoints.gguf.relocking import check_gguf_stacks, relock_gguf
from fastlock.checkpoints.gguf.saved import GgufReceipt, receipt_of_parts
from fastlock.checkpoints.gguf.unlocking import unlock_gguf

__all__ = [
    "GgufModel",
    "GgufReceipt",
    "GgufSite",
    "GgufState",
    "WithoutHeadsError",
    "change_since",
    "check_gguf_stacks",
    "gguf_state",
    "is_gguf",
    "local_path",
    "open_parts",
    "original_biases",
    "receipt_of_parts",
    "relock_gguf",
    "unlock_gguf",
]
