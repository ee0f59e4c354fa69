"""The fold: b = W d + c for many sites at once, by whatever is right for the device they are on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from fastlock import reference
from fastlock.errors import FastlockError
from fastlock.kernels.fold import fold_sites  # which imports no Triton; here, not at the first relock, as it takes time
from fastlock.lock import Displacement


def fold(
    weights: Sequence[torch.Tensor],
    displacements: Sequence[Displacement],
    biases: Sequence[torch.Tensor | None],
    names: Sequence[str],
) -> list[torch.Tensor]:
    """The new bias of each site, b = W d + c, reading only the locked head columns of W.

    One kernel launch for all sites of one CUDA device, dtype, layout and head_dim (a model: one launch), which
    accumulates in float32, in an order that does not change from run to run; the reference elsewhere, in float64.
    Both round once.

    Args:
        weights: W of each site, [hidden, num_heads * head_dim], float16, bfloat16, float32 or float64.
        displacements: d of each site.
        biases: c of each site, [hidden], or None.
        names: of the sites, for messages.

    Returns:
        b of each site, [hidden], new tensors of the weight's dtype and device.

    Raises:
        FastlockError: a fold is not finite: the weights hold NaN or infinities, or the strength is too large.
    """
    folds: list[torch.Tensor] = [torch.empty(0, device="cpu")] * len(weights)
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, weight in enumerate(weights):
        groups.setdefault(_group(weight, displacements[i]), []).append(i)
    with torch.inference_mode(False), torch.no_grad():
        for members in groups.values():
            run = _fold_on(weights[members[0]])
            done = run([weights[i] for i in members], [displacements[i] for i in members], [biases[i] for i in members])
            for i, b in zip(members, done, strict=True):
                folds[i] = b
            _check_finite(done, [names[i] for i in members])
    return folds


_Run = Callable[[Sequence[torch.Tensor], Sequence[Displacement], Sequence[torch.Tensor | None]], list[torch.Tensor]]


def _group(weight: torch.Tensor, displacement: Displacement) -> tuple[object, ...]:
    return weight.device, weight.dtype, weight.stride(1) == 1, 1 in weight.stride(), displacement.values.shape[1]


def _fold_on(weight: torch.Tensor) -> _Run:
    by_kernel = weight.device.type == "cuda" and weight.dtype != torch.float64 and 1 in weight.stride()
    return _fold_cuda if by_kernel else _fold_reference


def _fold_reference(
    weights: Sequence[torch.Tensor], displacements: Sequence[Displacement], biases: Sequence[torch.Tensor | None]
) -> list[torch.Tensor]:
    return [reference.fold(*site) for site in zip(weights, displacements, biases, strict=True)]


def _fold_cuda(
    weights: Sequence[torch.Tensor], displacements: Sequence[Displacement], biases: Sequence[torch.Tensor | None]
) -> list[torch.Tensor]:
    folds = [weight.new_empty(weight.shape[0]) for weight in weights]
    heads = [displacement.heads for displacement in displacements]
    values = [displacement.values for displacement in displacements]
    contiguous = [bias if bias is None else bias.detach().contiguous() for bias in biases]
    fold_sites(weights, heads, values, contiguous, folds)
    return folds


def _check_finite(folds: Sequence[torch.Tensor], names: Sequence[str]) -> None:
    whole = _on_host(folds)
    if math.isfinite(whole.sum(dtype=torch.float64).item()):  # a sum of finite float32 can't overflow there
        return
    finite = [bool(b.isfinite().all()) for b in torch.split(whole, [len(b) for b in folds])]
    if not all(finite):
        raise FastlockError(
            f"{names[finite.index(False)]}: its fold is not finite in {folds[0].dtype}. Either its locked columns hold "
            "NaN or infinite weights (check the checkpoint), or the strength is too large for the dtype (lower it)."
        )


def _on_host(folds: Sequence[torch.Tensor]) -> torch.Tensor:
    """The folds one after the other on the CPU, once they are done: [sum of their lengths].

    From a GPU they are copied and not checked there: no kernel of torch's has to be loaded for the first relock of a
    process, and a copy a fold is less to launch than a check of each.
    """
    device = folds[0].device
    if device.type != "cuda":
        return torch.cat(list(folds)).cpu()
    whole = torch.empty(sum(map(len, folds)), dtype=folds[0].dtype, device="cpu", pin_memory=True)
    for part, b in zip(torch.split(whole, [len(b) for b in folds]), folds, strict=True):
        part.copy_(b, non_blocking=True)
    torch.cuda.current_stream(device).synchronize()
    return whole
