"""Which ways of running a kernel are right in this process: each is checked once, before its results are used.

A kernel that nobody has run on this kind of GPU may be refused by the driver, may not compile, may write nothing, or
may write wrong numbers. Therefore its room names its ways, best first, and a check; `WAYS.first` gives the first way
that passes:

    way = WAYS.first("fold bfloat16-rows-128-aligned", index, {"cubin": ..., "jit": ...}, check)

- index: torch's index of the CUDA device; None where Triton's interpreter runs on the CPU.
- a way is whatever the room launches by (a function, a tile); `first` only hands it to the check, and back.
- check(way) runs the kernel by it once, into memory of its own that holds NaN, so that a number that was not written
  cannot pass, and holds what came out to the bound of the room's reference. It returns True; or False where the numbers
  that were there could not tell (NaN in the weights); or raises WrongResultError, or whatever the launch raised.

A way that passed is not checked again. One that failed is not tried again: a FastlockWarning says why, once, `bad`
lists it (`fastlock doctor` prints that), and the next one is taken. Where none is left, NoWayError is raised, and the
caller computes by the reference. What another try could change (no memory, a CUDA graph being captured) and what broke
the device (the driver then fails whatever is called) say nothing about a way: such an error is raised as it is.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from fastlock.errors import FastlockError, FastlockWarning, UnsupportedError
from fastlock.kernels.ahead_of_time.driver import DriverError

_Way = TypeVar("_Way")


class WrongResultError(FastlockError):
    """A kernel ran, and what it wrote is not what its reference gives."""


class NoWayError(UnsupportedError):
    """No way to run a kernel on a device is left."""


@dataclass(frozen=True)
class BadWay:
    """A way that is not taken any more in this process.

    Attributes:
        kernel: what it would run.
        index: torch's index of the CUDA device; None for the CPU.
        way: its name.
        reason: what came of it.
    """

    kernel: str
    index: int | None
    way: str
    reason: str

    @property
    def sentence(self) -> str:
        """For people."""
        where = "the CPU" if self.index is None else f"cuda:{self.index}"
        return f"the kernel {self.kernel} is not run by its {self.way} on {where}: {self.reason}"


class Ways:
    """What the checks of this process found, for each kernel, device and way."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Check everything anew."""
        self._lock = threading.RLock()  # after a fork, another thread may have held the old one
        self._good: set[tuple[str, int | None, str]] = set()
        self._bad: dict[tuple[str, int | None, str], BadWay] = {}

    def bad(self, index: int | None) -> list[BadWay]:
        """The ways that failed on a device."""
        return [found for found in self._bad.values() if found.index == index]

    def is_good(self, kernel: str, index: int | None, way: str) -> bool:
        """Whether a way passed its check."""
        return (kernel, index, way) in self._good

    def is_bad(self, kernel: str, index: int | None, way: str) -> bool:
        """Whether a way failed."""
        return (kernel, index, way) in self._bad

    def first(self, kernel: str, index: int | None, ways: Mapping[str, _Way], check: Callable[[_Way], bool]) -> _Way:
        """The first way that is right.

        Args:
            kernel: a name, the same for all that is compiled to the same code.
            index, ways, check: see above.

        Raises:
            NoWayError: none is left.
            Exception: whatever a check raised that says nothing about the way.
        """
        for name, way in ways.items():
            if self.passes(kernel, index, name, partial(check, way)):
                return way
        reasons = "; ".join(found.reason for found in self.bad(index) if found.kernel == kernel)
        raise NoWayError(
            f"the kernel {kernel} cannot be run here (`fastlock doctor` says why): {reasons or 'there is no way to'}."
        )

    def passes(self, kernel: str, index: int | None, way: str, check: Callable[[], bool]) -> bool:
        """Whether one way may be taken: it passed, or nothing could be told yet. Checks it, if that was not done.

        Raises:
            FastlockError: a CUDA graph is being captured, and nothing can be checked meanwhile.
            Exception: as in `first`.
        """
        if self.is_good(kernel, index, way):
            return True
        with self._lock:
            if not self.is_good(kernel, index, way) and not self.is_bad(kernel, index, way):
                _check_not_capturing(kernel, index)
                try:
                    if check():
                        self._good.add((kernel, index, way))
                except Exception as error:
                    if not says_something(error, index):
                        raise
                    self._mark_bad(BadWay(kernel, index, way, reason_of(error)))
            return not self.is_bad(kernel, index, way)

    def _mark_bad(self, found: BadWay) -> None:
        self._bad[found.kernel, found.index, found.way] = found
        warnings.warn(
            f"{found.sentence}. Another way is taken in this process; `fastlock doctor` shows which.",
            FastlockWarning,
            stacklevel=2,
        )


def reason_of(error: BaseException) -> str:
    """What an error says, in one line."""
    words = " ".join(str(error).split())
    text = words if isinstance(error, FastlockError) else f"{type(error).__name__}: {words}"
    return text.rstrip(".") if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}..."


# Of a reason: what a compiler prints may be pages long.
MOST_CHARACTERS = 500


def says_something(error: BaseException, index: int | None) -> bool:
    """Whether an error is about the way in which a kernel was run: the device works, and another try would not help."""
    return not is_passing(error) and not _is_broken(index)


def is_passing(error: BaseException) -> bool:
    """Whether another try may do without this error: memory had run out, or a CUDA graph was being captured."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, DriverError):
        return error.passing
    # Triton and torch give the driver's errors as text.
    text = str(error).lower()
    return isinstance(error, RuntimeError) and "cuda" in text and ("out of memory" in text or "captur" in text)


def _check_not_capturing(kernel: str, index: int | None) -> None:
    if index is not None and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise FastlockError(
            f"the kernel {kernel} has not run on cuda:{index} in this process, and its first run is checked, which a "
            "CUDA graph's capture does not allow. Run it once before the capture."
        )


def _is_broken(index: int | None) -> bool:
    """Whether a device does nothing any more. After an illegal address, say, all that CUDA is asked fails for good."""
    if index is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.current_stream(index).synchronize()
    except RuntimeError:
        return True
    return False


# Of this process.
WAYS = Ways()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=WAYS.forget)
