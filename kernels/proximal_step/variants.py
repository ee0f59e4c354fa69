"""What the step's kernels are compiled for, and what lies where in their table: plain data for launch and build."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

WEIGHT_DTYPES = (torch.float32, torch.bfloat16)
STATE_DTYPES = (torch.float32, torch.bfloat16)

VECTOR_BYTES = 16
# 256 threads with four or eight elements each have three to eight 16-byte loads in flight. Two programs on an SM, which
# the registers allow in any case, are then at least 40 KB in flight, where latency times bandwidth asks for some 18 KB
# of an H100's SM (3.35 TB/s over 132, 0.7 us). Reasoned from the compiled code, not measured.
NUM_WARPS = 8
THREADS = 32 * NUM_WARPS
MOST_REGISTERS = 96
# Elements that a program takes at a time of the end of a tensor, or at addresses that allow no wide loads.
PIECE = 2 * THREADS

# float32 numbers of one row of scalars: what the host works out, in float64, for the tensors of one group that are
# at one step.
SCALAR_FIELDS = 12
# int64 numbers before the gradients' addresses: what may be another with every launch.
CONTROL_FIELDS = 4
# int64 numbers of one tensor: what stays while the tensors stay where they are.
TENSOR_FIELDS, LENGTH_FIELD, ROW_FIELD = 8, 4, 5
# int32 numbers of one program: which tensor, and which of its blocks.
CHUNK_FIELDS = 2


@dataclass(frozen=True)
class StepVariant:
    """What one compiled step is made for.

    Attributes:
        weight: dtype of the weights and gradients.
        state: dtype of both moments.
        anchor: dtype of the anchors; None: without a term.
        stochastic: what is kept in bfloat16 is rounded stochastically, not to the nearest.
    """

    weight: torch.dtype
    state: torch.dtype
    anchor: torch.dtype | None
    stochastic: bool = False

    @property
    def name(self) -> str:
        """Such as step-bfloat16-float32-no_anchor, or step-bfloat16-bfloat16-float32-stochastic."""
        parts = ["step", _word(self.weight), _word(self.state), _word(self.anchor)]
        return "-".join([*parts, "stochastic"] if self.stochastic else parts)

    @property
    def of_norm(self) -> NormVariant:
        """The pass over the gradients of the same tensors."""
        return NormVariant(self.weight, self.anchor, self.block)

    @property
    def precise(self) -> bool:
        """Whether quotients and square roots are rounded correctly; bfloat16 weights do not show the difference."""
        return self.weight == torch.float32

    @property
    def block(self) -> int:
        """Elements of one program: a 16-byte load of the narrowest dtype for each thread."""
        return THREADS * VECTOR_BYTES // min(self.weight.itemsize, self.state.itemsize)

    @property
    def bytes_read(self) -> int:
        """Bytes that one parameter's step must read: weight, gradient, moments, anchor."""
        return 2 * self.weight.itemsize + 2 * self.state.itemsize + (self.anchor.itemsize if self.anchor else 0)

    @property
    def bytes_written(self) -> int:
        """Bytes that one parameter's step must write: weight and moments."""
        return self.weight.itemsize + 2 * self.state.itemsize

    def options(self) -> dict[str, Any]:
        """Triton's compile options."""
        return _options()


@dataclass(frozen=True)
class NormVariant:
    """What one compiled pass over the gradients is made for: the sum of their squares, the term included.

    Attributes:
        weight: dtype of the weights and gradients.
        anchor: dtype of the anchors; None: without a term, and no weight is read.
        block: elements of one program, those of the step: both go by the same chunks.
    """

    weight: torch.dtype
    anchor: torch.dtype | None
    block: int

    @property
    def name(self) -> str:
        """Such as norm-bfloat16-float32-2048."""
        return "-".join(["norm", _word(self.weight), _word(self.anchor), str(self.block)])

    @property
    def bytes_read(self) -> int:
        """Bytes that one parameter's pass must read."""
        return self.weight.itemsize + (self.weight.itemsize + self.anchor.itemsize if self.anchor else 0)

    def options(self) -> dict[str, Any]:
        """Triton's compile options."""
        return _options()


def step_variants() -> Iterator[StepVariant]:
    """Every step that production launches."""
    for weight, state in itertools.product(WEIGHT_DTYPES, STATE_DTYPES):
        for anchor, stochastic in itertools.product(anchors_of(weight), (False, True)):
            if not stochastic or weight == torch.bfloat16:
                yield StepVariant(weight, state, anchor, stochastic)


def norm_variants() -> Iterator[NormVariant]:
    """Every pass over the gradients that production launches."""
    yield from dict.fromkeys(variant.of_norm for variant in step_variants())


def anchors_of(weight: torch.dtype) -> tuple[torch.dtype | None, ...]:
    """The dtypes that an anchor may have: none, the weight's, or float32."""
    return tuple(dict.fromkeys((None, weight, torch.float32)))


def _options() -> dict[str, Any]:
    """Fusion is set because its default is not the same in every Triton."""
    return {"num_warps": NUM_WARPS, "maxnreg": MOST_REGISTERS, "enable_fp_fusion": True}


def _word(dtype: torch.dtype | None) -> str:
    return "no_anchor" if dtype is None else str(dtype).removeprefix("torch.")
