"""The fold of a gate, W' = W + (W U) Vᵀ over the locked head columns, of many sites at once, by whatever suits them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fastlock.errors import DamagedError, FastlockError
from fastlock.fold import GroupedPlan, check_not_capturing
from fastlock.kernels.ahead_of_time.ways import NoWayError
from fastlock.kernels.fold.reference import HeadColumns
from fastlock.kernels.gate_fold.launch import build_table, launch, runs_on, takes  # this imports no Triton
from fastlock.kernels.gate_fold.reference import GateSite, check_gate, locked_columns, rewrite
from fastlock.threads import in_threads, threads_for

# Another thread rewrites where each has this many numbers of weights to read: a few milliseconds.
_NUMBERS_A_THREAD = 2**19


@dataclass(frozen=True, eq=False)
class GateFold:
    """What the fold of one site's gate takes.

    Attributes:
        columns: the locked heads' columns C of W, float16, bfloat16, float32 or float64.
        readers: V at each of these heads, [rank, len(heads), head_dim] float64 on the CPU.
        writers: U, times the strength, of the same shape, float64 on the CPU.
        name: of the site, for messages.
        target: where C' is to go: the columns of as many heads, of the same dtype and device, which share no memory
            with `columns` unless they are the same; detached. None: memory of its own.
        kept: where C is to be copied to as it was, [hidden, heads * head_dim] of the columns' dtype, device and layout;
            or None.
        values: d, the displacement at each of these heads, [len(heads), head_dim] float64 on the CPU; None without a
            constant part, or where another fold does it.
        bias: c, [hidden] of the columns' dtype and device, or None; detached.
    """

    columns: HeadColumns
    readers: torch.Tensor
    writers: torch.Tensor
    name: str
    target: HeadColumns | None = None
    kept: torch.Tensor | None = None
    values: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def head_dim(self) -> int:
        """How many columns a head has."""
        return self.readers.shape[-1]


def gate_fold(folds: Sequence[GateFold]) -> list[torch.Tensor]:
    """The locked columns of each site anew, C' = C + (C U) Vᵀ, rounded once; `GateFoldPlan` says how.

    What was read is left as it is: `target` does not count here.

    Returns:
        C' of each site, [hidden, heads * head_dim], contiguous, of the columns' dtype and device: the heads side by
        side, in the order of the columns' starts.

    Raises:
        DamagedError: new columns are not finite, as the weights hold NaN or infinities.
        FastlockError: they are not finite, as the strength is too large for the dtype; or a gate does not fit its
            columns.
    """
    plan = GateFoldPlan([replace(f, target=None) for f in folds])
    plan.run()
    return [columns.matrix.contiguous() for columns in plan.results]


class GateFoldPlan(GroupedPlan):
    """The gates of many sites, C' = C + (C U) Vᵀ, prepared once and folded as often as wanted.

    Only the locked head columns of W are read, once for the gate and the constant part together, and only they are
    written. On a CUDA device all sites of one dtype and layout take one kernel launch (so do a model, or a zoo), with
    sums in float32, in an order that does not change from run to run. Elsewhere, for ranks that the kernel does not
    take, and on a GPU where no kernel passed its check, the reference folds in float64. Both round once.

    A plan holds addresses: it is valid while weights, targets and biases stay where they are. Their numbers may change:
    a gate that is folded where it is read goes on top of the earlier one at each run. After an error targets, biases
    and what is kept hold what came out: whoever folds where W is has to put back what was kept.

    Attributes:
        results: C' of each site, as the last run left it: its target, or memory of the plan.
        biases: W d + c of each site, of the W that was read, [hidden] of its dtype and device; None without `values`.
        by_torch: whether torch writes some of them, and counts that (`Tensor._version`); it does not count the kernel.
    """

    def __init__(self, folds: Sequence[GateFold]) -> None:
        check_not_capturing()
        with torch.inference_mode(False), torch.no_grad():
            sites = [_site(f) for f in folds]
            groups: dict[tuple[object, ...], list[int]] = {}
            for number, site in enumerate(sites):
                groups.setdefault(_group(site), []).append(number)
            self._groups = [
                _prepared([folds[i] for i in members], [sites[i] for i in members]) for members in groups.values()
            ]
        self.results = [site.target for site in sites]
        self.biases = [site.out for site in sites]
        self.by_torch = any(isinstance(group, _ByReference) for group in self._groups)


def memory_for(columns: HeadColumns, head_dim: int) -> torch.Tensor:
    """Memory for a copy of these columns, [hidden, heads * head_dim], of their dtype, device and layout; not filled."""
    matrix, numbers = columns.matrix, len(columns.starts) * head_dim
    by_rows = matrix.stride(1) == 1
    return matrix.new_empty(len(matrix), numbers) if by_rows else matrix.new_empty(numbers, len(matrix)).t()


class _ByKernel:
    """The gates of one device, dtype and layout, by one launch."""

    def __init__(self, folds: Sequence[GateFold], sites: Sequence[GateSite]) -> None:
        self._folds, self._sites = folds, sites  # which holds their memory
        self._table = build_table(sites)
        self._stream: torch.cuda.Stream | None = None

    def start(self) -> None:
        self.finish()  # of an earlier run that was never waited for, the flags
        device = self._table.sites.device
        if device.type == "cuda":
            self._stream = torch.cuda.current_stream(device)
        launch(self._table)

    def finish(self) -> FastlockError | None:
        """Wait, and give the error of the first site that is not finite."""
        if self._stream is not None:
            self._stream.synchronize()
            self._stream = None
        bad = self._table.flags.tolist()
        self._table.flags.zero_()
        return _not_finite(self._folds[bad.index(1, 1) - 1]) if bad[0] else None

    def __del__(self) -> None:
        # torch would give the flags' memory to others, and a kernel that still runs would write to it.
        stream = getattr(self, "_stream", None)
        if stream is not None:
            with contextlib.suppress(Exception):
                stream.synchronize()


class _ByReference:
    """The gates of one device, dtype and layout, by the reference: on a CPU in several threads."""

    def __init__(self, folds: Sequence[GateFold], sites: Sequence[GateSite]) -> None:
        self._folds, self._sites = folds, sites
        self._finite = [True] * len(sites)

    def start(self) -> None:
        parts = self._parts()

        def fold_part(part: int) -> list[bool]:
            return self._fold_part(part, parts)

        found = [fold_part(0)] if parts == 1 else in_threads(fold_part, range(parts))
        self._finite = [all(of_site) for of_site in zip(*found, strict=True)]

    def _parts(self) -> int:
        """How many threads fold, each a part of every site's rows."""
        if self._sites[0].columns.matrix.device.type != "cpu":
            return 1
        numbers = sum(len(site.columns.matrix) * site.readers.numel() for site in self._sites)
        return threads_for(max(1, numbers // _NUMBERS_A_THREAD))

    def _fold_part(self, part: int, parts: int) -> list[bool]:
        with torch.inference_mode(False), torch.no_grad():
            return [rewrite(site.part(_share(len(site.columns.matrix), part, parts))) for site in self._sites]

    def finish(self) -> FastlockError | None:
        """Give the error of the first site that is not finite."""
        return next((_not_finite(f) for f, good in zip(self._folds, self._finite, strict=True) if not good), None)


def _share(rows: int, part: int, parts: int) -> slice:
    return slice(part * rows // parts, (part + 1) * rows // parts)


def _prepared(folds: Sequence[GateFold], sites: Sequence[GateSite]) -> _ByKernel | _ByReference:
    """The gates of one group, by the kernel where there is one that is right; `NoWayError`'s warnings said why not."""
    try:
        return _way(sites[0])(folds, sites)
    except NoWayError:
        return _ByReference(folds, sites)


def _way(site: GateSite) -> type[_ByKernel] | type[_ByReference]:
    return _ByKernel if runs_on(site.columns.matrix.device) and takes(site) else _ByReference


def _group(site: GateSite) -> tuple[object, ...]:
    """Sites for which this is the same can be one launch."""
    matrix = site.columns.matrix
    return matrix.device, matrix.dtype, matrix.stride(1) == 1, takes(site)


def _site(f: GateFold) -> GateSite:
    """With memory for what has none."""
    check_gate(f.columns, f.readers, f.writers)
    matrix, target = f.columns.matrix, f.target
    if target is None:
        target = HeadColumns.side_by_side(memory_for(f.columns, f.head_dim), f.head_dim)
    out = None if f.values is None else matrix.new_empty(matrix.shape[0])
    return GateSite(f.columns, f.readers, f.writers, target, f.kept, f.values, f.bias, out)


def _not_finite(f: GateFold) -> FastlockError:
    """The error of a site that is not finite."""
    # Where C' was written over C, C is what was kept.
    read = locked_columns(f.columns, f.head_dim) if f.kept is None else f.kept
    words = f"{f.name}: its rewritten weights are not finite"
    again = "Check the model, or download the checkpoint again."
    if not read.isfinite().all():
        return DamagedError(f"{words}: its locked columns hold NaN or infinite weights. {again}")
    if f.bias is not None and not f.bias.isfinite().all():
        return DamagedError(f"{words}: its bias holds NaN or infinite numbers. {again}")
    return FastlockError(f"{words} in {f.columns.matrix.dtype}: the strength is too large for this dtype. Lower it.")
