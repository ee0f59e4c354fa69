"""Relock, then quantise: how far the bias of the unquantised weights is from that of the weights that are served.

‖(W − Ŵ) d‖ / ‖W d‖ for d of one head, random and of unit length; Ŵ is W rounded, dequantised by the readers that
relocking uses, or by torch. Of random Gaussian matrices (1024 × 1024, eight of them, a head of 128 columns each) and of
all 30 output projections of SmolLM2-135M-Instruct (heads of 64). What is told is the median over all heads, and the
5th and 95th percentile. At 4 bits a tenth of the lock is lost, and `fastlock verify` would call what is left altered:
fold what is served.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch

from bench.lib.printed import PrintedTable, say
from bench.lib.smollm2 import load_smollm2

Weights = Iterator[tuple[torch.Tensor, int]]
NF4_NEGATIVE = (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911)
NF4 = (*NF4_NEGATIVE, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def main() -> int:
    say((__doc__ or "").strip())
    table = PrintedTable(["rounded to", "Gaussian (5 %–95 %)", "SmolLM2 (5 %–95 %)"])
    of_model = [layer.self_attn.o_proj.weight.detach().double() for layer in load_smollm2()[0].model.layers]
    for name, rounding in ROUNDINGS.items():
        table.row(name, told(errors(gaussian(), rounding)), told(errors(((w, 64) for w in of_model), rounding)))
    return 0


def gaussian() -> Weights:
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        yield torch.randn(1024, 1024, generator=generator, dtype=torch.float64), 128


def errors(weights: Weights, rounding: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Of every head of these weights, with a displacement of its own."""
    generator, found = torch.Generator().manual_seed(1), []
    for weight, head_dim in weights:
        served = rounding(weight)
        for first in range(0, weight.shape[1], head_dim):
            d = torch.randn(head_dim, generator=generator, dtype=torch.float64)
            exact = weight[:, first : first + head_dim] @ d
            found.append((exact - served[:, first : first + head_dim] @ d).norm() / exact.norm())
    return torch.stack(found)


def told(found: torch.Tensor) -> str:
    low, middle, high = found.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
    return f"{middle:.3f} ({low:.3f}–{high:.3f})"


def whole_numbers(bits: int, group: int, symmetric: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """To the nearest, each group of inputs with a scale (and, if asymmetric, a zero point) of its own."""

    def rounding(weight: torch.Tensor) -> torch.Tensor:
        grouped = weight.view(len(weight), -1, group)
        if symmetric:
            largest = 2 ** (bits - 1) - 1
            step = grouped.abs().amax(-1, keepdim=True) / (largest + 0.5)
            rounded: torch.Tensor = (grouped / step).round().clamp(-largest - 1, largest) * step
            return rounded.view(weight.shape)
        low, high = (bound(grouped, -1, keepdim=True) for bound in (torch.amin, torch.amax))
        step = (high - low) / (2**bits - 1)
        zero = (-low / step).round()
        q = ((grouped / step).round() + zero).clamp(0, 2**bits - 1)
        rounded = (q - zero) * step
        return rounded.view(weight.shape)

    return rounding


def codes(
    values: tuple[float, ...], group: int, scale: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """To the nearest of some numbers times the scale of each group."""
    table = torch.tensor(sorted({*values, *(-value for value in values)} if min(values) >= 0 else values)).double()

    def rounding(weight: torch.Tensor) -> torch.Tensor:
        grouped = weight.reshape(-1, group)
        step = scale(grouped.abs().amax(-1, keepdim=True) / table.abs().max())
        nearest = ((grouped / step)[..., None] - table).abs().argmin(-1)
        return (table[nearest] * step).view(weight.shape)

    return rounding


def to_dtype(dtype: torch.dtype, scaled: bool = False) -> Callable[[torch.Tensor], torch.Tensor]:
    def rounding(weight: torch.Tensor) -> torch.Tensor:
        step = weight.abs().amax(1, keepdim=True) / torch.finfo(dtype).max if scaled else torch.ones(())
        return (weight / step).to(dtype).double() * step

    return rounding


ROUNDINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "bfloat16": to_dtype(torch.bfloat16),
    "int8, a scale a row": lambda w: whole_numbers(8, w.shape[1], True)(w),
    "FP8 (E4M3), a scale a row": to_dtype(torch.float8_e4m3fn, scaled=True),
    "4 bits and zero points, groups of 64 (as GPTQ and AWQ store it)": whole_numbers(4, 64, False),
    "w4a16, symmetric, groups of 64": whole_numbers(4, 64, True),
    "NF4, blocks of 64": codes(NF4, 64, lambda s: s),
    "NVFP4, groups of 16": codes(E2M1, 16, lambda s: s.to(torch.float8_e4m3fn).double().clamp(min=2**-9)),
    "MXFP4, groups of 32": codes(E2M1, 32, lambda s: torch.exp2(s.log2().ceil())),
}


if __name__ == "__main__":
    sys.exit(main())
