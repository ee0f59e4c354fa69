"""Bring the refusals back in every fine-tune of an aligned language model: exactly, and at the cost of a bias at most.

The names are looked up when they are first used (PEP 562), so that importing fastlock imports nothing else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastlock.checkpoints.adapters.lock_adapter import relock_as_adapter
    from fastlock.checkpoints.adapters.relocking import relock_adapter
    from fastlock.checkpoints.diagnosis import doctor
    from fastlock.checkpoints.gguf import relock_gguf, unlock_gguf
    from fastlock.checkpoints.relocking import relock_checkpoint
    from fastlock.checkpoints.unlocking import unlock_checkpoint
    from fastlock.errors import DamagedError, FastlockError, FastlockWarning, MismatchError, UnsupportedError
    from fastlock.evaluation.evaluator import evaluate
    from fastlock.finetuning.alternation import Alternation
    from fastlock.finetuning.band_prompts import BandPrompts
    from fastlock.finetuning.freezing import freeze, lora_outside, thaw
    from fastlock.finetuning.lisa_schedule import Lisa
    from fastlock.finetuning.lisa_trainer import lisa
    from fastlock.finetuning.proximal_adamw import ProximalAdamW
    from fastlock.finetuning.published_bands import published_bands
    from fastlock.finetuning.safety_layers import locate
    from fastlock.finetuning.trainer_callback import TrainerCallback
    from fastlock.judgement import Verification
    from fastlock.locks.adapter_receipt import AdapterReceipt
    from fastlock.locks.band import Band
    from fastlock.locks.lock import Lock
    from fastlock.locks.receipt import Receipt
    from fastlock.models.plan import Plan
    from fastlock.models.relocking import relock, relock_many, relocked, unlock
    from fastlock.models.request_locks import LockedLinear, RequestLocks
    from fastlock.models.resident_adapters import fold_adapters
    from fastlock.recipes.calibration import calibrate
    from fastlock.recipes.extraction import extract, rank_heads
    from fastlock.recipes.pairs import Pair, load_pairs, shipped_pairs
    from fastlock.recipes.training import train_lock
    from fastlock.verification import verify
    from fastlock.version import __version__
    from fastlock.zoo.run import relock_zoo, verify_zoo

__all__ = [
    "AdapterReceipt",
    "Alternation",
    "Band",
    "BandPrompts",
    "DamagedError",
    "FastlockError",
    "FastlockWarning",
    "Lisa",
    "Lock",
    "LockedLinear",
    "MismatchError",
    "Pair",
    "Plan",
    "ProximalAdamW",
    "Receipt",
    "RequestLocks",
    "TrainerCallback",
    "UnsupportedError",
    "Verification",
    "__version__",
    "calibrate",
    "doctor",
    "evaluate",
    "extract",
    "fold_adapters",
    "freeze",
    "lisa",
    "load_pairs",
    "locate",
    "lora_outside",
    "published_bands",
    "rank_heads",
    "relock",
    "relock_adapter",
    "relock_as_adapter",
    "relock_checkpoint",
    "relock_gguf",
    "relock_many",
    "relock_zoo",
    "relocked",
    "shipped_pairs",
    "thaw",
    "train_lock",
    "unlock",
    "unlock_checkpoint",
    "unlock_gguf",
    "verify",
    "verify_zoo",
]

# Where the names are.
_MODULES = {
    "fastlock.checkpoints.adapters.lock_adapter": ("relock_as_adapter",),
    "fastlock.checkpoints.adapters.relocking": ("relock_adapter",),
    "fastlock.checkpoints.diagnosis": ("doctor",),
    "fastlock.checkpoints.gguf": ("relock_gguf", "unlock_gguf"),
    "fastlock.checkpoints.relocking": ("relock_checkpoint",),
    "fastlock.checkpoints.unlocking": ("unlock_checkpoint",),
    "fastlock.errors": (
        "DamagedError",
        "FastlockError",
        "FastlockWarning",
        "MismatchError",
        "UnsupportedError",
    ),
    "fastlock.evaluation.evaluator": ("evaluate",),
    "fastlock.finetuning.alternation": ("Alternation",),
    "fastlock.finetuning.band_prompts": ("BandPrompts",),
    "fastlock.finetuning.freezing": ("freeze", "lora_outside", "thaw"),
    "fastlock.finetuning.lisa_schedule": ("Lisa",),
    "fastlock.finetuning.lisa_trainer": ("lisa",),
    "fastlock.finetuning.proximal_adamw": ("ProximalAdamW",),
    "fastlock.finetuning.published_bands": ("published_bands",),
    "fastlock.finetuning.safety_layers": ("locate",),
    "fastlock.finetuning.trainer_callback": ("TrainerCallback",),
    "fastlock.judgement": ("Verification",),
    "fastlock.locks.adapter_receipt": ("AdapterReceipt",),
    "fastlock.locks.band": ("Band",),
    "fastlock.locks.lock": ("Lock",),
    "fastlock.locks.receipt": ("Receipt",),
    "fastlock.models.plan": ("Plan",),
    "fastlock.models.relocking": (
        "relock",
        "relock_many",
        "relocked",
        "unlock",
    ),
    "fastlock.models.request_locks": (
        "LockedLinear",
        "RequestLocks",
    ),
    "fastlock.models.resident_adapters": ("fold_adapters",),
    "fastlock.recipes.calibration": ("calibrate",),
    "fastlock.recipes.extraction": (
        "extract",
        "rank_heads",
    ),
    "fastlock.recipes.pairs": (
        "Pair",
        "load_pairs",
        "shipped_pairs",
    ),
    "fastlock.recipes.training": ("train_lock",),
    "fastlock.verification": ("verify",),
    "fastlock.version": ("__version__",),
    "fastlock.zoo.run": (
        "relock_zoo",
        "verify_zoo",
    ),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
