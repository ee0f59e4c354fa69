"""The fold, b = W d + c, of many sites at once, by whatever suits the device they are on; once, or as a plan."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fastlock.errors import DamagedError, FastlockError
from fastlock.kernels.fold import reference
from fastlock.kernels.fold.launch import build_table, launch  # this imports no Triton
from fastlock.kernels.fold.reference import HeadColumns


@dataclass(frozen=True, eq=False)
class Fold:
    """What the fold of one site takes.

    Attributes:
        columns: the locked heads' columns of W, float16, bfloat16, float32 or float64.
        values: d, the displacement at each of these heads, [len(heads), head_dim] float64 on the CPU.
        bias: c, [hidden] of the columns' dtype and device, or None; detached.
        name: of the site, for messages.
    """

    columns: HeadColumns
    values: torch.Tensor
    bias: torch.Tensor | None
    name: str

    @property
    def head_dim(self) -> int:
        """How many columns a head has."""
        return self.values.shape[1]


def fold(folds: Sequence[Fold]) -> list[torch.Tensor]:
    """The new bias of each site, once; `FoldPlan` says how.

    Returns:
        b of each site, [hidden], of the columns' dtype and device.

    Raises:
        DamagedError: a fold is not finite, as weights or bias hold NaN or infinities.
        FastlockError: a fold is not finite, as the strength is too large for the dtype.
    """
    plan = FoldPlan(folds)
    plan.run()
    return plan.results


class FoldPlan:
    """The folds of many sites, b = W d + c, prepared once and run as often as wanted.

    Only the locked head columns of W are read. On a CUDA device, all sites of one dtype, layout and head_dim take one
    kernel launch (so do a model, or a zoo). It accumulates in float32, in an order that does not change from run to
    run. Elsewhere the reference folds in float64. Both round once. Sites that read the same memory with the same
    displacement are folded once, and share one result.

    A plan holds addresses: it is valid while weights and biases stay where they are. Their numbers may change.

    Attributes:
        results: b of each site, [hidden], of the columns' dtype and device, as the last run left it.
        by_torch: whether torch writes some of them, and counts that (`Tensor._version`); it does not count the kernel.
    """

    def __init__(self, folds: Sequence[Fold]) -> None:
        self._firsts = _firsts_alike(folds)
        groups: dict[tuple[object, ...], list[int]] = {}
        for first in dict.fromkeys(self._firsts):
            groups.setdefault(_group(folds[first]), []).append(first)
        with torch.inference_mode(False), torch.no_grad():
            self._groups = [
                (members, _way(folds[members[0]])([folds[i] for i in members])) for members in groups.values()
            ]
        results = {i: b for members, group in self._groups for i, b in zip(members, group.results, strict=True)}
        self.results = [results[first] for first in self._firsts]
        self.by_torch = any(isinstance(group, _ByReference) for _, group in self._groups)

    def run(self) -> None:
        """Fold from the numbers that are there now, and wait until it is done.

        Raises:
            DamagedError: a fold is not finite, as weights or bias hold NaN or infinities.
            FastlockError: a fold is not finite, as the strength is too large for the dtype. In both cases the results
                hold what came out.
        """
        self.start()
        self.finish()

    def start(self) -> None:
        """Begin to fold: on a CUDA device, what is launched on the current stream from now on finds the results."""
        try:
            for _, group in self._groups:
                group.start()
        except BaseException:
            self._settle()
            raise

    def finish(self) -> None:
        """Wait for what `start` began. Raises as `run` does."""
        try:
            errors = [error for _, group in self._groups if (error := group.finish()) is not None]
        except BaseException:
            self._settle()
            raise
        if errors:
            raise errors[0]

    def _settle(self) -> None:
        """Wait for whatever was begun, and ignore what went wrong in it."""
        for _, group in self._groups:
            with contextlib.suppress(Exception):
                group.finish()

    def displace(self, folds: Sequence[Fold]) -> bool:
        """Use other displacements of the same sites from now on: only these are sent to the device.

        Returns:
            Whether this plan can; if not (sites that shared a result differ now, or head_dim does), nothing was
            changed.

        Raises:
            FastlockError, RuntimeError: memory ran out, say. Then some sites have their new displacements and others
                do not; another call can give them their earlier ones.
        """
        if any(folds[i].values is not folds[first].values for i, first in enumerate(self._firsts)):
            return False
        if any(folds[i].head_dim != group.head_dim for members, group in self._groups for i in members):
            return False
        for members, group in self._groups:
            group.displace([folds[i] for i in members])
        return True


class _ByKernel:
    """The folds of one device, dtype, layout and head_dim, by one launch."""

    def __init__(self, folds: Sequence[Fold]) -> None:
        # The kernel reads contiguous biases only. Of any other it reads a copy, which each run refreshes.
        self._copied = [
            (f.bias, f.bias.contiguous()) for f in folds if f.bias is not None and not f.bias.is_contiguous()
        ]
        copies = iter(copy for _, copy in self._copied)
        self.results = [_result_of(f) for f in folds]
        self.head_dim = folds[0].head_dim
        self._build([f if f.bias is None or f.bias.is_contiguous() else replace(f, bias=next(copies)) for f in folds])

    def _build(self, folds: list[Fold]) -> None:
        table = build_table(
            [f.columns for f in folds],
            [f.values for f in folds],
            [f.bias for f in folds],
            self.results,
        )
        self._folds, self._table, self._flags = folds, table, table.flags.numpy()

    def start(self) -> None:
        for bias, copy in self._copied:
            copy.copy_(bias)
        launch(self._table)

    def finish(self) -> FastlockError | None:
        """Wait, and give the error of the first fold that is not finite."""
        device = self.results[0].device
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        if not self._flags[0]:
            return None
        first = int(self._flags[1:].argmax())
        self._flags.fill(0)
        return _not_finite(self._folds[first])

    def displace(self, displaced: Sequence[Fold]) -> None:
        folds = [replace(f, columns=d.columns, values=d.values) for f, d in zip(self._folds, displaced, strict=True)]
        if all(f.columns.starts == d.columns.starts for f, d in zip(self._folds, displaced, strict=True)):
            self._table.displace([f.values for f in folds])
            self._folds = folds
        else:
            self._build(folds)


class _ByReference:
    """The folds of one device, dtype, layout and head_dim, by the reference, one after the other."""

    def __init__(self, folds: Sequence[Fold]) -> None:
        self._folds = list(folds)
        self.results = [_result_of(f) for f in folds]
        self.head_dim = folds[0].head_dim

    def start(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for f, b in zip(self._folds, self.results, strict=True):
                b.copy_(reference.fold(f.columns, f.values, f.bias))

    def finish(self) -> FastlockError | None:
        """Give the error of the first fold that is not finite."""
        return next(
            (_not_finite(f) for f, bad in zip(self._folds, _bad(self.results), strict=True) if bad),
            None,
        )

    def displace(self, displaced: Sequence[Fold]) -> None:
        self._folds = list(displaced)


def _way(f: Fold) -> type[_ByKernel] | type[_ByReference]:
    weight = f.columns.matrix
    by_kernel = weight.device.type == "cuda" and weight.dtype != torch.float64 and 1 in weight.stride()
    return _ByKernel if by_kernel else _ByReference


def _group(f: Fold) -> tuple[object, ...]:
    """Folds for which this is the same can be one launch."""
    matrix = f.columns.matrix
    return matrix.device, matrix.dtype, matrix.stride(1) == 1, 1 in matrix.stride(), f.head_dim


def _result_of(f: Fold) -> torch.Tensor:
    """Memory for b."""
    return f.columns.matrix.new_empty(f.columns.matrix.shape[0])


def _firsts_alike(folds: Sequence[Fold]) -> list[int]:
    """For each fold, the number of the first that reads the same memory with the same displacement: mostly its own."""
    firsts: dict[tuple[object, ...], int] = {}
    return [
        firsts.setdefault(
            (_memory(f.columns.matrix), f.columns.starts, None if f.bias is None else _memory(f.bias), id(f.values)), i
        )
        for i, f in enumerate(folds)
    ]


def _memory(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _bad(folds: Sequence[torch.Tensor]) -> list[bool]:
    """Which of the folds are not finite."""
    # One sum for all. In float64 the sum of finite numbers cannot overflow, unless they are float64 themselves.
    if math.isfinite(torch.cat(list(folds)).cpu().sum(dtype=torch.float64).item()):
        return [False] * len(folds)
    return [not bool(b.isfinite().all()) for b in folds]


def _not_finite(f: Fold) -> FastlockError:
    """The error of a fold that is not finite."""
    matrix = f.columns.matrix
    columns = [matrix[:, start : start + f.head_dim] for start in f.columns.starts]
    if not all(bool(of_head.isfinite().all()) for of_head in columns):
        return DamagedError(
            f"{f.name}: its fold is not finite: its locked columns hold NaN or infinite weights. Check the model, or "
            "download the checkpoint again."
        )
    if f.bias is not None and not f.bias.isfinite().all():
        return DamagedError(
            f"{f.name}: its fold is not finite: its bias holds NaN or infinite numbers. Check the model, or download "
            "the checkpoint again."
        )
    return FastlockError(
        f"{f.name}: its fold is not finite in {matrix.dtype}: the strength is too large for this dtype. Lower it."
    )
