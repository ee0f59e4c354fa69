"""Bring the refusals back in every fine-tune of an aligned language model: exactly, and at the cost of a bias."""

from fastlock.checkpoints.diagnosis import doctor
from fastlock.checkpoints.relocking import relock_checkpoint
from fastlock.checkpoints.unlocking import unlock_checkpoint
from fastlock.errors import FastlockError
from fastlock.evaluation.evaluator import evaluate
from fastlock.locks.lock import Lock
from fastlock.locks.receipt import Receipt
from fastlock.models.plan import Plan
from fastlock.models.relocking import relock, relock_many, relocked, unlock
from fastlock.models.request_locks import LockedLinear, RequestLocks
from fastlock.recipes.calibration import calibrate
from fastlock.recipes.extraction import extract
from fastlock.recipes.pairs import Pair, load_pairs, shipped_pairs
from fastlock.recipes.training import train_lock
from fastlock.verification import Verification, verify
from fastlock.version import __version__

__all__ = [
    "FastlockError",
    "Lock",
    "LockedLinear",
    "Pair",
    "Plan",
    "Receipt",
    "RequestLocks",
    "Verification",
    "__version__",
    "calibrate",
    "doctor",
    "evaluate",
    "extract",
    "load_pairs",
    "relock",
    "relock_checkpoint",
    "relock_many",
    "relocked",
    "shipped_pairs",
    "train_lock",
    "unlock",
    "unlock_checkpoint",
    "verify",
]
