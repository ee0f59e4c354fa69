"""The step in plain PyTorch: the truth for every test, and what runs wherever the kernel does not.

AdamW is that of Loshchilov and Hutter (arXiv 1711.05101), operation for operation as `torch.optim.AdamW` with
foreach=False computes it. The term is Lisa's (arXiv 2405.18641, eq. 2): the gradient of pull/2 ||w - anchor||^2 is
added to that of the loss, and so passes through Adam's moments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# As in torch.nn.utils.clip_grad_norm_.
CLIP_EPS = 1e-6
_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class StepSettings:
    """What one group of parameters is stepped by.

    Attributes:
        lr, beta1, beta2, eps, weight_decay: AdamW's.
        pull: Lisa's rho: pull * (w - anchor) is added to the gradient, before it is clipped.
        anchor_decay: w moves by lr * anchor_decay * (anchor - w), beside the moments, as weight decay does.
        seed: of stochastic rounding; None: to the nearest.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    pull: float = 0.0
    anchor_decay: float = 0.0
    seed: int | None = None

    @property
    def acts(self) -> bool:
        """Whether an anchor has any effect."""
        return self.pull != 0 or self.anchor_decay != 0


@dataclass(frozen=True, eq=False)
class StepTensors:
    """One parameter and what its step reads and writes; all of one shape, strides and device.

    Attributes:
        weight: w. Its dtype is the gradient's.
        grad: None: nothing of it is touched.
        exp_avg, exp_avg_sq: Adam's moments m and v, of one floating dtype.
        anchor: where the weight is pulled to; None: nowhere. It is only read.
        settings: its group's.
        step: which step this is, from 1 on.
        ordinal: its place among all parameters, from 0 on; only stochastic rounding depends on it.
    """

    weight: torch.Tensor
    grad: torch.Tensor | None
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    anchor: torch.Tensor | None
    settings: StepSettings
    step: float
    ordinal: int = 0


def proximal_step(
    tensors: StepTensors, inverse_scale: torch.Tensor | None = None, clip: torch.Tensor | None = None
) -> None:
    """Step one parameter in place.

    Where weight, moments and gradient have one dtype and nothing is rounded stochastically, each operation is done
    in that dtype, as torch.optim.AdamW does it. Otherwise all is done in float32, and rounded once where it is kept.

    Args:
        tensors: see `StepTensors`. Without a gradient, nothing is done.
        inverse_scale: one number, float32: gradients are multiplied by it first.
        clip: one number: the gradient with the term is multiplied by it.
    """
    settings, weight = tensors.settings, tensors.weight
    if tensors.grad is None:
        return
    grad = proximal_gradient(tensors, tensors.grad, inverse_scale)
    if clip is not None:
        grad = grad * clip.to(grad.device, grad.dtype)
    kept = (weight, tensors.exp_avg, tensors.exp_avg_sq)
    if all(x.dtype == weight.dtype for x in kept) and settings.seed is None:
        _adamw(*kept, grad, tensors)
        return
    wide = [x.float() if x.dtype != torch.float32 else x for x in kept]
    _adamw(wide[0], wide[1], wide[2], grad.float(), tensors)
    bits = None if settings.seed is None else _random_bits(tensors, settings.seed)
    for i, (target, value) in enumerate(zip(kept, wide, strict=True)):
        if target is not value:
            target.copy_(value if bits is None else _round_stochastically(value, bits[i]))


def proximal_gradient(
    tensors: StepTensors, grad: torch.Tensor, inverse_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """g + pull (w - anchor), of the gradient's dtype; in float32 where the step is done in float32."""
    settings, weight = tensors.settings, tensors.weight
    if weight.dtype != tensors.exp_avg.dtype or settings.seed is not None:
        weight, grad = weight.float(), grad.float()
    if inverse_scale is not None:
        grad = grad * inverse_scale.to(grad.device)
    if tensors.anchor is not None and settings.pull != 0:
        grad = (grad + settings.pull * (weight - tensors.anchor)).to(grad.dtype)
    return grad


def clip_factor(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """What gradients of this total norm are multiplied by, as torch.nn.utils.clip_grads_with_norm_ has it."""
    return torch.clamp(max_norm / (norm + CLIP_EPS), max=1.0)


def norm_of(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """The norm of all of them together, as torch.nn.utils.get_total_norm has it: one number, on the first's device."""
    norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
    total: torch.Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    return total


def key_of(seed: int, step: float) -> int:
    """32 bits that seed and step decide, for the random bits of all tensors."""
    return int(_mix(torch.tensor((seed ^ int(step)) & _WORD)))


def _adamw(w: torch.Tensor, m: torch.Tensor, v: torch.Tensor, grad: torch.Tensor, tensors: StepTensors) -> None:
    """torch.optim.adam._single_tensor_adam in torch 2.13, line by line; between its first lines, the anchor's decay."""
    settings, step, anchor = tensors.settings, tensors.step, tensors.anchor
    away = None
    if anchor is not None and settings.anchor_decay != 0:
        away = w - anchor.to(w.dtype)
    if settings.weight_decay != 0:
        w.mul_(1 - settings.lr * settings.weight_decay)
    if away is not None:
        w.sub_(settings.lr * settings.anchor_decay * away)
    m.lerp_(grad, 1 - settings.beta1)
    v.mul_(settings.beta2).addcmul_(grad, grad, value=1 - settings.beta2)
    bias_correction1 = 1 - settings.beta1**step
    bias_correction2 = 1 - settings.beta2**step
    denominator = (v.sqrt() / bias_correction2**0.5).add_(settings.eps)
    w.addcdiv_(m, denominator, value=-(settings.lr / bias_correction1))


def _round_stochastically(x: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """float32 to bfloat16, up with the probability of what is cut off; random: 16 bits for each number, as int64."""
    bits = x.view(torch.int32).to(torch.int64) + random
    rounded = (bits & ~0xFFFF).to(torch.int32).view(torch.float32)
    return torch.where(x.isnan(), x, rounded).to(torch.bfloat16)


def _random_bits(tensors: StepTensors, seed: int) -> list[torch.Tensor]:
    """16 random bits for each number of w, m and v, as int64.

    They are a hash of a counter, the number's place in memory order, and a key of seed, step and ordinal: the same
    on every device and in every run.
    """
    key = _mix(torch.tensor((key_of(seed, tensors.step) + tensors.ordinal) & _WORD)).to(tensors.weight.device)
    place = torch.arange(tensors.weight.numel(), device=tensors.weight.device)
    first = _mix((_mix((place & _WORD) ^ key) + (place >> 32)) & _WORD)
    second = _mix(first ^ key)
    like = tensors.weight
    return [_in_memory_order(bits, like) for bits in (first >> 16, first & 0xFFFF, second >> 16)]


def _in_memory_order(numbers: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Numbers in a row, laid out as a dense tensor is."""
    return torch.as_strided(numbers, like.shape, like.stride()) if like.numel() else numbers.view(like.shape)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Another 32 bits for each 32 bits, kept in int64 (the hash "lowbias32", C. Wellons, hash-prospector)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _WORD
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _WORD
    return x ^ (x >> 16)
