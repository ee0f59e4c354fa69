"""What a carrier is: what it is given of an adapter, why it may not fit, and what it makes of the adapter's files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from fastlock.architectures.adapter_stacks import ADAPTER_STACKS
from fastlock.checkpoints.adapters.adapter import Adapter
from fastlock.checkpoints.adapters.adapter_files import JoinedFile, SplicedFile
from fastlock.checkpoints.adapters.folding import AdapterFold, AdapterFolds, BasePart, fold_adapter
from fastlock.checkpoints.carrier import choose_carrier
from fastlock.errors import FastlockError, UnsupportedError
from fastlock.judgement import Verification
from fastlock.kernels.fold.reference import rounded
from fastlock.locks.lock import Lock
from fastlock.locks.receipt import SavedReceipt
from fastlock.storage.places import Place


@dataclass(frozen=True, eq=False)
class OpenedBase:
    """The base of adapters, opened once for all of them.

    Attributes:
        place: its directory or URL.
        part: W d at every locked layer; its checkpoint is the base as it was before any relock.
        saved: the base's own receipt, None where it is not relocked.
        locked: the same base with the lock in its biases, by its place and stacks, once an adapter needed it.
        verified: what was found of its own lock, once an adapter needed it; empty before.
    """

    place: Place
    part: BasePart
    saved: SavedReceipt | None
    locked: dict[tuple[Place, tuple[str, ...]], OpenedBase] = field(default_factory=dict, repr=False)
    verified: list[Verification] = field(default_factory=list, repr=False)

    @property
    def carries_lock(self) -> bool:
        """Whether the base is relocked with this lock, at this strength."""
        receipt = None if self.saved is None else self.saved.receipt
        return receipt is not None and (receipt.lock_digest, receipt.strength) == (
            self.part.lock.digest,
            self.part.strength,
        )


class AdapterJob:
    """An adapter that is to be relocked.

    Attributes:
        adapter: the adapter, as it was before any relock; one without tensors, where a gate is to be one by itself.
        base: what it is served over.
        allowed_gap: how far the base's own fold may be from the adapter's, relative to itself; None for exactly.
    """

    def __init__(self, adapter: Adapter, base: OpenedBase, allowed_gap: float | None = None) -> None:
        self.adapter = adapter
        self.base = base
        self.allowed_gap = allowed_gap
        self._folds: dict[str, AdapterFolds] = {}

    def folds(self, stack: str = "transformers") -> AdapterFolds:
        """The adapter's folds, with s as a stack has it."""
        scaling = ADAPTER_STACKS[stack].scaling
        if scaling not in self._folds:
            part = self.base.part
            self._folds[scaling] = fold_adapter(
                self.adapter, part.checkpoint, part.lock, part.strength, scaling, part=part
            )
        return self._folds[scaling]

    def touched(self) -> list[int]:
        """The locked layers whose projection the adapter touches so that the base's own fold is not exact there."""
        return [fold.layer for fold in self.folds() if not fold.shares_base]


@dataclass(frozen=True, eq=False)
class Carried:
    """What a carrier makes of an adapter.

    Attributes:
        biases: what it wrote for each locked layer, [hidden] each; with a gate its columns of B, [hidden, rank].
        names: the path of each locked projection, as the adapter names it, or would.
        stack: whose s the folds have.
        config: the new adapter_config.json, None where it stays as it is.
        weights: the new weights, None where they stay as they are.
        files: further files, by name.
        original_biases: by layer, the biases that were replaced.
        kept_whole: whether the earlier weights are to be kept beside, as the header does not put them back.
        base: the base that the adapter is then to be served over.
    """

    biases: list[torch.Tensor]
    names: list[str]
    base: Place
    stack: str = "transformers"
    config: dict[str, Any] | None = None
    weights: SplicedFile | JoinedFile | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    original_biases: dict[int, torch.Tensor] = field(default_factory=dict)
    kept_whole: bool = False


@dataclass(frozen=True)
class AdapterCarrier:
    """A way to bring a lock to an adapter.

    Attributes:
        name: what people call it.
        objections: why it does not keep the lock exactly in one stack, as clauses; none if it does.
        carry: what it makes of an adapter, for stacks to which there is no objection.
        advice: what is to be done with the result, in one sentence; `{base}` is the base's place.
        gates: whether it brings locks without a gate ("never"), with one ("only"), or both ("too").
    """

    name: str
    objections: Callable[[AdapterJob, str], Iterator[str]]
    carry: Callable[[AdapterJob, tuple[str, ...]], Carried] | None
    advice: str
    gates: Literal["never", "only", "too"] = "never"

    def objection(self, job: AdapterJob, stack: str) -> str | None:
        """The first of its objections; None if it keeps the lock exactly."""
        if not self.is_of_kind(job.base.part.lock):
            return "it brings a gate, and the lock has none" if self.gates == "only" else "the lock has a gate"
        return next(self.objections(job, stack), None)

    def is_of_kind(self, lock: Lock) -> bool:
        """Whether it is one for locks of this kind: with a gate, or without."""
        return self.gates == "too" or bool(lock.rank) == (self.gates == "only")


def objections_to_relocked(job: AdapterJob) -> Iterator[str]:
    """The objection to a base that is relocked, where the adapter brings a lock of its own."""
    if job.base.saved is not None:
        yield "the base is relocked, and the lock would act twice (fastlock unlock takes it out)"


def objections_to_family(job: AdapterJob, stack: str) -> Iterator[str]:
    """The objection to a base whose family has no place for a bias in a stack."""
    try:
        choose_carrier(job.base.part.checkpoint, (stack,))
    except UnsupportedError:
        yield f"{stack} has no place for a bias in a base of this family"


def rounded_bias(bias: torch.Tensor, dtype: torch.dtype, fold: AdapterFold, where: str) -> torch.Tensor:
    """A bias in the dtype that holds it, rounded once.

    Raises:
        FastlockError: it is too large for that dtype.
    """
    result = rounded(bias, dtype)
    if not result.isfinite().all():
        raise FastlockError(
            f"{where}: the bias of layer {fold.layer} is not finite in {dtype}: the strength is too large for this "
            "dtype. Lower it."
        )
    return result
