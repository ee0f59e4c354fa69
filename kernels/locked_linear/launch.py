"""The projection with a lock per row, y = (x + s d[lock]) Wᵀ + c: the ways to compute it, and the choice among them.

Nothing here imports Triton before a kernel is launched.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch.nn import functional

from fastlock.errors import FastlockWarning, UnsupportedError
from fastlock.kernels.ahead_of_time.ways import WAYS
from fastlock.kernels.locked_linear.reference import Inputs, by_torch, layout_of
from fastlock.kernels.locked_linear.self_check import check_rows
from fastlock.kernels.locked_linear.tiles import BY_TORCH, DTYPES, MAX_HEAD_DIM, Multiprocessors, Sizes, Way, ways
from fastlock.kernels.locked_linear.timing import fastest, in_turn, on_device


class Choices:
    """Which way each shape is computed in: the one that was fastest when the shape was first seen."""

    def __init__(self) -> None:
        self._ways: dict[tuple[object, ...], Way] = {}

    def of(self, inputs: Inputs) -> Way | None:
        """What was chosen for such inputs; None before they were first computed."""
        return self._ways.get(inputs.shape())

    def choose(self, inputs: Inputs) -> Way:
        """Time the ways on these inputs' CUDA device, and keep the fastest; or torch alone, this once.

        While a CUDA graph is captured, nothing can be timed, or loaded on the device. Nor is anything chosen by inputs
        without a number in them: their times would decide for those that come later.
        """
        with torch.cuda.device(inputs.x.device):
            if torch.cuda.is_current_stream_capturing() or 0 in (inputs.rows, *inputs.weight.shape):
                return BY_TORCH
            candidates = ways_for(inputs)
            way = candidates[0] if len(candidates) == 1 else fastest(seconds(candidates, cold(inputs)))
            self._ways[inputs.shape()] = way
        return way

    def forget(self) -> None:
        """Choose anew, as after another program used the GPU while the ways were timed."""
        self._ways.clear()


# Of this process.
CHOICES = Choices()


def locked_linear(inputs: Inputs) -> torch.Tensor:
    """Compute it on a CUDA device by the way that was fastest there when it was first called for such a shape.

    What is chosen changes the result by no more than rounding.

    Returns:
        y, [rows, hidden] of x's dtype.
    """
    return run(CHOICES.of(inputs) or CHOICES.choose(inputs), inputs)


def ways_for(inputs: Inputs) -> list[Way]:
    """The ways in which these inputs can be computed on their device."""
    contiguous = layout_of(inputs.weight) != "none"
    if inputs.x.dtype not in DTYPES or not contiguous or inputs.head_dim > MAX_HEAD_DIM or not _has_triton():
        return [BY_TORCH]
    device: Any = torch.cuda.get_device_properties(inputs.x.device)
    on = Multiprocessors(device.major, device.multi_processor_count, device.shared_memory_per_block_optin)
    hidden, width = inputs.weight.shape
    return ways(Sizes(inputs.x.dtype, inputs.rows, hidden, width, inputs.head_dim), on)


def run(way: Way, inputs: Inputs, out: torch.Tensor | None = None) -> torch.Tensor:
    """Compute it in one way on the device's current stream. Does not wait for it.

    Args:
        way: one of `ways_for(inputs)`.
        inputs: see `Inputs`.
        out: where Triton's projection puts y, [rows, hidden], contiguous, of x's dtype or float32; None for new memory
            of x's dtype.

    Returns:
        y, [rows, hidden].

    Raises:
        UnsupportedError: Triton cannot be imported.
    """
    x, shape = inputs.x, (inputs.rows, inputs.weight.shape[0])
    if 0 in shape:
        return x.new_empty(shape) if out is None else out
    if way == BY_TORCH:
        return by_torch(inputs)
    jit = _jit()
    if way.tile is not None:
        y = x.new_empty(shape) if out is None else out
        jit.gemm(inputs if x.stride(1) == 1 else replace(inputs, x=x.contiguous()), way.tile, way.kind, y)
        return y
    if way.kind == "add":
        y = functional.linear(x, inputs.weight, inputs.bias)
        jit.add(inputs, y)
        return y
    return _around(inputs, jit)


def _around(inputs: Inputs, jit: Any) -> torch.Tensor:
    """torch's projection of x while d is in its locked columns; afterwards they hold what they held, bit for bit.

    They are a small part of x, while the fold is added to all of y. Nothing else may read x on another stream
    meanwhile.
    """
    x = inputs.x
    own = x.stride(1) != 1 or x.stride(0) < x.shape[1]  # rows that overlap, as after expand, cannot be written to
    if own:
        inputs = replace(inputs, x=x.contiguous())
    held = x.new_empty(inputs.rows, inputs.slots.shape[1], inputs.head_dim)
    jit.shift(inputs, held)
    try:
        return functional.linear(inputs.x, inputs.weight, inputs.bias)
    finally:  # where memory ran out, the caller may still use x
        if not own:
            jit.put_back(inputs, held)


def cold(inputs: Inputs, runs: int = 10) -> list[Inputs]:
    """The inputs `runs` times, with an x of their own and several copies of W, together twice as large as the L2 cache.

    A model reads each W once in a forward pass, and by the next pass it has left the cache; and what fails while it is
    timed must not have written to a user's x.
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


def seconds(candidates: Iterable[Way], many: Sequence[Inputs]) -> dict[Way, float]:
    """Seconds that one run of each takes on the device, timed in turn over the inputs; infinite where it does not run.

    A warning says so, unless the device merely has too little shared memory for it.
    """
    taken = dict.fromkeys(candidates, math.inf)
    running = [way for way in taken if _runs(way, many[0])]

    def each(way: Way) -> None:
        for inputs in many:
            run(way, inputs)

    return taken | in_turn(running, lambda way: on_device(lambda: each(way)) / len(many))


def _runs(way: Way, inputs: Inputs) -> bool:
    """Whether a way runs on the inputs' device, and is right there. Its kernels are compiled here."""
    try:
        run(way, inputs)
        return way == BY_TORCH or _is_right(way, inputs)
    except Exception as error:  # no compiler, an assembler that is too old: another way is taken
        if type(error).__name__ != "OutOfResources":
            warnings.warn(f"fastlock goes without {way.name} on this device: {error}", FastlockWarning, stacklevel=2)
        return False


def _is_right(way: Way, inputs: Inputs) -> bool:
    """Whether its first run on the device, for such weights, gave what float64 gives."""
    dtype = str(inputs.x.dtype).removeprefix("torch.")
    kernel = f"locked_linear {dtype}-{layout_of(inputs.weight)}-{inputs.head_dim}"
    index = inputs.x.device.index if inputs.x.device.type == "cuda" else None

    def compute(made_up: Inputs) -> torch.Tensor:
        shape = (inputs.rows, inputs.weight.shape[0])
        return run(way, made_up, None if way.tile is None else inputs.x.new_full(shape, math.nan))

    return WAYS.passes(kernel, index, way.name, partial(check_rows, compute, inputs))


@cache
def _has_triton() -> bool:
    try:
        _jit()
    except UnsupportedError:
        return False
    return True


def _jit() -> Any:
    try:
        from fastlock.kernels.locked_linear import triton_kernels
    except ImportError as error:
        raise UnsupportedError(
            f"Triton, which compiles this kernel, cannot be imported ({error}). Install it."
        ) from None
    return triton_kernels
