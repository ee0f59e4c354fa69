"""Bring the refusals back in every fine-tune of an aligned language model: exactly, and at the cost of a bias."""

from fastlock.calibrate import calibrate
from fastlock.checkpoint import relock_checkpoint, unlock_checkpoint
from fastlock.doctor import doctor
from fastlock.errors import FastlockError
from fastlock.evaluate import evaluate
from fastlock.extract import extract
from fastlock.lock import Lock
from fastlock.locked_linear import LockedLinear, RequestLocks
from fastlock.pairs import Pair, load_pairs, shipped_pairs
from fastlock.plan import Plan
from fastlock.receipt import Receipt
from fastlock.relock import relock, relock_many, relocked, unlock
from fastlock.train import train_lock
from fastlock.verify import Verification, verify
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
