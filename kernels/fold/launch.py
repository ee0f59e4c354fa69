"""The fold as one launch: b = W d + c of every site, over the locked head columns only.

Nothing here imports Triton: a fold by a kernel that was compiled ahead of time needs none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import torch

from fastlock.errors import FastlockError, UnsupportedError
from fastlock.kernels.ahead_of_time import cubins
from fastlock.kernels.ahead_of_time.launchers import by_cubin, cuda_index, on_host, ways_of
from fastlock.kernels.ahead_of_time.ways import WAYS
from fastlock.kernels.fold.reference import HeadColumns
from fastlock.kernels.fold.self_check import check_fold
from fastlock.kernels.fold.variants import (
    COUNT_AND_SITE,
    DTYPES,
    KINDS,
    MAX_HEAD_DIM,
    SITE_FIELDS,
    VECTOR_BYTES,
    Variant,
    default_variant,
)

# The most programs that CUDA lets a grid have in y.
MOST_IN_Y = 65535


@dataclass(frozen=True)
class Table:
    """All that one launch reads besides W and the biases, on the weights' device; and the launch, ready to run.

    It holds addresses, and is good for as long as the weights, biases and results stay where they are. K is the number
    of locked heads of all sites together.

    Attributes:
        sites: what the kernel reads of each site, [sites, SITE_FIELDS] int64: those with most heads first, so that the
            last programs are short ones. There may be empty ones at the end, see `grid`.
        heads: the address of each locked head's first column, [K] int64.
        values: the displacements, [K, head_dim] float32.
        flags: [1 + sites] int32, in the host's memory, which the kernel writes to: no copy has to be waited for. The
            first is not 0 if any site's fold was not finite; the others say which, in the caller's order. To be read
            once the launch is done.
        variant: the kernel to launch.
        grid: blocks of rows of the tallest site, and sites, over y and z. The hardware starts with x: neighbouring
            programs read neighbouring rows of one site, and few pages at once, however many models there are.
        run: launches a cubin with its arguments packed, where one fits (see `cubins.Loader`); else Triton's JIT. Each
            way was checked on the device before (see `ahead_of_time.ways`).
    """

    sites: torch.Tensor
    heads: torch.Tensor
    values: torch.Tensor
    flags: torch.Tensor
    variant: Variant
    grid: tuple[int, int, int]
    run: Callable[[], None] = field(repr=False, compare=False)

    def displace(self, values: Sequence[torch.Tensor]) -> None:
        """Put other displacements of the same heads in place, for the launches that follow; one copy to the device.

        Args:
            values: of each site, [its heads, head_dim] float64 or float32 on the CPU, as in `fold_sites`.
        """
        host = on_host(self.values.numel(), torch.float32, self.values.device)
        host.copy_(torch.cat(list(values)).flatten())
        self.values.copy_(host.view(self.values.shape), non_blocking=True)


def fold_sites(
    columns: Sequence[HeadColumns],
    values: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    out: Sequence[torch.Tensor],
) -> None:
    """Fold every site, out = W d + c (the paper's b_l), in one launch on the device's current stream. Does not wait.

    Products and sums are float32, in a fixed order; the result is rounded once, to the nearest of out's dtype.

    Args:
        columns: the locked heads' columns of each site, in a matrix [hidden, width] of float16, bfloat16 or float32.
            All matrices have one dtype, device and layout (see `is_transposed`); hidden, width and the leading stride
            may differ.
        values: the displacement d of each site's locked heads, [its heads, head_dim] float64 or float32 on the CPU.
        biases: each site's bias c, [hidden] of the matrices' dtype on their device, or None.
        out: where each site's result goes, [hidden] of the matrices' dtype, or all of float32, on their device. It may
            be the site's own bias.

    Raises:
        UnsupportedError: the kernel does not take such a device, dtype, layout or head_dim; or no cubin fits, and
            Triton, which would compile one, cannot be imported.
        FastlockError: the arguments do not go together, or the driver refused the launch. Nothing is written then.
    """
    if columns:
        table = build_table(columns, values, biases, out)
        launch(table)
        # torch gives pinned memory to others once the copies from it have run: this one, after the kernel.
        table.flags.to(table.values.device, non_blocking=True)


def is_transposed(weight: torch.Tensor) -> bool:
    """Which way a weight [hidden, width] lies in memory: row by row (False, nn.Linear) or column by column (True).

    Raises:
        UnsupportedError: neither its rows nor its columns are contiguous.
    """
    if weight.dim() == 2 and weight.stride(1) == 1:
        return False
    if weight.dim() == 2 and weight.stride(0) == 1:
        return True
    raise UnsupportedError(
        f"a weight of shape {list(weight.shape)} has strides {weight.stride()}; the fold kernel needs contiguous rows "
        "or columns. Call .contiguous() on it first."
    )


def build_table(
    columns: Sequence[HeadColumns],
    values: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    out: Sequence[torch.Tensor],
    kind: str | None = None,
) -> Table:
    """The table of one launch, for at least one site; one copy to the device. Takes and raises as `fold_sites`.

    The first table of a variant in this process also folds the first and the last site into memory of their own, waits
    for that, and holds some rows to the reference (see `self_check`).

    Args:
        kind: how W is read, a name of `variants.KINDS`; None for the default.

    Raises:
        NoWayError: no launch of the variant is right on this device.
    """
    _check(columns, values, biases, out)
    arguments, variant, grid = _packed(columns, values, biases, out, kind)
    device = arguments[0].device
    check = partial(_passes, columns, biases, variant)
    launcher = WAYS.first(f"fold {variant.name}", cuda_index(device), _ways(variant, device), check)
    return Table(*arguments, variant, grid, launcher(arguments, grid))


def _passes(
    columns: Sequence[HeadColumns], biases: Sequence[torch.Tensor | None], variant: Variant, launcher: Launcher
) -> bool:
    """Whether a launch of the first and the last site gives what the reference gives. Raises as `check_fold`."""
    ends = [0, len(columns) - 1] if len(columns) > 1 else [0]
    columns, biases = [columns[i] for i in ends], [biases[i] for i in ends]

    def fold(values: list[torch.Tensor], results: list[torch.Tensor]) -> torch.Tensor:
        arguments, _, grid = _packed(columns, values, biases, results, variant=variant)
        if 0 not in grid:
            launcher(arguments, grid)()
        return arguments[3].to(columns[0].matrix.device, non_blocking=True)  # after the kernel: see `fold_sites`

    return check_fold(fold, columns, biases, variant.head_dim, variant.out_dtype)


def _packed(
    columns: Sequence[HeadColumns],
    values: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    out: Sequence[torch.Tensor],
    kind: str | None = None,
    variant: Variant | None = None,
) -> tuple[Arguments, Variant, tuple[int, int, int]]:
    """What one launch takes: its arguments; its variant, unless that is given; its grid."""
    weights = [of_site.matrix for of_site in columns]
    transposed = any(is_transposed(weight) for weight in weights)
    rows: list[list[int]] = []
    addresses: list[int] = []
    for site, (of_site, bias, result) in enumerate(zip(columns, biases, out, strict=True)):
        weight, first = of_site.matrix, len(addresses)
        column_bytes = weight.stride(1) * weight.element_size()
        heads = [weight.data_ptr() + start * column_bytes for start in of_site.starts]
        addresses += heads
        # In the order of STRIDE, HIDDEN, HEAD, NEXT_HEAD, FIRST, COUNT_AND_SITE, BIAS, OUT.
        rows.append([weight.stride(1 if transposed else 0), weight.shape[0], *(*heads, 0, 0)[:2], first])
        rows[-1] += [len(heads) + (site << 32), 0 if bias is None else bias.data_ptr(), result.data_ptr()]
    variant = variant or _variant_for(weights, addresses, out[0].dtype, values[0].shape[1], transposed, kind)
    device = weights[0].device
    flags = on_host(1 + len(rows), torch.int32, device).zero_()
    grid = _grid(max(weight.shape[0] for weight in weights), len(rows), variant)
    rows.sort(key=lambda row: row[COUNT_AND_SITE] & 0xFFFFFFFF, reverse=True)
    rows += [[0] * SITE_FIELDS] * (grid[1] * grid[2] - len(rows))
    parts = _pack([number for row in rows for number in row], addresses, torch.cat(list(values)), device)
    return (*parts, flags), variant, grid


def _grid(hidden: int, sites: int, variant: Variant) -> tuple[int, int, int]:
    """That of so many sites, the tallest of which has `hidden` rows; where y does not hold them all, in equal parts."""
    in_z = -(-sites // MOST_IN_Y)
    return -(-hidden // variant.block_rows), -(-sites // in_z), in_z


def _variant_for(
    weights: Sequence[torch.Tensor],
    addresses: Sequence[int],
    out_dtype: torch.dtype,
    head_dim: int,
    transposed: bool,
    kind: str | None,
) -> Variant:
    """The variant that reads such weights, of a kind that was asked for, or of the default one."""
    aligned = _aligned(weights, addresses, head_dim, transposed)
    if kind is None:
        return default_variant(weights[0].dtype, out_dtype, head_dim, transposed, aligned)
    if kind not in KINDS:
        raise FastlockError(f"there is no kind {kind!r} of the fold kernel; the kinds are {', '.join(KINDS)}.")
    variant = Variant(weights[0].dtype, out_dtype, head_dim, transposed, aligned, kind)
    if variant.misfit:
        raise UnsupportedError(f"the fold kernel's kind {kind} cannot read these weights: {variant.misfit}.")
    return variant


def launch(table: Table) -> None:
    """Run the fold of a table on its device's current stream. Does not wait for it.

    Raises:
        UnsupportedError: no cubin fits, and Triton cannot be imported.
        FastlockError: the driver refused the launch, or this process was forked from the one that made the table.
    """
    if 0 not in table.grid:
        table.run()


# Sites, heads, values and flags, as in `Table`.
Arguments: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

# Given the arguments and the grid: the launch as a function of nothing.
Launcher: TypeAlias = Callable[[Arguments, tuple[int, int, int]], Callable[[], None]]


def _ways(variant: Variant, device: torch.device) -> dict[str, Launcher]:
    """How a variant may be launched on a device, best first: by its cubin with arguments packed, or by Triton's JIT."""
    return ways_of(variant.name, cuda_index(device), by_cubin, partial(_by_jit, variant))


def _by_jit(variant: Variant, arguments: Arguments, grid: tuple[int, int, int]) -> Callable[[], None]:
    return partial(_launch_jit, arguments, variant, grid, os.getpid())


def _launch_jit(arguments: Sequence[torch.Tensor], variant: Variant, grid: tuple[int, int, int], process: int) -> None:
    if os.getpid() != process and cuda_index(arguments[0].device) is not None:
        raise cubins.forked()
    try:
        from fastlock.kernels.fold import triton_kernel as jit
    except ImportError as error:
        raise UnsupportedError(
            f"no kernel compiled ahead of time fits (`fastlock doctor` says why), and Triton, which would compile one, "
            f"cannot be imported ({error}). Install Triton, or relock on the CPU."
        ) from None
    jit.launch(arguments, variant, grid)


def _aligned(weights: Sequence[torch.Tensor], addresses: Sequence[int], head_dim: int, transposed: bool) -> bool:
    """Whether every vector of W that the kernel reads starts at a multiple of 16 bytes and is inside a head's block."""
    vector = VECTOR_BYTES // weights[0].element_size()
    lengths = [weight.shape[0] for weight in weights] if transposed else [head_dim]
    strides = [weight.stride(1 if transposed else 0) for weight in weights]
    return all(n % vector == 0 for n in lengths + strides) and all(n % VECTOR_BYTES == 0 for n in addresses)


def _pack(
    rows: list[int], addresses: list[int], values: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sites, heads and values of a table as views of one buffer on the device, each at a multiple of 16 bytes."""
    numbers = rows + addresses + [0] * (len(addresses) % 2)  # a row of sites is 64 bytes, and two int64 are 16
    host = on_host(len(numbers) + (values.numel() + 1) // 2, torch.int64, device)
    host[: len(numbers)] = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    host[len(numbers) :].view(torch.float32)[: values.numel()] = values.flatten()
    table = host.to(device, non_blocking=True)
    return (
        table[: len(rows)].view(-1, SITE_FIELDS),
        table[len(rows) : len(rows) + len(addresses)],
        table[len(numbers) :].view(torch.float32)[: values.numel()].view(values.shape),
    )


def _check(
    columns: Sequence[HeadColumns],
    values: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    out: Sequence[torch.Tensor],
) -> None:
    if not len(columns) == len(values) == len(biases) == len(out):
        raise FastlockError("columns, values, biases and out must have one entry for each site.")
    weights = [of_site.matrix for of_site in columns]
    dtype, device = weights[0].dtype, weights[0].device
    transposed = [is_transposed(weight) for weight in weights]
    contiguous = 0 if any(transposed) else 1
    _check_kernel(dtype, device, values[0].shape[-1])
    for site, (of_site, value, bias, result) in enumerate(zip(columns, values, biases, out, strict=True)):
        weight = of_site.matrix
        hidden = weight.shape[0]
        if (weight.dtype, weight.device, weight.stride(contiguous)) != (dtype, device, 1):
            raise FastlockError(f"site {site}: all weights of one launch must have one dtype, device and layout.")
        _check_heads(of_site, value, values[0].shape[-1], site)
        if bias is not None:
            _check_vector(bias, hidden, (dtype,), device, f"site {site}: the bias")
        _check_vector(result, hidden, (dtype, torch.float32), device, f"site {site}: out")
        if result.dtype != out[0].dtype:
            raise FastlockError(f"site {site}: all results of one launch must have one dtype.")


def _check_kernel(dtype: torch.dtype, device: torch.device, head_dim: int) -> None:
    """There is a kernel for such weights, and it can run where they are."""
    if dtype not in DTYPES:
        raise UnsupportedError(f"the fold kernel reads float16, bfloat16 and float32 weights, not {dtype}.")
    if cuda_index(device) is not None and cubins.interpreting():
        raise FastlockError(
            f"TRITON_INTERPRET is set, which makes Triton run on the CPU, but the weights are on {device}. Unset it, "
            "or move them to the CPU."
        )
    if cuda_index(device) is None and not _interpreted():
        raise UnsupportedError(f"the weights are on {device}; the fold kernel runs on a CUDA device.")
    if not 0 < head_dim <= MAX_HEAD_DIM:
        raise UnsupportedError(f"head_dim is {head_dim}; the fold kernel takes 1 to {MAX_HEAD_DIM}.")


def _check_heads(columns: HeadColumns, values: torch.Tensor, head_dim: int, site: int) -> None:
    """There is a displacement for each locked head, and each head is inside the weight."""
    width, starts = columns.matrix.shape[1], columns.starts
    if values.shape != (len(starts), head_dim):
        raise FastlockError(f"site {site}: {len(starts)} heads of {head_dim} columns, but values {list(values.shape)}.")
    if any(not 0 <= start <= width - head_dim for start in starts):
        raise FastlockError(
            f"site {site}: heads of {head_dim} columns start at {list(starts)}, but the weight has {width} columns."
        )


def _interpreted() -> bool:
    """Whether Triton is there and interprets its kernels, which then run on a CPU."""
    try:
        from fastlock.kernels.fold import triton_kernel as jit
    except ImportError:
        return False
    return jit.INTERPRETED


def _check_vector(
    vector: torch.Tensor, hidden: int, dtypes: tuple[torch.dtype, ...], device: torch.device, name: str
) -> None:
    if vector.shape != (hidden,) or vector.dtype not in dtypes or vector.device != device or not vector.is_contiguous():
        raise FastlockError(
            f"{name} is {list(vector.shape)} {vector.dtype} on {vector.device}; it must be contiguous, "
            f"[{hidden}] {dtypes[0]} on {device}."
        )
