"""The one judgement of models and directories: whether the biases and weights that are there are a lock's folds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from fastlock.dtypes import coarsest, holds
from fastlock.kernels.fold.reference import HeadColumns, bound, exact_fold, magnitude
from fastlock.kernels.gate_fold.reference import exact_rewritten, gate_error_bound
from fastlock.locks.gate import Gate
from fastlock.locks.lock import Lock


@dataclass(frozen=True)
class Verification:
    """What was found; true exactly when the lock is in place, whole and unaltered.

    Attributes:
        state: "locked", "not locked" or "altered".
        strength: the strength found, None where there is none.
        layers: the layers that the lock shifts.
        altered: those of them whose bias, or weights that a gate rewrote, are not what their own weights give.
        reason: one sentence for people.
    """

    state: str
    strength: float | None
    layers: tuple[int, ...]
    altered: tuple[int, ...]
    reason: str

    def __bool__(self) -> bool:
        return self.state == "locked"

    def to_dict(self) -> dict[str, Any]:
        """The findings as data that JSON can hold."""
        return asdict(self)


@dataclass(frozen=True)
class SiteEvidence:
    """What one site holds, and what it would hold at strength 1: all that a judgement needs.

    Attributes:
        layer: the decoder layer.
        fold: W d at strength 1, [hidden] float64.
        magnitude: |W||d| at strength 1, [hidden] float64.
        terms: the length of the sums in it.
        dtype: what the bias was rounded to.
        bias: what is there, [hidden], or None.
        rounding: how far each weight may be from the one that was folded, relative to it: more than 0 if it was brought
            to a narrower dtype since.
        gate: whether the locked columns are what the lock's gate makes of those that were there before, at the strength
            that the receipt says, within the bound of a right one; None where nobody looked.
    """

    layer: int
    fold: torch.Tensor
    magnitude: torch.Tensor
    terms: int
    dtype: torch.dtype
    bias: torch.Tensor | None
    rounding: float = 0.0
    gate: bool | None = None

    def is_fold(self, strength: float, original: torch.Tensor | None) -> bool:
        """Whether the bias is the fold at this strength on top of the original, within the bound of a right one."""
        if self.bias is None or self.bias.shape != self.fold.shape:
            return False
        before = torch.zeros_like(self.fold) if original is None else original.detach().to(self.fold)
        expected = strength * self.fold + before
        size = strength * self.magnitude + before.abs()
        error = (self.bias.detach().to(expected) - expected).abs()
        rounded = self.rounding * size
        return bool((error <= bound(expected, size, self.terms, self.dtype) + rounded).all())


def evidence_of(
    layer: int, columns: HeadColumns, values: torch.Tensor, bias: torch.Tensor | None, dtypes: Sequence[torch.dtype]
) -> SiteEvidence:
    """The evidence of one site, out of its locked columns.

    Args:
        layer: the decoder layer.
        columns, values: W and d at strength 1.
        bias: what is there, [hidden], or None.
        dtypes: those that weight and bias have had, that of the fold first.
    """
    fold, size = exact_fold(columns, values).cpu(), magnitude(columns, values).cpu()
    rounding = max((torch.finfo(dtype).eps for dtype in dtypes if not holds(dtype, dtypes[0])), default=0.0)
    return SiteEvidence(layer, fold, size, values.numel() + 1, coarsest(dtypes), bias, rounding)


def is_rewritten(before: HeadColumns, gate: Gate, found: torch.Tensor, rounding: float = 0.0) -> bool:
    """Whether columns are what a gate makes of those that were there before, within the bound of a right fold.

    Args:
        before: the locked heads' columns, as they were.
        gate: of the layer, its writers times the strength applied.
        found: the columns that are there, [hidden, len(heads) * head_dim].
        rounding: as of `SiteEvidence`.
    """
    readers, writers = gate.readers, gate.writers
    expected = exact_rewritten(before, readers, writers).cpu()
    if found.shape != expected.shape:
        return False
    allowed = gate_error_bound(before, readers, writers).cpu()
    if rounding:
        absolute = HeadColumns(before.matrix.abs(), before.starts)
        allowed += rounding * exact_rewritten(absolute, readers.abs(), writers.abs()).cpu()
    return bool(((found.detach().to(expected) - expected).abs() <= allowed).all())


def judge_by_digests(receipt: Applied, lock: Lock, layers: tuple[int, ...], problem: str | None) -> Verification:
    """The judgement where the columns that were there before a gate are not at hand, and nothing can be recomputed.

    Args:
        receipt: what was applied.
        lock: the lock.
        layers: those that it shifts.
        problem: what is not as the receipt says, as a clause; None where weights and biases have its digests.
    """
    if (other := not_this_lock(receipt, lock, layers)) is not None:
        return other
    if problem is not None:
        return Verification("altered", receipt.strength, layers, layers, problem)
    reason = (
        f"the weights of all {len(layers)} layers are those that its receipt says; what was there before is not at "
        "hand, and nothing was recomputed"
    )
    return Verification("locked", receipt.strength, layers, (), reason)


class Applied(Protocol):
    """What a receipt says was applied."""

    @property
    def lock_digest(self) -> str: ...
    @property
    def strength(self) -> float: ...


def not_this_lock(receipt: Applied, lock: Lock, layers: tuple[int, ...]) -> Verification | None:
    """The judgement of a relock with another lock, or with none to speak of; None of any other."""
    if receipt.lock_digest != lock.digest:
        other = f"it is relocked with another lock (sha256 {receipt.lock_digest[:12]}…, not {lock.digest[:12]}…)"
        return Verification("not locked", None, layers, (), other)
    if receipt.strength == 0:
        return Verification("not locked", 0.0, layers, (), "it is relocked at strength 0, which changes nothing")
    return None


def judge(
    evidence: list[SiteEvidence],
    lock: Lock,
    receipt: Applied | None,
    originals: Callable[[Any], dict[int, torch.Tensor | None]],
    problem: Callable[[Any], str | None],
    lost: str | None = None,
) -> Verification:
    """Whether every site holds its fold.

    Args:
        evidence: of each locked site.
        lock: the lock.
        receipt: what was applied, None where nothing says so.
        originals: what each layer's bias was before, by layer, as the receipt has it.
        problem: what else is wrong, as a clause; None where nothing is.
        lost: why transformers would drop the biases, None where it uses them.
    """
    layers = tuple(e.layer for e in evidence)
    if receipt is None and lock.rank:
        reason = "there is no receipt, and without one the gate of a lock cannot be recognised"
        return Verification("not locked", None, layers, (), reason)
    if receipt is None:
        return _without_receipt(evidence, lost)
    if (other := not_this_lock(receipt, lock, layers)) is not None:
        return other
    before = originals(receipt)
    gated = [e.layer for e in evidence if lock.rank and not e.gate]
    folded = [e.layer for e in evidence if lock.has_constant and not e.is_fold(receipt.strength, before.get(e.layer))]
    if altered := tuple(layer for layer in layers if layer in (*gated, *folded)):
        what = "weights that the gate does not give" if gated else "a bias that their own weights do not give"
        reason = f"{len(altered)} of {len(layers)} layers hold {what}"
        return Verification("altered", receipt.strength, layers, altered, reason)
    if (change := problem(receipt)) is not None:
        return Verification("altered", receipt.strength, layers, layers, change)
    return Verification("locked", receipt.strength, layers, (), f"all {len(layers)} layers hold their fold")


def _without_receipt(evidence: list[SiteEvidence], lost: str | None) -> Verification:
    """Recognise a lock by its biases alone: b = s·W d with one s for all layers, by least squares.

    Args:
        lost: why transformers would drop the biases, None where it uses them.
    """
    layers = tuple(e.layer for e in evidence)
    if all(e.bias is None or not e.bias.count_nonzero() for e in evidence):
        return Verification("not locked", None, layers, (), "there is no receipt, and no bias at the locked layers")
    folds = torch.cat([e.fold for e in evidence])
    biases = torch.cat([torch.zeros_like(e.fold) if e.bias is None else e.bias.detach().to(e.fold) for e in evidence])
    estimate = float(folds @ biases / (folds @ folds))
    # People choose round strengths: the roundest one that the biases allow.
    for strength in (*(round(estimate, digits) for digits in range(4)), estimate):
        if 0 < strength < math.inf and all(e.is_fold(strength, None) for e in evidence):
            if lost is not None:
                reason = f"there is no receipt, and every bias is the fold, but {lost}"
                return Verification("not locked", None, layers, (), reason)
            return Verification("locked", strength, layers, (), "there is no receipt, but every bias is the fold")
    reason = "there is no receipt, and the biases are not folds of this lock alone"
    return Verification("not locked", None, layers, (), reason)
