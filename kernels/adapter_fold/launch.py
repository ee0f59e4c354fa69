"""The fold of many adapters as one launch: what their layers share, and s·B(A d) of each.

Nothing here imports Triton: a fold by a kernel that was compiled ahead of time needs none.
"""

from __future__ import annotations

import importlib.util
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import torch

from fastlock.errors import FastlockError, UnsupportedError
from fastlock.kernels.adapter_fold.reference import LowRankSite
from fastlock.kernels.adapter_fold.self_check import check_adapters
from fastlock.kernels.adapter_fold.variants import DTYPES, MAX_RANK, SITE_FIELDS, VECTOR_BYTES, AdapterVariant
from fastlock.kernels.ahead_of_time import cubins
from fastlock.kernels.ahead_of_time.launchers import by_cubin, cuda_index, on_host, ways_of
from fastlock.kernels.ahead_of_time.ways import WAYS

# The most programs that CUDA lets a grid have in y.
MOST_IN_Y = 65535

# Sites, heads, values and flags, as in `AdapterTable`.
Arguments: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
# Given the arguments and the grid: the launch as a function of nothing.
Launcher: TypeAlias = Callable[[Arguments, tuple[int, int, int]], Callable[[], None]]


@dataclass(frozen=True)
class AdapterTable:
    """All that one launch reads besides adapters and shared parts, on their device; and the launch, ready to run.

    It holds addresses, and is good for as long as all of these and the results stay where they are.

    Attributes:
        sites: what the kernel reads of each site, [sites, SITE_FIELDS] int64; there may be empty ones at the end.
        heads: the first column of each locked head, [K] int64, of every layer once, however many adapters there are.
        values: the displacements of these heads one after the other, float32.
        flags: [1 + sites] int32, in the host's memory, which the kernel writes to. The first is not 0 if any site's
            fold was not finite; the others say which. To be read once the launch is done.
        variant: the kernel to launch.
        grid: blocks of rows of the tallest site, and sites, over y and z.
        run: launches a cubin with its arguments packed, where one fits; else Triton's JIT. Each way was checked on the
            device before (see `ahead_of_time.ways`).
    """

    sites: torch.Tensor
    heads: torch.Tensor
    values: torch.Tensor
    flags: torch.Tensor
    variant: AdapterVariant
    grid: tuple[int, int, int]
    run: Callable[[], None] = field(repr=False, compare=False)


def variant_of(site: LowRankSite, out_dtype: torch.dtype) -> AdapterVariant:
    """The kernel for one site: sites for which it is the same can be one launch.

    Raises:
        UnsupportedError: there is none for its dtypes or its rank.
    """
    dtype, rank = site.up.dtype, site.up.shape[-1]
    if dtype not in DTYPES or out_dtype not in DTYPES:
        raise UnsupportedError(
            f"the kernel for adapters reads and writes float16, bfloat16 and float32, not {dtype} and {out_dtype}."
        )
    if not 0 < rank <= MAX_RANK:
        raise UnsupportedError(f"an adapter has rank {rank}; the kernel for adapters takes 1 to {MAX_RANK}.")
    return AdapterVariant(dtype, out_dtype, _is_aligned(site))


def build_table(sites: Sequence[LowRankSite], out: Sequence[torch.Tensor]) -> AdapterTable:
    """The table of one launch, for at least one site; one copy to the device.

    Products and sums are float32, in a fixed order; each result is rounded once, to the nearest of out's dtype. The
    first table of a variant in this process also folds adapters that are made up, and holds them to the reference.

    Args:
        sites: all on one device, of one head_dim and, with their results, of one variant (see `variant_of`); ranks,
            heads, hidden, strides and layers may differ.
        out: where each site's result goes, [hidden] of one dtype, on that device.

    Raises:
        NoWayError: no launch of the variant is right on this device.
        UnsupportedError: the kernel does not take such adapters or such a device.
        FastlockError: the arguments do not go together.
    """
    variant, device = _checked(sites, out)
    check = partial(_passes, variant, device)
    launcher = WAYS.first(variant.name, cuda_index(device), _ways(variant, device), check)
    return _table(sites, out, variant, launcher)


def launch(table: AdapterTable) -> None:
    """Fold the table's sites on its device's current stream. Does not wait for it.

    Raises:
        UnsupportedError: no cubin fits, and Triton cannot be imported.
        FastlockError: the driver refused the launch, or this process was forked from the one that made the table.
    """
    if 0 not in table.grid:
        table.run()


def runs_on(device: torch.device) -> bool:
    """Whether the kernel is for this kind of device."""
    return device.type == "cuda"


def _passes(variant: AdapterVariant, device: torch.device, launcher: Launcher) -> bool:
    """Whether one way of launching a variant is right. Raises as `check_adapters`."""

    def fold(sites: list[LowRankSite], out: list[torch.Tensor]) -> torch.Tensor:
        table = _table(sites, out, variant, launcher)
        launch(table)
        return table.flags.to(device, non_blocking=True)  # after the kernel, which wrote them to the host's memory

    return check_adapters(fold, variant, device)


def _table(
    sites: Sequence[LowRankSite], out: Sequence[torch.Tensor], variant: AdapterVariant, launcher: Launcher
) -> AdapterTable:
    heads: list[int] = []
    values: list[torch.Tensor] = []
    places: dict[tuple[int, tuple[int, ...]], int] = {}
    rows: list[list[int]] = []
    for number, (site, result) in enumerate(zip(sites, out, strict=True)):
        layer = id(site.values), site.columns.starts
        if layer not in places:
            places[layer] = len(heads)
            heads += site.columns.starts
            values.append(site.values)
        rows.append(_row(site, result, places[layer], number))
    device = out[0].device
    in_z = -(-len(rows) // MOST_IN_Y)
    grid = -(-max(map(len, out)) // variant.block_rows), -(-len(rows) // in_z), in_z
    flags = on_host(1 + len(rows), torch.int32, device).zero_()
    rows += [[0] * SITE_FIELDS] * (grid[1] * grid[2] - len(rows))
    arguments = (*_packed(rows, heads, values, device), flags)
    return AdapterTable(*arguments, variant, grid, launcher(arguments, grid))


def _row(site: LowRankSite, result: torch.Tensor, first: int, number: int) -> list[int]:
    """One site, in the order of A to SITE."""
    down, up, bias = site.columns.matrix, site.up, site.bias
    scale = int.from_bytes(struct.pack("<f", site.scale), "little")
    return [
        *(down.data_ptr(), *down.stride(), up.data_ptr(), *up.stride()),
        *(up.shape[1], up.shape[0], site.values.shape[1], first, len(site.columns.starts), scale),
        *(0 if bias is None else bias.data_ptr(), site.shared.data_ptr(), result.data_ptr(), number),
    ]


def _packed(
    rows: list[list[int]], heads: list[int], values: list[torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sites, heads and values as views of one buffer on the device, each at a multiple of 16 bytes."""
    of_sites = SITE_FIELDS * len(rows)
    of_heads = len(heads) + len(heads) % 2
    numbers = torch.cat([of_layer.flatten() for of_layer in values])
    host = on_host(of_sites + of_heads + (len(numbers) + 1) // 2, torch.int64, device)
    host[:of_sites] = torch.tensor(rows, dtype=torch.int64, device="cpu").flatten()
    host[of_sites : of_sites + len(heads)] = torch.tensor(heads, dtype=torch.int64, device="cpu")
    host[of_sites + of_heads :].view(torch.float32)[: len(numbers)] = numbers
    table = host.to(device, non_blocking=True)
    return (
        table[:of_sites].view(-1, SITE_FIELDS),
        table[of_sites : of_sites + len(heads)],
        table[of_sites + of_heads :].view(torch.float32)[: len(numbers)],
    )


def _ways(variant: AdapterVariant, device: torch.device) -> dict[str, Launcher]:
    """How a variant may be launched, best first: by its cubin with arguments packed, or by Triton's JIT."""
    has_triton = importlib.util.find_spec("triton") is not None
    by_jit = partial(_by_jit, variant) if has_triton else None
    return ways_of(variant.name, cuda_index(device), by_cubin, by_jit)


def _by_jit(variant: AdapterVariant, arguments: Arguments, grid: tuple[int, int, int]) -> Callable[[], None]:
    return partial(_launch_jit, arguments, variant, grid, os.getpid())


def _launch_jit(arguments: Arguments, variant: AdapterVariant, grid: tuple[int, int, int], process: int) -> None:
    if os.getpid() != process and cuda_index(arguments[0].device) is not None:
        raise cubins.forked()
    from fastlock.kernels.adapter_fold import triton_kernel as jit

    jit.launch(arguments, variant, grid)


def _is_aligned(site: LowRankSite) -> bool:
    """Whether every vector of A and B that the kernel reads starts at a multiple of 16 bytes and is inside its row."""
    down, up = site.columns.matrix, site.up
    vector = VECTOR_BYTES // up.element_size()
    lengths = (up.shape[1], site.values.shape[1], down.stride(0), up.stride(0), *site.columns.starts)
    addresses = (down.data_ptr(), up.data_ptr())
    contiguous = down.stride(1) == 1 == up.stride(1)
    return contiguous and all(n % vector == 0 for n in lengths) and all(n % VECTOR_BYTES == 0 for n in addresses)


def _checked(sites: Sequence[LowRankSite], out: Sequence[torch.Tensor]) -> tuple[AdapterVariant, torch.device]:
    """The one variant and device of all sites. Raises as `build_table`."""
    if not sites or len(sites) != len(out):
        raise FastlockError(f"{len(sites)} sites and {len(out)} results: give one result for each of one site or more.")
    device = out[0].device
    _check_device(device)
    variant = variant_of(sites[0], out[0].dtype)
    head_dim = sites[0].values.shape[-1]
    for number, (site, result) in enumerate(zip(sites, out, strict=True)):
        _check_shapes(site, result, head_dim, device, f"site {number}")
        if variant_of(site, result.dtype) != variant:
            raise FastlockError(
                f"site {number} takes the kernel {variant_of(site, result.dtype).name}, and site 0 {variant.name}: "
                "they cannot be one launch."
            )
    return variant, device


def _check_device(device: torch.device) -> None:
    if not runs_on(device) and not _interpreted():
        raise UnsupportedError(f"the adapters are on {device}; the kernel for adapters runs on a CUDA device.")
    if cuda_index(device) is not None and cubins.interpreting():
        raise FastlockError(
            f"TRITON_INTERPRET is set, which makes Triton run on the CPU, but the adapters are on {device}. Unset it, "
            "or move them to the CPU."
        )


def _check_shapes(site: LowRankSite, result: torch.Tensor, head_dim: int, device: torch.device, where: str) -> None:
    """What the kernel would misread."""
    down, up, starts = site.columns.matrix, site.up, site.columns.starts
    if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1]:
        raise FastlockError(f"{where}: A is {list(down.shape)} and B {list(up.shape)}; they must share the rank.")
    if site.values.shape != (len(starts), head_dim) or head_dim == 0:
        raise FastlockError(
            f"{where}: {len(starts)} heads of {head_dim} columns, but values {list(site.values.shape)}."
        )
    if any(not 0 <= start <= down.shape[1] - head_dim for start in starts):
        raise FastlockError(f"{where}: heads of {head_dim} columns start at {list(starts)}; A has {down.shape[1]}.")
    vectors = {"shared": (site.shared, torch.float32), "out": (result, result.dtype)}
    if site.bias is not None:
        vectors["β"] = site.bias, up.dtype
    for name, (vector, dtype) in vectors.items():
        if vector.shape != up.shape[:1] or not vector.is_contiguous() or vector.dtype != dtype:
            raise FastlockError(
                f"{where}: {name} is {list(vector.shape)} {vector.dtype}; it must be contiguous, [{len(up)}] {dtype}."
            )
    if down.dtype != up.dtype or {x.device for x in (down, up, *(x for x, _ in vectors.values()))} != {device}:
        raise FastlockError(f"{where}: A, B, β, shared and out must be on {device}, and A and B of one dtype.")


def _interpreted() -> bool:
    """Whether Triton is there and interprets its kernels, which then run on a CPU."""
    try:
        from fastlock.kernels.fold.triton_kernel import INTERPRETED
    except ImportError:
        return False
    return INTERPRETED
