"""The step of many tensors as one launch, and the pass over their gradients that clipping takes.

Nothing here imports Triton: a step by a kernel that was compiled ahead of time needs none.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch

from fastlock.errors import FastlockError
from fastlock.kernels.ahead_of_time import cubins
from fastlock.kernels.ahead_of_time.launchers import cuda_index, on_host, ways_of
from fastlock.kernels.ahead_of_time.ways import WAYS, NoWayError
from fastlock.kernels.proximal_step.reference import StepSettings, StepTensors, key_of
from fastlock.kernels.proximal_step.self_check import check_norm, check_step
from fastlock.kernels.proximal_step.variants import (
    CHUNK_FIELDS,
    CONTROL_FIELDS,
    LENGTH_FIELD,
    ROW_FIELD,
    SCALAR_FIELDS,
    STATE_DTYPES,
    TENSOR_FIELDS,
    WEIGHT_DTYPES,
    NormVariant,
    StepVariant,
    anchors_of,
)

Variant: TypeAlias = "StepVariant | NormVariant"
# Given what a kernel reads, the tensors of its SIGNATURE, and the programs: the launch as a function of nothing.
Launcher: TypeAlias = Callable[[Sequence[torch.Tensor], int], Callable[[], None]]


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
    anchor = tensors.anchor if tensors.settings.acts else None
    kept = [tensors.weight, tensors.exp_avg, tensors.exp_avg_sq, tensors.grad, anchor]
    every = [x for x in kept if x is not None]
    weight, state = tensors.weight.dtype, tensors.exp_avg.dtype
    if weight not in WEIGHT_DTYPES or state not in STATE_DTYPES or tensors.exp_avg_sq.dtype != state:
        return None
    if tensors.grad is not None and tensors.grad.dtype != weight:
        return None
    if anchor is not None and anchor.dtype not in anchors_of(weight):
        return None
    if any(x.shape != every[0].shape or x.device != every[0].device for x in every):
        return None  # torch's own words for it are clear
    if not all(x.is_contiguous() for x in every) and not _alike(every):
        return None
    stochastic = tensors.settings.seed is not None and weight == torch.bfloat16
    return StepVariant(weight, state, None if anchor is None else anchor.dtype, stochastic)


def has_kernels(device: torch.device) -> bool:
    """Whether the step has kernels for a kind of device."""
    return device.type == "cuda"


def why_not(variant: Variant, device: torch.device) -> str | None:
    """What keeps a kernel from running on a device, as a clause; None if it can run, for which it is tried out once."""
    if cuda_index(device) is not None and cubins.interpreting():
        return "TRITON_INTERPRET is set"
    try:
        launcher_of(variant, device)
    except NoWayError as error:
        return str(error).rstrip(".")
    return None


def launcher_of(variant: Variant, device: torch.device) -> Launcher:
    """What launches a variant on a device: the first way that is right there (see `ahead_of_time.ways`).

    Raises:
        NoWayError: none is.
    """
    return WAYS.first(variant.name, cuda_index(device), _ways(variant, device), partial(_check, variant, device))


class StepTable:
    """All that the launches for some tensors read besides them, on their device, and the launches, ready to run.

    It holds addresses. What has moved since the last launch is sent again, in one copy: the scalars each time, the
    gradients' addresses with them if one of them moved, the rest if a weight, moment or anchor did.

    Attributes:
        variant: the kernel, for all of the tensors.
        device: where they are.
        programs: of one launch.
        sent: bytes copied to the device by the last `update` or `advance`.
    """

    def __init__(self, variant: StepVariant, device: torch.device, launcher: Launcher | None = None) -> None:
        """`launcher` launches whatever is to be launched; None: the first way that is right."""
        self.variant, self.device = variant, device
        self.programs, self.sent = 0, 0
        self._launcher = launcher
        self._lengths: list[int] = []
        self._described: list[int] = []  # of the tensors
        self._on_device: list[int] = []  # of that, what was sent
        self._grads: list[int] = []
        self._rows = 0
        self._launches: dict[str, Callable[[], None]] = {}

    def update(self, tensors: Sequence[StepTensors], scalars: StepScalars) -> None:
        """Bring the table up to date, for the launches that follow.

        Args:
            tensors: all that fit the variant, at least one. Of one without a gradient nothing is touched. Their memory
                must not be freed before the launches are queued.
            scalars: on the device.
        """
        rows: dict[tuple[StepSettings, float], int] = {}
        row_of = [rows.setdefault((one.settings, one.step), len(rows)) for one in tensors]
        self._described = [number for one in tensors for number in self._describe(one)]
        lengths = self._described[LENGTH_FIELD::TENSOR_FIELDS]
        if lengths != self._lengths:
            self._make_room(lengths, len(rows))
        self.advance(row_of, list(rows), [one.grad for one in tensors], scalars)

    def advance(
        self,
        row_of: list[int],
        rows: Sequence[tuple[StepSettings, float]],
        grads: Sequence[torch.Tensor | None],
        scalars: StepScalars,
    ) -> None:
        """As `update`, where the same tensors are at the same places.

        Args:
            row_of: which of the rows each tensor has.
            rows: by what settings, and at which step.
            grads: of each tensor; they may be others.
            scalars: as in `update`.
        """
        if len(rows) > self._rows:
            self._make_room(self._lengths, len(rows))
        if row_of != self._described[ROW_FIELD::TENSOR_FIELDS]:
            self._described = list(self._described)
            self._described[ROW_FIELD::TENSOR_FIELDS] = row_of
        self._scalars = scalars  # whose memory is not given to others before the launches are queued
        addresses = [0 if grad is None else grad.data_ptr() for grad in grads]
        self._send(rows, addresses, self._control(scalars))

    def step(self) -> None:
        """Queue the step of all tensors on the device's current stream. Does not wait for it.

        Raises:
            NoWayError: no way of launching the kernel is right here.
            FastlockError: the driver refused the launch, or this process was forked from the one that made the table.
        """
        self._launch(self.variant)

    def sum_of_squares(self) -> torch.Tensor:
        """That of all gradients, the term included: one float64 on the device. Raises as `step` does."""
        self._launch(self.variant.of_norm)
        return self._sums.sum(dtype=torch.float64)

    def _describe(self, one: StepTensors) -> list[int]:
        """One tensor, in the order of WEIGHT to ORDINAL."""
        anchor = 0 if self.variant.anchor is None or one.anchor is None else one.anchor.data_ptr()
        addresses = [one.weight.data_ptr(), one.exp_avg.data_ptr(), one.exp_avg_sq.data_ptr(), anchor]
        return [*addresses, one.weight.numel(), 0, one.ordinal, 0]

    def _control(self, scalars: StepScalars) -> list[int]:
        """In the order of FOUND_INF to SUMS."""
        given = (scalars.found_inf, scalars.inverse_scale, scalars.clip)
        if any(x is not None and (x.dtype, x.numel(), x.device) != (torch.float32, 1, self.device) for x in given):
            raise FastlockError(f"found_inf, inverse_scale and clip must be one float32 each, on {self.device}.")
        return [*(0 if x is None else x.data_ptr() for x in given), self._sums.data_ptr()]

    def _make_room(self, lengths: list[int], rows: int) -> None:
        """New memory on the device for so many tensors and rows; the chunks, which depend on the lengths alone."""
        if lengths != self._lengths:
            chunks = _chunks(lengths, self.variant.block)
            self._chunks = chunks.to(self.device, non_blocking=True)
            self._lengths, self.programs = lengths, len(chunks)
            self._sums = torch.empty(self.programs, dtype=torch.float32, device=self.device)
        self._rows = _round_up(rows, 4)
        self._of_scalars = self._rows * SCALAR_FIELDS // 2
        self._of_moving = _round_up(CONTROL_FIELDS + len(lengths), 2)
        size = self._of_scalars + self._of_moving + TENSOR_FIELDS * len(lengths)
        self._table = torch.empty(size, dtype=torch.int64, device=self.device)
        self._grads, self._on_device, self._launches = [], [], {}

    def _send(self, rows: Sequence[tuple[StepSettings, float]], grads: list[int], numbers: list[int]) -> None:
        moved = self._described is not self._on_device and self._described != self._on_device
        if moved or grads != self._grads:
            numbers = numbers + grads
        if moved:
            numbers = numbers + [0] * (self._of_moving - len(numbers)) + self._described
        first = self._of_scalars
        host = on_host(first + len(numbers), torch.int64, self.device)
        scalars = torch.tensor([scalars_of(*row) for row in rows], dtype=torch.float64).float()
        host[:first].view(torch.float32)[: scalars.numel()] = scalars.flatten()
        host[first:] = torch.tensor(numbers, dtype=torch.int64)
        self._table[: len(host)].copy_(host, non_blocking=True)
        self._grads, self._on_device, self.sent = grads, self._described, len(host) * host.itemsize

    def _launch(self, variant: Variant) -> None:
        if self.programs:
            if variant.name not in self._launches:
                launcher = self._launcher or launcher_of(variant, self.device)
                self._launches[variant.name] = launcher(self._arguments(), self.programs)
            self._launches[variant.name]()

    def _arguments(self) -> tuple[torch.Tensor, ...]:
        """The tensors of the kernels' SIGNATURE, each at a multiple of 16 bytes."""
        first, rest = self._of_scalars, self._of_scalars + self._of_moving
        scalars, moving, tensors = self._table[:first], self._table[first:rest], self._table[rest:]
        return scalars.view(torch.float32), moving, tensors, self._chunks


def scalars_of(settings: StepSettings, step: float) -> list[float]:
    """One row of scalars, worked out in float64, in the order of ONE_MINUS_BETA1 to KEY_HIGH."""
    bias_correction1, bias_correction2 = 1 - settings.beta1**step, 1 - settings.beta2**step
    row = [1 - settings.beta1, settings.beta2, 1 - settings.beta2, settings.eps]
    row += [settings.lr * settings.weight_decay, settings.lr / bias_correction1, bias_correction2**-0.5]
    row += [settings.pull, settings.lr * settings.anchor_decay]
    key = 0 if settings.seed is None else key_of(settings.seed, step)
    row += [float(key & 0xFFFF), float(key >> 16)]
    return row + [0.0] * (SCALAR_FIELDS - len(row))


def _ways(variant: Variant, device: torch.device) -> dict[str, Launcher]:
    """How a variant may be launched, best first: by its cubin with arguments packed, or by Triton's JIT."""
    has_triton = importlib.util.find_spec("triton") is not None
    by_jit = partial(_by_jit, variant) if has_triton else None
    return ways_of(variant.name, cuda_index(device), _by_cubin, by_jit)


def _by_cubin(kernel: cubins.Kernel, arguments: Sequence[torch.Tensor], programs: int) -> Callable[[], None]:
    return kernel.launcher((programs, 1, 1), [argument.data_ptr() for argument in arguments])


def _by_jit(variant: Variant, arguments: Sequence[torch.Tensor], programs: int) -> Callable[[], None]:
    return partial(_launch_jit, arguments, variant, programs, os.getpid())


def _launch_jit(arguments: Sequence[torch.Tensor], variant: Variant, programs: int, process: int) -> None:
    if os.getpid() != process and cuda_index(arguments[0].device) is not None:
        raise cubins.forked()
    from fastlock.kernels.proximal_step import triton_kernel as jit

    jit.launch(arguments, variant, programs)


def _check(variant: Variant, device: torch.device, launcher: Launcher) -> bool:
    """Whether one way of launching a variant is right: see `self_check`."""
    of_norm = isinstance(variant, NormVariant)
    step = StepVariant(variant.weight, torch.float32, variant.anchor) if isinstance(variant, NormVariant) else variant
    table = StepTable(step, device, launcher)

    def run(tensors: Sequence[StepTensors]) -> torch.Tensor:
        table.update(tensors, StepScalars())
        if of_norm:
            return table.sum_of_squares()
        table.step()
        return tensors[0].weight

    return check_norm(run, step, device) if of_norm else check_step(run, step, device)


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
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(first.stride(), first.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
