"""The step of many tensors as one launch, and the pass over their gradients that clipping takes.

Nothing here imports Triton: a step by a kernel that was compiled ahead of time needs none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from fastlock.errors import FastlockError, UnsupportedError
from fastlock.kernels.ahead_of_time import cubins
from fastlock.kernels.proximal_step.reference import StepSettings, StepTensors
from fastlock.kernels.proximal_step.variants import (
    CHUNK_FIELDS,
    CONTROL_FIELDS,
    SCALAR_FIELDS,
    STATE_DTYPES,
    TENSOR_FIELDS,
    WEIGHT_DTYPES,
    NormVariant,
    StepVariant,
    anchors_of,
)

Variant = StepVariant | NormVariant


@dataclass(frozen=True, eq=False)
class StepScalars:
    """What is on the device, and decides over a whole launch: tensors of one float32 each, or None.

    Attributes:
        found_inf: not 0: nothing is touched.
        inverse_scale: gradients are multiplied by it first.
        clip: gradients with the term are multiplied by it.
    """

    found_inf: torch.Tensor | None = None
    inverse_scale: torch.Tensor | None = None
    clip: torch.Tensor | None = None


def variant_of(tensors: StepTensors) -> StepVariant | None:
    """The kernel for one parameter; None where there is none for its dtypes or its layout in memory.

    The kernel walks over memory, so all that belongs to one parameter must be dense and laid out alike.
    """
    kept = [tensors.weight, tensors.exp_avg, tensors.exp_avg_sq]
    anchor = tensors.anchor if tensors.settings.acts else None
    every = [x for x in (*kept, tensors.grad, anchor) if x is not None]
    weight, state = tensors.weight.dtype, tensors.exp_avg.dtype
    if weight not in WEIGHT_DTYPES or state not in STATE_DTYPES or tensors.exp_avg_sq.dtype != state:
        return None
    if tensors.grad is not None and tensors.grad.dtype != weight:
        return None
    if anchor is not None and anchor.dtype not in anchors_of(weight):
        return None
    if not all(x.is_contiguous() for x in every) and not _alike(every):
        return None
    stochastic = tensors.settings.seed is not None and weight == torch.bfloat16
    return StepVariant(weight, state, None if anchor is None else anchor.dtype, stochastic)


def why_not(variant: Variant, device: torch.device) -> str | None:
    """What keeps a kernel from running on a device, in words that can follow "because"; None if it can run."""
    if device.type != "cuda":
        return f"the kernel runs on CUDA devices, not on {device.type}"
    if cubins.interpreting():
        return "TRITON_INTERPRET is set"
    if cubins.LOADER.choose(variant.name, device.index or 0).kernel is not None:
        return None
    try:
        import triton  # noqa: F401
    except ImportError as error:
        reason = cubins.LOADER.choose(variant.name, device.index or 0).reason
        return f"no kernel compiled ahead of time fits ({reason}), and Triton cannot be imported ({error})"
    return None


class StepTable:
    """All that the launches for some tensors read besides them, on their device, and the launches, ready to run.

    It holds addresses. What has moved since the last launch is sent again, in one copy: the scalars each time, the
    gradients' addresses with them if one of them moved, the rest if a weight, moment or anchor did.

    Attributes:
        variant: the kernel, for all of the tensors.
        device: where they are.
        programs: of one launch.
        sent: bytes copied to the device by the last `update`.
    """

    def __init__(self, variant: StepVariant, device: torch.device) -> None:
        self.variant, self.device = variant, device
        self.programs, self.sent = 0, 0
        self._lengths: list[int] = []
        self._tensors: list[int] = []
        self._grads: list[int] = []
        self._rows = 0
        self._launches: dict[str, Callable[[], None]] = {}

    def update(self, tensors: Sequence[StepTensors], scalars: StepScalars) -> None:
        """Bring the table up to date, for the launches that follow.

        Args:
            tensors: all that fit the variant, at least one. Of one without a gradient nothing is touched.
            scalars: must stay alive until the launches are queued.
        """
        rows: dict[tuple[StepSettings, float], int] = {}
        described: list[int] = []
        for one in tensors:
            row = rows.setdefault((one.settings, one.step), len(rows))
            described += self._describe(one, row)
        lengths = described[4::TENSOR_FIELDS]
        if lengths != self._lengths or len(rows) > self._rows:
            self._make_room(lengths, len(rows))
        self._control = _control(scalars, tensors[0].settings.seed or 0, self._sums)
        grads = [0 if one.grad is None else one.grad.data_ptr() for one in tensors]
        self._send(list(rows), grads, described)

    def step(self) -> None:
        """Queue the step of all tensors on the device's current stream. Does not wait for it.

        Raises:
            UnsupportedError: no cubin fits, and Triton cannot be imported.
            FastlockError: the driver refused the launch, or this process was forked from the one that made the table.
        """
        self._launch(self.variant)

    def sum_of_squares(self) -> torch.Tensor:
        """That of all gradients, the term included: one float64 on the device. Raises as `step` does."""
        self._launch(NormVariant(self.variant.weight, self.variant.anchor))
        return self._sums.sum(dtype=torch.float64)

    def _describe(self, one: StepTensors, row: int) -> list[int]:
        """One tensor, in the order of WEIGHT to ORDINAL."""
        anchor = 0 if self.variant.anchor is None or one.anchor is None else one.anchor.data_ptr()
        addresses = [one.weight.data_ptr(), one.exp_avg.data_ptr(), one.exp_avg_sq.data_ptr(), anchor]
        return [*addresses, one.weight.numel(), row, one.ordinal, 0]

    def _make_room(self, lengths: list[int], rows: int) -> None:
        """New memory on the device for so many tensors and rows; the chunks, which depend on the lengths alone."""
        chunks = _chunks(lengths, self.variant.block)
        self._lengths, self._rows, self.programs = lengths, _round_up(rows, 4), len(chunks)
        self._chunks = chunks.to(self.device, non_blocking=True)
        self._numbers_of_scalars = self._rows * SCALAR_FIELDS // 2
        self._moving = _round_up(CONTROL_FIELDS + len(lengths), 2)
        size = self._numbers_of_scalars + self._moving + TENSOR_FIELDS * len(lengths)
        self._table = torch.empty(size, dtype=torch.int64, device=self.device)
        self._sums = torch.empty(self.programs, dtype=torch.float32, device=self.device)
        self._grads, self._tensors, self._launches = [], [], {}

    def _send(self, rows: list[tuple[StepSettings, float]], grads: list[int], described: list[int]) -> None:
        first = self._numbers_of_scalars
        numbers = list(self._control)
        if described != self._tensors or grads != self._grads:
            numbers += grads
        if described != self._tensors:
            numbers += [0] * (self._moving - len(numbers)) + described
        host = on_host(first + len(numbers), torch.int64, self.device)
        scalars = torch.tensor([scalars_of(*row) for row in rows], dtype=torch.float64).float()
        host[:first].view(torch.float32)[: scalars.numel()] = scalars.flatten()
        host[first:] = torch.tensor(numbers, dtype=torch.int64)
        self._table[: len(host)].copy_(host, non_blocking=True)
        self._grads, self._tensors, self.sent = grads, described, len(host) * host.itemsize

    def _launch(self, variant: Variant) -> None:
        if self.programs:
            if variant.name not in self._launches:
                self._launches[variant.name] = self._launcher(variant)
            self._launches[variant.name]()

    def _launcher(self, variant: Variant) -> Callable[[], None]:
        """What launches it: the cubin of the variant with its arguments packed, or Triton's JIT."""
        first, rest = self._numbers_of_scalars, self._numbers_of_scalars + self._moving
        scalars, moving, tensors = self._table[:first], self._table[first:rest], self._table[rest:]
        arguments = (scalars.view(torch.float32), moving, tensors, self._chunks)
        if self.device.type == "cuda":
            kernel = cubins.LOADER.choose(variant.name, self.device.index or 0).kernel
            if kernel is not None:
                return kernel.launcher((self.programs, 1, 1), [argument.data_ptr() for argument in arguments])
        return partial(_launch_jit, arguments, variant, self.programs, os.getpid())


def scalars_of(settings: StepSettings, step: float) -> list[float]:
    """One row of scalars, worked out in float64, in the order of ONE_MINUS_BETA1 to STEP."""
    bias_correction1, bias_correction2 = 1 - settings.beta1**step, 1 - settings.beta2**step
    row = [1 - settings.beta1, settings.beta2, 1 - settings.beta2, settings.eps]
    row += [settings.lr * settings.weight_decay, settings.lr / bias_correction1, bias_correction2**-0.5]
    row += [settings.pull, settings.lr * settings.anchor_decay, step]
    return row + [0.0] * (SCALAR_FIELDS - len(row))


def on_host(length: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers in the host's memory, [length], to be copied to a device: pinned for CUDA.

    torch does not hand pinned memory out again before the copies from it have run, even if the tensor is gone by then.
    """
    return torch.empty(length, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")


def _control(scalars: StepScalars, seed: int, sums: torch.Tensor) -> list[int]:
    """In the order of FOUND_INF to SUMS."""
    given = (scalars.found_inf, scalars.inverse_scale, scalars.clip)
    if any(x is not None and (x.dtype, x.numel(), x.device) != (torch.float32, 1, sums.device) for x in given):
        raise FastlockError(f"found_inf, inverse_scale and clip must be one float32 each, on {sums.device}.")
    return [*(0 if x is None else x.data_ptr() for x in given), seed & 0xFFFFFFFF, sums.data_ptr(), 0]


def _chunks(lengths: list[int], block: int) -> torch.Tensor:
    """Which block of which tensor each program has, [programs, CHUNK_FIELDS] int32 on the host."""
    counts = torch.tensor([-(-length // block) for length in lengths], dtype=torch.int64)
    tensor = torch.repeat_interleave(torch.arange(len(lengths)), counts)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    chunks = torch.empty(len(tensor), CHUNK_FIELDS, dtype=torch.int32)
    chunks[:, 0], chunks[:, 1] = tensor, torch.arange(len(tensor)) - first
    return chunks


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _alike(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether all have the same strides, without gaps and overlaps."""
    first = tensors[0]
    if any(x.stride() != first.stride() for x in tensors):
        return False
    order = sorted((stride, size) for stride, size in zip(first.stride(), first.shape, strict=True) if size != 1)
    expected = 1
    for stride, size in order:
        if stride != expected:
            return False
        expected *= size
    return True


def _launch_jit(arguments: Sequence[torch.Tensor], variant: Variant, programs: int, process: int) -> None:
    if os.getpid() != process and arguments[0].device.type == "cuda":
        raise cubins.forked()
    try:
        from fastlock.kernels.proximal_step import triton_kernel as jit
    except ImportError as error:
        raise UnsupportedError(
            f"no kernel compiled ahead of time fits (`fastlock doctor` says why), and Triton, which would compile one, "
            f"cannot be imported ({error}). Install Triton."
        ) from None
    jit.launch(arguments, variant, programs)
