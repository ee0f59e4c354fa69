"""The optimizer's step with a pull, against torch's fused AdamW without one and with it by foreach, of the same run.

The tensors are those of adapters and of layers of the shape of Llama-3 8B, with random numbers; together they are many
times the cache. Between two steps the gradients are at other addresses, as they are in training. The ways take turns.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import fastlock
from bench.lib import machine
from bench.lib.figures import interval_of_median
from bench.lib.tiny import sized
from fastlock.kernels.proximal_step.reference import StepSettings, StepTensors, proximal_step

ON_GPU = machine.device().type == "cuda"
FP32, BF16 = torch.float32, torch.bfloat16
LR, WEIGHT_DECAY, PULL, EPS = 1e-3, 0.01, 0.5, 1e-8
BETAS = (0.9, 0.999)
ROUNDS = sized(20 if ON_GPU else 5, tiny=1)
# Of the tensors, which are held against float64 after the timed rounds.
CHECKED = 4
# The GPU waits this many cycles, some 5 ms, while the host queues.
WAIT = sized(10**7, tiny=1000)

# Rows and columns of the linear layers of Llama-3 8B.
LINEARS = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336))
LAYERS = sized(32 if ON_GPU else 2, tiny=1)
# A CPU gets narrower layers.
SHRINK = sized(1 if ON_GPU else 8, tiny=256)


def adapters(rank: int) -> list[tuple[int, int]]:
    """All-linear LoRA: two tensors a linear layer."""
    linears = [(rows // SHRINK, columns // SHRINK) for rows, columns in LINEARS * LAYERS]
    return [shape for rows, columns in linears for shape in ((rank, columns), (rows, rank))]


def layers() -> list[tuple[int, int]]:
    """Whole layers, 218 million parameters each. Each of five ways holds 24 bytes a parameter in float32."""
    return [(rows // SHRINK, columns // SHRINK) for rows, columns in LINEARS * sized(2 if ON_GPU else 1, tiny=1)]


SHAPES: dict[str, Callable[[], list[tuple[int, int]]]] = {
    "LoRA r 16": partial(adapters, 16),
    "LoRA r 64": partial(adapters, 64),
    "layers": layers,
}
CASES = [
    ("LoRA r 16", FP32, FP32),
    ("LoRA r 64", FP32, FP32),
    ("layers", FP32, FP32),
    ("layers", BF16, FP32),
    ("layers", BF16, BF16),
]


@dataclass(frozen=True)
class Stepping:
    """One way of stepping.

    Attributes:
        optimizer: steps the parameters.
        step: one step of it, with whatever belongs to it.
        params: its parameters.
        grads: two sets of gradients, which take turns.
        anchors: where to; None: nowhere.
        passes: bytes that a step must move, for each parameter.
    """

    optimizer: torch.optim.Optimizer
    step: Callable[[], object]
    params: list[nn.Parameter]
    grads: tuple[list[torch.Tensor], list[torch.Tensor]]
    anchors: list[torch.Tensor] | None
    passes: int

    @property
    def bytes(self) -> int:
        """Bytes that a step must move."""
        return self.passes * sum(p.numel() for p in self.params)


@pytest.fixture(scope="module")
def copy() -> float:
    """Bytes a second of a large copy, measured before all else."""
    return machine.copy_bandwidth(machine.device())


@pytest.mark.parametrize(("shape", "weight", "state"), CASES)
def test_step(
    shape: str, weight: torch.dtype, state: torch.dtype, copy: float, record_property: Callable[..., None]
) -> None:
    device = machine.device()
    sizes = SHAPES[shape]()
    measured: dict[str, dict[str, Any]] = {}
    stepping = {
        name: make(sizes, device, weight, state) for name, make in WAYS.items() if weight == state or name in OWN
    }
    times, host_times, errors = take_turns(stepping)
    for name, one in stepping.items():
        ratios = [mine / theirs for mine, theirs in zip(times[name], times[BASE], strict=True)]
        measured[name] = {"bytes": one.bytes, "error": errors[name], "seconds": interval_of_median(times[name])}
        measured[name] |= {"host_seconds": interval_of_median(host_times[name]), "ratio": interval_of_median(ratios)}
    row: dict[str, Any] = {
        "shape": shape,
        "weight": _word(weight),
        "state": _word(state),
        "device": str(device),
        "ways": measured,
    }
    row |= {"tensors": len(sizes), "parameters": sum(map(math.prod, sizes)), "rounds": ROUNDS}
    record_property("row", row | {"copy_bytes_per_second": copy})
    # All in bfloat16, the plain step rounds each operation, as torch does.
    held = [name for name in errors if weight == FP32 or (name in OWN and (ON_GPU or state == FP32))]
    assert all(errors[name] <= 1 for name in held)


def with_pull(clip: float | None, sizes: list[tuple[int, int]], *dtypes: Any) -> Stepping:
    """ProximalAdamW with an anchor: everything is read once and written once."""
    params, grads = made(sizes, *dtypes)
    weight, state = dtypes[1:]
    optimizer = proximal(params, state, clip)
    optimizer.anchor()
    _moved(params)
    anchors = [optimizer.state[p]["anchor"] for p in params]
    # g, w and m, v read, w and m, v written, the anchor read; clipping reads g, w and the anchor before.
    passes = 4 * weight.itemsize + 4 * state.itemsize + (3 * weight.itemsize if clip else 0)
    return Stepping(optimizer, optimizer.step, params, grads, anchors, passes)


def without_pull(sizes: list[tuple[int, int]], *dtypes: Any) -> Stepping:
    """ProximalAdamW without an anchor."""
    params, grads = made(sizes, *dtypes)
    optimizer = proximal(params, dtypes[2], None)
    return Stepping(optimizer, optimizer.step, params, grads, None, 3 * dtypes[1].itemsize + 4 * dtypes[2].itemsize)


def fused(sizes: list[tuple[int, int]], *dtypes: Any) -> Stepping:
    """torch's fused AdamW, without a term."""
    params, grads = made(sizes, *dtypes)
    optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    return Stepping(optimizer, optimizer.step, params, grads, None, 7 * dtypes[1].itemsize)


def fused_with_foreach(sizes: list[tuple[int, int]], *dtypes: Any) -> Stepping:
    """torch's fused AdamW, after two foreach operations that add the term to the gradients."""
    params, grads = made(sizes, *dtypes)
    anchors = [p.detach().clone() for p in params]
    _moved(params)
    optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)

    def step() -> None:
        with torch.no_grad():
            away = torch._foreach_sub([p.detach() for p in params], anchors)
            torch._foreach_add_([p.grad for p in params if p.grad is not None], away, alpha=PULL)
        optimizer.step()

    # The step's seven; w and the anchor read, the difference written; g and the difference read, g written.
    return Stepping(optimizer, step, params, grads, anchors, 13 * dtypes[1].itemsize)


def proximal(params: list[nn.Parameter], state: torch.dtype, clip: float | None) -> fastlock.ProximalAdamW:
    return fastlock.ProximalAdamW(
        params, lr=LR, weight_decay=WEIGHT_DECAY, pull=PULL, max_grad_norm=clip, state_dtype=state
    )


Maker = Callable[..., Stepping]
# All gradients together have a norm of thousands.
WAYS: dict[str, Maker] = {
    "pull": partial(with_pull, None),
    "no pull": without_pull,
    "fused": fused,
    "fused + foreach": fused_with_foreach,
    "pull, clipped": partial(with_pull, 1.0),
}
OWN = ("pull", "no pull", "pull, clipped")
BASE = "pull"


def made(
    sizes: list[tuple[int, int]], device: torch.device, weight: torch.dtype, state: torch.dtype
) -> tuple[list[nn.Parameter], tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Random parameters, and two sets of gradients."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(size, device=device).mul_(0.02).to(weight)) for size in sizes]
    grads = ([torch.randn_like(p) for p in params], [torch.randn_like(p) for p in params])
    return params, grads


def _moved(params: list[nn.Parameter]) -> None:
    """Away from the anchor."""
    with torch.no_grad():
        for p in params:
            p.add_(torch.randn_like(p), alpha=0.01)


def take_turns(
    stepping: dict[str, Stepping],
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, float]]:
    """Seconds of each way on the device and of the host, round by round; and how wrong the step after them was."""
    times: dict[str, list[float]] = {name: [] for name in stepping}
    host_times: dict[str, list[float]] = {name: [] for name in stepping}
    errors = {}
    # Before, whatever is compiled or tried out once; after, the step that is held against float64.
    for i in range(-2, ROUNDS + 1):
        for name, one in stepping.items():
            for p, grad in zip(one.params, one.grads[i % 2], strict=True):
                p.grad = grad
            if 0 <= i < ROUNDS:
                host, on_device = timed(one.step)
                times[name].append(on_device)
                host_times[name].append(host)
                continue
            before = exact_of(name, one) if i == ROUNDS else []
            one.step()
            machine.synchronize(machine.device())
            errors[name] = error_in_bounds(one, before)
    kept = {name: [seconds for seconds in of_way if not math.isnan(seconds)] for name, of_way in times.items()}
    complete = all(len(of_way) == ROUNDS for of_way in kept.values())
    return (kept if complete else host_times), host_times, errors


def timed(step: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the host's call, and on the device, where everything is queued before it starts."""
    if not ON_GPU:
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        return seconds, seconds
    torch.cuda.synchronize()
    host = 0.0

    def run() -> None:
        nonlocal host
        start = time.perf_counter()
        step()
        host = time.perf_counter() - start

    on_device = machine.between_events(run, lambda: torch.cuda._sleep(WAIT))
    return host, on_device


def exact_of(name: str, one: Stepping) -> list[StepTensors]:
    """The step to come in float64, of some tensors, taken on copies of them."""
    clip = None
    if "clipped" in name:
        terms = [
            p.grad + PULL * (p.detach() - a)
            for p, a in zip(one.params, one.anchors or [], strict=True)
            if p.grad is not None
        ]
        norm = torch.stack([term.double().square().sum() for term in terms]).sum().sqrt()
        clip = torch.clamp(1.0 / (norm + 1e-6), max=1.0)
    settings = StepSettings(LR, *BETAS, EPS, WEIGHT_DECAY, pull=PULL)
    exact = []
    for place in places(one):
        p = one.params[place]
        state = one.optimizer.state[p]
        tensors = StepTensors(
            weight=p.detach().double(),
            grad=None if p.grad is None else p.grad.double(),
            exp_avg=state["exp_avg"].double(),
            exp_avg_sq=state["exp_avg_sq"].double(),
            anchor=None if one.anchors is None else one.anchors[place].double(),
            settings=settings,
            step=float(state["step"]) + 1,
        )
        proximal_step(tensors, None, clip)
        exact.append(tensors)
    return exact


def error_in_bounds(one: Stepping, exact: list[StepTensors]) -> float:
    """The largest error against float64, in units of a bound: right if at most 1.

    That is of each number one unit in the last place of what it is kept in, and of what float32 makes of the terms.
    """
    worst = 0.0
    for place, truth in zip(places(one), exact, strict=False):
        p = one.params[place]
        state = one.optimizer.state[p]
        sizes = {"exp_avg": 4.0, "exp_avg_sq": 16.0, "weight": 0.1}  # of the terms that are added up, at most
        for name, got in (("weight", p.detach()), ("exp_avg", state["exp_avg"]), ("exp_avg_sq", state["exp_avg_sq"])):
            exactly = getattr(truth, name)
            bound = torch.finfo(got.dtype).eps * exactly.abs() + 8 * 2.0**-24 * sizes[name]
            worst = max(worst, float(((got.double() - exactly).abs() / bound).nan_to_num(nan=math.inf).max()))
    return worst


def places(one: Stepping) -> list[int]:
    """Which of the tensors are looked at: some of the smallest."""
    order = sorted(range(len(one.params)), key=lambda place: one.params[place].numel())
    return list(itertools.islice(order, CHECKED))


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
