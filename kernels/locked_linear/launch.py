"""The projection with a lock per row, y = (x + s d[lock]) Wᵀ + c: the ways to compute it, and the choice among them.

Nothing here imports Triton before a kernel is launched.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch.nn import functional

from fastlock.errors import FastlockError
from fastlock.kernels.locked_linear.reference import Inputs, by_torch, layout_of
from fastlock.kernels.locked_linear.tiles import BY_TORCH, DTYPES, MAX_HEAD_DIM, Way, ways


def locked_linear(inputs: Inputs) -> torch.Tensor:
    """Compute it on a CUDA device by the way that was fastest there when it was first called for such a shape.

    What is chosen changes the result by no more than rounding. While a CUDA graph is captured nothing can be timed, or
    loaded on the device: for a shape that was not computed before, torch alone does it, this once.

    Returns:
        y, [rows, hidden] of x's dtype.
    """
    shape = inputs.shape()
    way = _chosen.get(shape)
    if way is None:
        with torch.cuda.device(inputs.x.device):
            # Times of no rows would decide for those that come later.
            if torch.cuda.is_current_stream_capturing() or 0 in (inputs.rows, *inputs.weight.shape):
                return run(BY_TORCH, inputs)
            candidates = ways_for(inputs)
            many = cold(inputs) if len(candidates) > 1 else []
            way = _chosen[shape] = fastest(candidates, partial(seconds, many=many))
    return run(way, inputs)


_chosen: dict[tuple[object, ...], Way] = {}


def chosen(inputs: Inputs) -> Way | None:
    """The way that was chosen for such inputs; None before they were first computed."""
    return _chosen.get(inputs.shape())


def forget() -> None:
    """Choose anew, as after another program used the GPU while the ways were timed."""
    _chosen.clear()


def fastest(candidates: Iterable[Way], time: Callable[[Way], float]) -> Way:
    """The candidate that takes the least time, the first of them if there are several; alone, it is not timed.

    Where none of them runs, the last one.
    """
    ways = list(candidates)
    if len(ways) == 1:
        return ways[0]
    times = {way: time(way) for way in ways}
    return min(ways, key=times.__getitem__) if min(times.values()) < math.inf else ways[-1]


def ways_for(inputs: Inputs) -> list[Way]:
    """The ways that these inputs can be computed in on their device."""
    in_one_piece = layout_of(inputs.weight) != "none"
    if inputs.x.dtype not in DTYPES or not in_one_piece or inputs.head_dim > MAX_HEAD_DIM or not _has_triton():
        return [BY_TORCH]
    device: Any = torch.cuda.get_device_properties(inputs.x.device)
    return ways(inputs.x.dtype, inputs.rows, inputs.head_dim, device.major, device.shared_memory_per_block_optin)


def run(way: Way, inputs: Inputs, out: torch.Tensor | None = None) -> torch.Tensor:
    """Compute it in one way on the current stream. Does not wait for it.

    Args:
        out: where Triton's projection is to put y, contiguous [rows, hidden]; None for new memory of x's dtype.

    Returns:
        y, [rows, hidden].

    Raises:
        FastlockError: Triton can't be imported.
    """
    x = inputs.x
    if out is None and way.tile is not None:
        out = x.new_empty(inputs.rows, inputs.weight.shape[0])
    if inputs.rows == 0 or inputs.weight.shape[0] == 0:
        return x.new_empty(inputs.rows, inputs.weight.shape[0]) if out is None else out
    if way == BY_TORCH:
        return by_torch(inputs)
    jit = _jit()
    if out is not None and way.tile is not None:
        jit.gemm(inputs if x.stride(1) == 1 else replace(inputs, x=x.contiguous()), way, out)
        return out
    if way.kind == "add":
        y = functional.linear(x, inputs.weight, inputs.bias)
        jit.add(inputs, y)
        return y
    return _around(inputs, jit)


def _around(inputs: Inputs, jit: Any) -> torch.Tensor:
    """torch's projection of x while d is in its locked columns; afterwards they hold again what they held, to the bit.

    That is a small part of x, where y would be read and written as a whole. Nothing else may read x on another stream
    meanwhile.
    """
    x = inputs.x
    own = x.stride(1) != 1 or x.stride(0) < x.shape[1]  # rows that overlap, as after expand, can't be written to
    if own:
        inputs = replace(inputs, x=x.contiguous())
    held = x.new_empty(inputs.rows, inputs.slots.shape[1], inputs.head_dim)
    jit.shift(inputs, held)
    try:
        return functional.linear(inputs.x, inputs.weight, inputs.bias)
    finally:  # the caller may go on with x where memory ran out
        if not own:
            jit.put_back(inputs, held)


def cold(inputs: Inputs, runs: int = 10) -> list[Inputs]:
    """The inputs with an x of their own; each with another copy of W, together twice as large as the L2 cache.

    A model reads each W once in a forward pass, which has left the cache until the next one; and what fails while it
    is timed must not have written to a user's x.
    """
    weight, x = inputs.weight, inputs.x.clone()
    cache: int = torch.cuda.get_device_properties(inputs.x.device).L2_cache_size
    count = min(runs, -(-2 * cache // (weight.numel() * weight.itemsize)))
    copies = [weight]
    with contextlib.suppress(torch.OutOfMemoryError):  # then as many as there is room for
        while len(copies) < count:
            copy = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device)
            copies.append(copy.copy_(weight))
    return [replace(inputs, x=x, weight=copies[i % len(copies)]) for i in range(runs)]


def seconds(way: Way, many: Sequence[Inputs], repeats: int = 3) -> float:
    """How long one way takes on the device, one of the inputs after the other; infinite where it does not run there.

    That is said in a warning, unless the device only has too little shared memory for it.
    """
    try:
        run(way, many[0])  # compiled here
    except Exception as error:  # no compiler, an assembler that is too old: another way will do
        if type(error).__name__ != "OutOfResources":
            warnings.warn(f"fastlock goes without {way.name} on this device: {error}", RuntimeWarning, stacklevel=2)
        return math.inf
    times: list[float] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The device waits while the host queues all runs, so that the host's pace is not in the time.
        torch.cuda._sleep(HOLD_CYCLES)
        start.record()
        for inputs in many:
            run(way, inputs)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(many))
    return statistics.median(times)


# Some milliseconds, in which the host queues ten runs.
HOLD_CYCLES = 8_000_000


@cache
def _has_triton() -> bool:
    try:
        _jit()
    except FastlockError:
        return False
    return True


def _jit() -> Any:
    try:
        from fastlock.kernels.locked_linear import triton_kernels as locked_linear_jit
    except ImportError as error:
        raise FastlockError(f"Triton, which compiles this kernel, can't be imported ({error}). Install it.") from None
    return locked_linear_jit
