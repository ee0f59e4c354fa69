"""The fold, b = W d + c, of many sites at once, by whatever suits the device they are on; once, or as a plan."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from fastlock.errors import DamagedError, FastlockError
from fastlock.kernels.ahead_of_time import cubins
from fastlock.kernels.ahead_of_time.ways import NoWayError
from fastlock.kernels.fold import reference
from fastlock.kernels.fold.launch import build_table, launch  # this imports no Triton
from fastlock.kernels.fold.reference import HeadColumns
from fastlock.threads import in_threads, threads_for

# Another thread folds where each has this many numbers of weights to read: half a millisecond, several times its start.
_NUMBERS_A_THREAD = 2**19


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


class FoldGroup(Protocol):
    """Some folds that are begun together."""

    def start(self) -> None: ...
    def finish(self) -> FastlockError | None: ...


class GroupedPlan:
    """A plan whose folds are in groups, each of one device, dtype and layout, begun all before the first is awaited."""

    _groups: Sequence[FoldGroup]

    def run(self) -> None:
        """Fold from the numbers that are there now, and wait until it is done.

        Raises:
            DamagedError: a fold is not finite, as weights or bias hold NaN or infinities.
            FastlockError: a fold is not finite, as the strength is too large for the dtype. In both cases the results
                hold what came out.
        """
        try:
            self.start()
            self.finish()
        except BaseException:
            self.settle()
            raise

    def start(self) -> None:
        """Begin to fold: on a CUDA device, what is launched on the current stream from now on finds the results.

        Raises:
            FastlockError: a CUDA graph is being captured; nothing was begun. Or a launch was refused.
        """
        check_not_capturing()
        try:
            for group in self._groups:
                group.start()
        except BaseException:
            self.settle()
            raise

    def finish(self) -> None:
        """Wait for what `start` began. Raises as `run` does."""
        try:
            first = None
            for group in self._groups:
                error = group.finish()
                first = first or error
        except BaseException:
            self.settle()
            raise
        if first is not None:
            raise first

    def settle(self) -> None:
        """Wait for whatever was begun, and ignore what went wrong in it: to be called while an error is on its way."""
        for group in self._groups:
            with contextlib.suppress(BaseException):
                group.finish()


class FoldPlan(GroupedPlan):
    """The folds of many sites, b = W d + c, prepared once and run as often as wanted.

    Only the locked head columns of W are read. On a CUDA device, all sites of one dtype, layout and head_dim take one
    kernel launch (so do a model, or a zoo). It accumulates in float32, in an order that does not change from run to
    run. Elsewhere, and on a GPU where no kernel passed its check (`fastlock.kernels.ahead_of_time.ways`), the reference
    folds in float64. Both round once. Sites that read the same memory with the same displacement are folded once, and
    share one result.

    A plan holds addresses: it is valid while weights and biases stay where they are. Their numbers may change.

    Attributes:
        results: b of each site, [hidden], of the columns' dtype and device, as the last run left it.
        by_torch: whether torch writes some of them, and counts that (`Tensor._version`); it does not count the kernel.
    """

    _groups: list[_ByKernel | _ByReference]

    def __init__(self, folds: Sequence[Fold]) -> None:
        check_not_capturing()
        self._firsts = _firsts_alike(folds)
        alike: dict[tuple[object, ...], list[int]] = {}
        for first in dict.fromkeys(self._firsts):
            alike.setdefault(_group(folds[first]), []).append(first)
        self._members = list(alike.values())  # of each group, which of the folds are in it
        with torch.inference_mode(False), torch.no_grad():
            self._groups = [_prepared([folds[i] for i in members]) for members in self._members]
        by_group = zip(self._members, self._groups, strict=True)
        results = {i: b for members, group in by_group for i, b in zip(members, group.results, strict=True)}
        self.results = [results[first] for first in self._firsts]
        self.by_torch = any(isinstance(group, _ByReference) for group in self._groups)

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
        by_group = list(zip(self._members, self._groups, strict=True))
        if any(folds[i].head_dim != group.head_dim for members, group in by_group for i in members):
            return False
        with torch.inference_mode(False), torch.no_grad():
            for number, (members, group) in enumerate(by_group):
                displaced = [folds[i] for i in members]
                try:
                    group.displace(displaced)
                except NoWayError:  # other heads may ask for another kernel
                    by_reference = _ByReference(displaced)
                    by_reference.results = group.results
                    self._groups[number] = by_reference
                    self.by_torch = True
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
        self._running = False
        device = self.results[0].device
        self._cuda_index = device.index if device.type == "cuda" else None
        self._stream: torch.cuda.Stream | None = None
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
        if self._running:  # and was never waited for: its flags are those of an earlier run
            self.finish()
        for bias, copy in self._copied:
            copy.copy_(bias)
        if self._cuda_index is not None:
            self._note_stream(self._cuda_index)
        self._running = True
        launch(self._table)

    def finish(self) -> FastlockError | None:
        """Wait, and give the error of the first fold that is not finite."""
        error = None
        if self._stream is not None:
            self._stream.synchronize()
        if self._flags[0]:
            first = int(self._flags[1:].argmax())
            self._flags.fill(0)
            error = _not_finite(self._folds[first])
        self._running = False
        return error

    def _note_stream(self, index: int) -> None:
        """Keep the stream that is launched on, to wait for that one. To make a Stream takes longer than to launch."""
        if self._stream is None or self._stream.cuda_stream != cubins.current_stream(index):
            self._stream = torch.cuda.current_stream(index)

    def __del__(self) -> None:
        # torch would give the flags' memory to others, and a kernel that still runs would write to it.
        if getattr(self, "_running", False) and self._stream is not None:
            with contextlib.suppress(Exception):
                self._stream.synchronize()

    def displace(self, displaced: Sequence[Fold]) -> None:
        folds = [replace(f, columns=d.columns, values=d.values) for f, d in zip(self._folds, displaced, strict=True)]
        if all(f.columns.starts == d.columns.starts for f, d in zip(self._folds, displaced, strict=True)):
            self._table.displace([f.values for f in folds])
            self._folds = folds
        else:
            self._build(folds)


class _ByReference:
    """The folds of one device, dtype, layout and head_dim, by the reference: on a CPU in several threads."""

    def __init__(self, folds: Sequence[Fold]) -> None:
        self._folds = list(folds)
        self.results = [_result_of(f) for f in folds]
        self.head_dim = folds[0].head_dim

    def start(self) -> None:
        parts = self._parts()
        if parts == 1:
            self._fold_part(0, 1)
        else:
            in_threads(lambda part: self._fold_part(part, parts), range(parts))

    def _parts(self) -> int:
        """How many threads fold, each a part of every site's rows."""
        if self.results[0].device.type != "cpu":
            return 1
        numbers = sum(f.values.numel() * len(b) for f, b in zip(self._folds, self.results, strict=True))
        return threads_for(max(1, numbers // _NUMBERS_A_THREAD))

    def _fold_part(self, part: int, parts: int) -> None:
        with torch.inference_mode(False), torch.no_grad():
            room = reference.Room.on(self.results[0].device, max(map(len, self.results)), self.head_dim)
            for f, b in zip(self._folds, self.results, strict=True):
                rows = slice(part * len(b) // parts, (part + 1) * len(b) // parts)
                columns = f.columns.in_rows(rows)
                b[rows].copy_(reference.fold(columns, f.values, None if f.bias is None else f.bias[rows], room))

    def finish(self) -> FastlockError | None:
        """Give the error of the first fold that is not finite."""
        return next(
            (_not_finite(f) for f, bad in zip(self._folds, _bad(self.results), strict=True) if bad),
            None,
        )

    def displace(self, displaced: Sequence[Fold]) -> None:
        self._folds = list(displaced)


def _prepared(folds: Sequence[Fold]) -> _ByKernel | _ByReference:
    """The folds of one group, by the kernel where there is one that is right; `NoWayError`'s warnings said why not."""
    try:
        return _way(folds[0])(folds)
    except NoWayError:
        return _ByReference(folds)


def check_not_capturing() -> None:
    """Refuse to fold while a CUDA graph is captured: whoever waits for the device then spoils the capture.

    Raises:
        FastlockError: this thread's current stream is being captured.
    """
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise FastlockError(
            "a CUDA graph is being captured, and a lock cannot be put in meanwhile: that waits for the device, which a "
            "capture does not allow. Relock before the capture; a fastlock.Plan can relock later as well, into the "
            "biases that the graph reads."
        )


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
    # In float64 the sum of finite numbers cannot overflow, unless they are float64 themselves. One sum a fold, as torch
    # would share a longer one among its threads; they are waited for once.
    sums = torch.stack([b.sum(dtype=torch.float64) for b in folds]).tolist()
    return [not (math.isfinite(total) or bool(b.isfinite().all())) for total, b in zip(sums, folds, strict=True)]


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
    return too_strong(f.name, matrix.dtype)


def rounded_fold(fold: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """A fold in the dtype that its bias is kept in: one in another, as of weights that were dequantised, is rounded.

    Args:
        fold: b, [hidden], finite.
        dtype: of the bias.
        name: of the site, for messages.

    Raises:
        FastlockError: that dtype cannot hold it.
    """
    if fold.dtype == dtype:
        return fold
    result = reference.rounded(fold, dtype)
    if not result.isfinite().all():
        raise too_strong(name, dtype)
    return result


def too_strong(name: str, dtype: torch.dtype) -> FastlockError:
    """The error of a fold that is finite, and not in this dtype."""
    return FastlockError(
        f"{name}: its fold is not finite in {dtype}: the strength is too large for this dtype. Lower it."
    )
