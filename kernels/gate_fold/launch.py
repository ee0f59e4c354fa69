"""The fold of gates as one launch: C' = C + (C U) Vᵀ of every site, and W d + c of the same read.

Nothing here imports Triton: a fold by a kernel that was compiled ahead of time needs none.
"""

from __future__ import annotations

import importlib.util
import itertools
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
from fastlock.kernels.fold.launch import MOST_IN_Y, is_transposed
from fastlock.kernels.gate_fold.reference import GateSite, check_gate
from fastlock.kernels.gate_fold.self_check import check_gates
from fastlock.kernels.gate_fold.variants import (
    CHUNK_FIELDS,
    CHUNK_VECTORS,
    DTYPES,
    MAX_LANES,
    MOST_WASTED,
    SHAPES,
    SITE_FIELDS,
    VECTOR_BYTES,
    WIDE_FROM,
    GateVariant,
    lanes_for,
)

# Sites, chunks, vectors and flags, as in `GateTable`.
Arguments: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
# Given the arguments and the grid: the launch as a function of nothing.
Launcher: TypeAlias = Callable[[Arguments, tuple[int, int, int]], Callable[[], None]]


@dataclass(frozen=True)
class Chunk:
    """Columns that lie side by side where they are read and where they are written.

    Attributes:
        source, target: the first of them in the matrix that is read, and in the one that is written.
        first: which of the locked columns it is, counted over all heads.
        columns: how many they are.
    """

    source: int
    target: int
    first: int
    columns: int


@dataclass(frozen=True)
class GateTable:
    """All that one launch reads besides weights and biases, on their device; and the launch, ready to run.

    It holds addresses, and is good for as long as weights, biases and results stay where they are.

    Attributes:
        sites: what the kernel reads of each site, [sites, SITE_FIELDS] int64; there may be empty ones at the end.
        chunks: what it reads of each chunk of columns, [chunks, CHUNK_FIELDS] int64.
        vectors: U and V of the chunks, of every layer once, [chunks, CHUNK_VECTORS, lanes, columns] float32.
        flags: [1 + sites] int32, in the host's memory, which the kernel writes to. The first is not 0 if anything that
            a site got is not finite; the others say which site. To be read once the launch is done.
        variant: the kernel to launch.
        grid: blocks of rows of the tallest site, and sites, over y and z.
        run: launches a cubin with its arguments packed, where one fits; else Triton's JIT. Each way was checked on the
            device before (see `ahead_of_time.ways`).
    """

    sites: torch.Tensor
    chunks: torch.Tensor
    vectors: torch.Tensor
    flags: torch.Tensor
    variant: GateVariant
    grid: tuple[int, int, int]
    run: Callable[[], None] = field(repr=False, compare=False)


def runs_on(device: torch.device) -> bool:
    """Whether the kernel is for this kind of device."""
    return device.type == "cuda"


def takes(site: GateSite) -> bool:
    """Whether there is a kernel for its dtype, its layout, the same wherever it reads and writes, and its rank."""
    weights = [site.columns.matrix, site.target.matrix, *([] if site.kept is None else [site.kept])]
    known = all(weight.dtype in DTYPES and 1 in weight.stride() for weight in weights)
    alike = len({weight.stride(1) == 1 for weight in weights}) == 1
    return known and alike and lanes_for(_vectors_of(site)) is not None


def build_table(sites: Sequence[GateSite], shape: str | None = None) -> GateTable:
    """The table of one launch, for at least one site; one copy to the device.

    Products and sums are float32, in a fixed order; each result is rounded once, to the nearest. The first table of a
    variant in this process also rewrites weights that are made up, and holds them to the reference.

    Args:
        sites: all on one device, of one dtype and layout (see `is_transposed`); heads, ranks, hidden, strides and
            layers may differ.
        shape: how much of W a program takes at a time, a name of `variants.SHAPES`; None for what suits the sites.

    Raises:
        NoWayError: no launch of the variant is right on this device.
        UnsupportedError: the kernel does not take such a device, dtype, layout or rank.
        FastlockError: the arguments do not go together.
    """
    device = _check(sites)
    variant = _variant_for(sites, shape)
    check = partial(_passes, variant, device)
    launcher = WAYS.first(variant.name, cuda_index(device), _ways(variant, device), check)
    return _table(sites, variant, launcher)


def launch(table: GateTable) -> None:
    """Rewrite the table's sites on its device's current stream. Does not wait for it.

    Raises:
        UnsupportedError: no cubin fits, and Triton cannot be imported.
        FastlockError: the driver refused the launch, or this process was forked from the one that made the table.
    """
    if 0 not in table.grid:
        table.run()


def chunks_of(site: GateSite, most: int) -> list[Chunk]:
    """A site's locked columns in chunks of so many at most: heads that lie side by side are one run."""
    runs: list[Chunk] = []
    for number, (source, target) in enumerate(zip(site.columns.starts, site.target.starts, strict=True)):
        last = runs[-1] if runs else None
        if last is not None and (source, target) == (last.source + last.columns, last.target + last.columns):
            runs[-1] = Chunk(last.source, last.target, last.first, last.columns + site.head_dim)
        else:
            runs.append(Chunk(source, target, number * site.head_dim, site.head_dim))
    return [
        Chunk(run.source + i, run.target + i, run.first + i, min(most, run.columns - i))
        for run in runs
        for i in range(0, run.columns, most)
    ]


def _passes(variant: GateVariant, device: torch.device, launcher: Launcher) -> bool:
    """Whether one way of launching a variant is right. Raises as `check_gates`."""

    def rewrite(sites: list[GateSite]) -> torch.Tensor:
        table = _table(sites, variant, launcher)
        launch(table)
        return table.flags.to(device, non_blocking=True)  # after the kernel, which wrote them to the host's memory

    return check_gates(rewrite, variant, device)


def _variant_for(sites: Sequence[GateSite], shape: str | None) -> GateVariant:
    """The variant that rewrites such sites, of a shape that was asked for, or of the one that suits them."""
    if shape not in (None, *SHAPES):
        raise FastlockError(f"there is no shape {shape!r} of the kernel for gates; they are {', '.join(SHAPES)}.")
    first = sites[0].columns.matrix
    lanes = lanes_for(max(_vectors_of(site) for site in sites)) or MAX_LANES
    variant = GateVariant(first.dtype, lanes, is_transposed(first), _are_aligned(sites), shape or "narrow")
    if variant.shape == "wide" and (variant.transposed or not variant.aligned):
        raise UnsupportedError("the wide kernel for gates takes weights by rows, aligned to 16 bytes.")
    if shape is None and not variant.transposed and variant.aligned and _suits_wide(sites):
        return GateVariant(variant.dtype, lanes, variant.transposed, variant.aligned, "wide")
    return variant


def _suits_wide(sites: Sequence[GateSite]) -> bool:
    """Whether rows are long, and locked columns lie side by side, so that long chunks are mostly full."""
    columns = [len(site.columns.starts) * site.head_dim for site in sites]
    most = SHAPES["wide"].columns
    asked = most * sum(len(chunks_of(site, most)) for site in sites)
    return max(columns) > WIDE_FROM and asked <= MOST_WASTED * sum(columns)


def _table(sites: Sequence[GateSite], variant: GateVariant, launcher: Launcher) -> GateTable:
    most, device = variant.block_columns, sites[0].columns.matrix.device
    rows: list[list[int]] = []
    chunks: list[list[int]] = []
    vectors: list[torch.Tensor] = []
    places: dict[tuple[object, ...], int] = {}
    for number, site in enumerate(sites):
        of_site = chunks_of(site, most)
        layer = id(site.readers), id(site.writers), id(site.values), tuple((c.first, c.columns) for c in of_site)
        if layer not in places:
            places[layer] = sum(map(len, vectors))
            vectors.append(_vectors(site, of_site, variant))
        rows.append(_row(site, len(chunks), len(of_site), places[layer], number))
        chunks += [_chunk_row(site, chunk, variant) for chunk in of_site]
    in_z = -(-len(rows) // MOST_IN_Y)
    tallest = max(site.columns.matrix.shape[0] for site in sites)
    grid = -(-tallest // variant.block_rows), -(-len(rows) // in_z), in_z
    flags = on_host(1 + len(rows), torch.int32, device).zero_()
    rows += [[0] * SITE_FIELDS] * (grid[1] * grid[2] - len(rows))
    arguments = (*_packed(rows, chunks, torch.cat(vectors), device), flags)
    return GateTable(*arguments, variant, grid, launcher(arguments, grid))


def _row(site: GateSite, first: int, count: int, vectors: int, number: int) -> list[int]:
    """One site, in the order of SOURCE_STRIDE to SITE."""
    matrix, kept = site.columns.matrix, site.kept
    along = 1 if is_transposed(matrix) else 0
    strides = [matrix.stride(along), site.target.matrix.stride(along), 0 if kept is None else kept.stride(along)]
    vector_sums = [0 if of is None else of.data_ptr() for of in (site.bias, site.out)]
    row = [*strides, matrix.shape[0], first, count, vectors, len(site.readers), *vector_sums, number]
    return row + [0] * (SITE_FIELDS - len(row))


def _chunk_row(site: GateSite, chunk: Chunk, variant: GateVariant) -> list[int]:
    """One chunk, in the order of SOURCE to COLUMNS."""
    unit = variant.vector if variant.aligned and not variant.transposed else 1
    return [
        _address(site.columns.matrix, chunk.source),
        _address(site.target.matrix, chunk.target),
        0 if site.kept is None else _address(site.kept, chunk.first),
        chunk.columns // unit,
    ]


def _address(matrix: torch.Tensor, column: int) -> int:
    return matrix.data_ptr() + column * matrix.stride(1) * matrix.element_size()


def _vectors(site: GateSite, chunks: Sequence[Chunk], variant: GateVariant) -> torch.Tensor:
    """U and V of a site's chunks, [chunks, CHUNK_VECTORS, lanes, columns of a chunk] float32, zero where none is."""
    shape = len(chunks), CHUNK_VECTORS, variant.lanes, variant.block_columns
    vectors = torch.zeros(shape, dtype=torch.float32, device="cpu")
    read, written = site.writers.flatten(1), site.readers.flatten(1)
    if site.values is not None:
        read = torch.cat([read, site.values.flatten()[None].to(read.dtype)])
    for of_chunk, chunk in zip(vectors, chunks, strict=True):
        part = slice(chunk.first, chunk.first + chunk.columns)
        of_chunk[0, : len(read), : chunk.columns] = read[:, part]
        of_chunk[1, : len(written), : chunk.columns] = written[:, part]
    return vectors


def _packed(
    rows: list[list[int]], chunks: list[list[int]], vectors: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sites, chunks and vectors as views of one buffer on the device, each at a multiple of 16 bytes."""
    of_sites, of_chunks = SITE_FIELDS * len(rows), CHUNK_FIELDS * len(chunks)
    host = on_host(of_sites + of_chunks + vectors.numel() // 2, torch.int64, device)
    host[:of_sites] = torch.tensor(rows, dtype=torch.int64, device="cpu").flatten()
    host[of_sites : of_sites + of_chunks] = torch.tensor(chunks, dtype=torch.int64, device="cpu").flatten()
    host[of_sites + of_chunks :].view(torch.float32).copy_(vectors.flatten())
    table = host.to(device, non_blocking=True)
    return (
        table[:of_sites].view(-1, SITE_FIELDS),
        table[of_sites : of_sites + of_chunks].view(-1, CHUNK_FIELDS),
        table[of_sites + of_chunks :].view(torch.float32).view(vectors.shape),
    )


def _ways(variant: GateVariant, device: torch.device) -> dict[str, Launcher]:
    """How a variant may be launched, best first: by its cubin with arguments packed, or by Triton's JIT."""
    has_triton = importlib.util.find_spec("triton") is not None
    by_jit = partial(_by_jit, variant) if has_triton else None
    return ways_of(variant.name, cuda_index(device), by_cubin, by_jit)


def _by_jit(variant: GateVariant, arguments: Arguments, grid: tuple[int, int, int]) -> Callable[[], None]:
    return partial(_launch_jit, arguments, variant, grid, os.getpid())


def _launch_jit(arguments: Arguments, variant: GateVariant, grid: tuple[int, int, int], process: int) -> None:
    if os.getpid() != process and cuda_index(arguments[0].device) is not None:
        raise cubins.forked()
    from fastlock.kernels.gate_fold import triton_kernel as jit

    jit.launch(arguments, variant, grid)


def _vectors_of(site: GateSite) -> int:
    return len(site.readers) + (site.values is not None)


def _are_aligned(sites: Sequence[GateSite]) -> bool:
    """Whether every vector of W that is read or written starts at a multiple of 16 bytes and is inside a run."""
    return all(_is_aligned(site) for site in sites)


def _is_aligned(site: GateSite) -> bool:
    vector = VECTOR_BYTES // site.columns.matrix.element_size()
    transposed = is_transposed(site.columns.matrix)
    places = [(site.columns.matrix, site.columns.starts), (site.target.matrix, site.target.starts)]
    places += [] if site.kept is None else [(site.kept, (0,))]
    lengths = [site.columns.matrix.shape[0] if transposed else site.head_dim]
    lengths += [matrix.stride(1 if transposed else 0) for matrix, _ in places]
    addresses = [_address(matrix, start) for matrix, starts in places for start in starts]
    return all(n % vector == 0 for n in lengths) and all(n % VECTOR_BYTES == 0 for n in addresses)


def _check(sites: Sequence[GateSite]) -> torch.device:
    """The one device of all sites. Raises as `build_table`."""
    if not sites:
        raise FastlockError("there is no site to rewrite: give one or more.")
    matrix = sites[0].columns.matrix
    _check_kernel(matrix)
    transposed = is_transposed(matrix)
    for number, site in enumerate(sites):
        where = f"site {number}"
        check_gate(site.columns, site.readers, site.writers)
        if _vectors_of(site) > MAX_LANES:
            raise UnsupportedError(
                f"{where}: its gate has rank {len(site.readers)}; the kernel for gates takes up to {MAX_LANES}, a "
                "constant part counted as one."
            )
        _check_weights(site, matrix, transposed, where)
        _check_vectors(site, where)
    return matrix.device


def _check_kernel(matrix: torch.Tensor) -> None:
    """There is a kernel for such weights, and it can run where they are."""
    device = matrix.device
    if matrix.dtype not in DTYPES:
        raise UnsupportedError(f"the kernel for gates rewrites float16, bfloat16 and float32, not {matrix.dtype}.")
    if not runs_on(device) and not _interpreted():
        raise UnsupportedError(f"the weights are on {device}; the kernel for gates runs on a CUDA device.")
    if cuda_index(device) is not None and cubins.interpreting():
        raise FastlockError(
            f"TRITON_INTERPRET is set, which makes Triton run on the CPU, but the weights are on {device}. Unset it, "
            "or move them to the CPU."
        )


def _check_weights(site: GateSite, first: torch.Tensor, transposed: bool, where: str) -> None:
    """Source, target and what is kept: of one kind, and of the size that the gate says."""
    hidden, numbers = site.columns.matrix.shape[0], len(site.columns.starts) * site.head_dim
    weights = {"the weight": site.columns.matrix, "the target": site.target.matrix}
    if site.kept is not None:
        weights["kept"] = site.kept
        if site.kept.shape != (hidden, numbers):
            raise FastlockError(f"{where}: kept is {list(site.kept.shape)}; it must be {[hidden, numbers]}.")
    for name, weight in weights.items():
        if (weight.dtype, weight.device, is_transposed(weight)) != (first.dtype, first.device, transposed):
            raise FastlockError(
                f"{where}: {name} is {weight.dtype} on {weight.device}, with strides {weight.stride()}: all weights of "
                "one launch must have one dtype, device and layout."
            )
        if len(weight) != hidden:
            raise FastlockError(f"{where}: {name} has {len(weight)} rows, and the weight {hidden}.")
    check_gate(site.target, site.readers, site.writers)
    for starts in (site.columns.starts, site.target.starts):
        ordered = sorted(starts)
        if any(b - a < site.head_dim for a, b in itertools.pairwise(ordered)):
            raise FastlockError(f"{where}: heads of {site.head_dim} columns start at {list(starts)}, and overlap.")


def _check_vectors(site: GateSite, where: str) -> None:
    """The displacement, and what it gives."""
    matrix, head_dim = site.columns.matrix, site.head_dim
    if (site.values is None) != (site.out is None):
        raise FastlockError(f"{where}: give a displacement and where its fold goes, or neither.")
    if site.values is not None and site.values.shape != (len(site.columns.starts), head_dim):
        raise FastlockError(
            f"{where}: {len(site.columns.starts)} heads of {head_dim} columns, but values {list(site.values.shape)}."
        )
    for name, vector in {"the bias": site.bias, "out": site.out}.items():
        if vector is None:
            continue
        kind = vector.shape, vector.dtype, vector.device
        if kind != (matrix.shape[:1], matrix.dtype, matrix.device) or not vector.is_contiguous():
            raise FastlockError(
                f"{where}: {name} is {list(vector.shape)} {vector.dtype} on {vector.device}; it must be contiguous, "
                f"[{len(matrix)}] {matrix.dtype} on {matrix.device}."
            )


def _interpreted() -> bool:
    """Whether Triton is there and interprets its kernels, which then run on a CPU."""
    try:
        from fastlock.kernels.fold import triton_kernel as jit
    except ImportError:
        return False
    return jit.INTERPRETED
