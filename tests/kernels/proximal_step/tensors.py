"""Random parameters with NaN around them, and their step in float64, which shares no code with the package."""

import dataclasses
import math

import torch

from fastlock.kernels.proximal_step.reference import StepSettings, StepTensors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GUARD = 24
FP32, BF16 = torch.float32, torch.bfloat16
SETTINGS = StepSettings(1e-2, 0.9, 0.999, 1e-8, 0.1, pull=0.5)
KEPT = ("weight", "exp_avg", "exp_avg_sq")
SIZES = (0, 1, 63, 1000, 7186)


@dataclasses.dataclass
class Guarded:
    """Tensors of one parameter, each inside a larger one that is NaN beside it."""

    tensors: StepTensors
    around: dict[str, torch.Tensor]

    def is_untouched_outside(self) -> bool:
        """Whether what lies around is still NaN."""
        return all(
            around[:GUARD].isnan().all() and around[GUARD + self.length :].isnan().all()
            for around in self.around.values()
        )

    @property
    def length(self) -> int:
        return self.tensors.weight.numel()


def make(length, weight=FP32, state=FP32, anchor=FP32, offset=0, seed=0, ordinal=0, step=3.0, settings=SETTINGS):
    """Random numbers; `offset` moves them away from an address that is a multiple of 16 bytes."""
    generator = torch.Generator().manual_seed(1000 * seed + length + 7 * offset)
    around = {}

    def inside(name, values, dtype):
        buffer = torch.full((2 * GUARD + length + offset,), math.nan, dtype=dtype, device=DEVICE)
        around[name] = buffer[offset:]
        place = buffer[offset + GUARD : offset + GUARD + length]
        place.copy_(values.to(dtype))
        return place

    w = torch.randn(length, generator=generator)
    tensors = StepTensors(
        weight=inside("weight", w, weight),
        grad=inside("grad", torch.randn(length, generator=generator), weight),
        exp_avg=inside("exp_avg", torch.randn(length, generator=generator) / 4, state),
        exp_avg_sq=inside("exp_avg_sq", torch.randn(length, generator=generator).square() / 4, state),
        anchor=None if anchor is None else inside("anchor", w + torch.randn(length, generator=generator) / 8, anchor),
        settings=settings,
        step=step,
        ordinal=ordinal,
    )
    return Guarded(tensors, around)


def copied(one: StepTensors) -> StepTensors:
    """The same numbers elsewhere."""
    fields = {name: getattr(one, name).clone() for name in KEPT}
    return dataclasses.replace(one, **fields)


def exact(one: StepTensors, scale: float = 1.0, clip: float = 1.0) -> dict[str, torch.Tensor]:
    """Weight and moments after the step, in float64: Loshchilov and Hutter's algorithm 2, and the two terms."""
    s = one.settings
    w, g, m, v = (x.detach().cpu().double() for x in (one.weight, one.grad, one.exp_avg, one.exp_avg_sq))
    a = w if one.anchor is None else one.anchor.cpu().double()
    g = (g / scale + s.pull * (w - a)) * clip
    m = s.beta1 * m + (1 - s.beta1) * g
    v = s.beta2 * v + (1 - s.beta2) * g**2
    m_hat, v_hat = m / (1 - s.beta1**one.step), v / (1 - s.beta2**one.step)
    new = w - s.lr * s.weight_decay * w - s.lr * s.anchor_decay * (w - a) - s.lr * m_hat / (v_hat.sqrt() + s.eps)
    return {"weight": new, "exp_avg": m, "exp_avg_sq": v}


def unit(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One unit in the last place of numbers of this size."""
    info = torch.finfo(dtype)
    return torch.exp2(torch.floor(torch.log2(x.abs().clamp(min=info.tiny)))) * info.eps


def bounds(one: StepTensors, scale: float = 1.0, clip: float = 1.0) -> dict[str, torch.Tensor]:
    """How far weight and moments may be from `exact`, by the sizes of what is added up.

    Six float32 roundings of each of them, u = 2**-24 each (Higham, Accuracy and Stability of Numerical Algorithms,
    eq. 3.5; there are three to six of them one after the other), and half a unit in the last place of what it is
    kept in; a whole one, rounded stochastically. torch's own AdamW is within this, too.
    """
    s = one.settings
    w, g, m, v = (x.detach().cpu().double().abs() for x in (one.weight, one.grad, one.exp_avg, one.exp_avg_sq))
    away = torch.zeros_like(w) if one.anchor is None else w + one.anchor.cpu().double().abs()
    g = (g / scale + s.pull * away) * clip
    result = exact(one, scale, clip)
    sizes = {"exp_avg": m + (1 - s.beta1) * g, "exp_avg_sq": s.beta2 * v + (1 - s.beta2) * g**2}
    denominator = (result["exp_avg_sq"] / (1 - s.beta2**one.step)).sqrt() + s.eps
    # The step is wrong by what m is, and by half of what v is, relative to itself.
    of_v = 0.5 * sizes["exp_avg_sq"] / result["exp_avg_sq"].clamp(min=1e-30)
    step = s.lr / (1 - s.beta1**one.step) * (sizes["exp_avg"] + result["exp_avg"].abs() * of_v) / denominator
    sizes["weight"] = w + s.lr * s.anchor_decay * away + 2 * step
    kept = 0.5 if s.seed is None else 1.0
    allowed = {}
    for name in KEPT:
        dtype = getattr(one, name).dtype
        rounding = kept * unit(result[name], dtype) if dtype == BF16 else 0.0
        allowed[name] = 6 * 2.0**-24 * sizes[name] + rounding * (1 + 2.0**-7)
    return allowed


def worst(got: StepTensors, before: StepTensors, scale: float = 1.0, clip: float = 1.0) -> dict[str, float]:
    """The largest error of each, over its bound; infinite where it is NaN."""
    truth, allowed = exact(before, scale, clip), bounds(before, scale, clip)
    errors = {}
    for name in KEPT:
        ratio = (getattr(got, name).detach().cpu().double() - truth[name]).abs() / allowed[name]
        errors[name] = float(ratio.nan_to_num(nan=math.inf).max()) if ratio.numel() else 0.0
    return errors
