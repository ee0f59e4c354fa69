"""The first run of a way to compute the projection, held to float64: see `ahead_of_time.ways`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from fastlock.kernels.ahead_of_time.ways import WrongResultError
from fastlock.kernels.locked_linear.reference import Inputs

# Numbers of y that are compared: in so many rows and columns, the first, the last, and some between them.
ROWS, COLUMNS = 8, 256
# Roundings are not biased: a number that is off by more of its standard errors than this is wrong. Another one, for the
# root mean square of all numbers compared.
MOST_ERRORS, MOST_ERRORS_OF_ALL = 16, 2


def check_rows(compute: Callable[[Inputs], torch.Tensor], inputs: Inputs) -> bool:
    """Compute the inputs' projection with locks and strengths that are made up, and compare some numbers.

    The user's may be no lock at all. Each entry gets another lock, and the last one none; they shift y by a few times
    its own size.

    Args:
        compute: gives y, [rows, hidden] of x's dtype; memory that it writes y to holds NaN before.
        inputs: x, W and the tables are the user's; x is read, and has to be afterwards what it was.

    Returns:
        True; False if what was compared is not finite, or no lock shifts it, and cannot tell.

    Raises:
        WrongResultError: y is wrong, or was not written; or x was not put back.
    """
    rows, columns = _some(inputs.rows, ROWS), _some(inputs.weight.shape[0], COLUMNS)
    before = inputs.x[rows].cpu()
    x, weight = before.double(), inputs.weight[columns].cpu().double()
    plain = x @ weight.t()
    if inputs.bias is not None:
        plain += inputs.bias[columns].cpu().double()
    folds = inputs.folds[:, columns].cpu().double()
    strength = _finite_ratio(4 * plain.square().mean().sqrt(), folds.square().mean().sqrt())
    if strength is None:
        return False
    inputs = _with_made_up_locks(inputs, strength)
    d = _displacements(inputs, rows) * inputs.strength_of_row[0].double().item()
    y = compute(inputs)[rows][:, columns].cpu().double()
    if not torch.equal(inputs.x[rows].cpu(), before):
        raise WrongResultError("it changed x")
    exact = plain + d @ weight.t()
    size = exact.abs() + ((x + d).square() @ weight.square().t()).sqrt()
    error = size * (_unit(inputs.x.dtype) + 2.0**-24 * math.sqrt(x.shape[1]))
    comparable = size < torch.finfo(inputs.x.dtype).max / 4
    off = torch.where(comparable, (y - exact).abs() / error.clamp(min=1e-300), 0.0)
    if (~(off <= MOST_ERRORS)).any() or off.square().mean().sqrt() > MOST_ERRORS_OF_ALL:
        row, column = divmod(int(off.nan_to_num(math.inf).argmax()), len(columns))
        raise WrongResultError(
            f"its result was wrong: y[{rows[row]}, {columns[column]}] is {y[row, column]:.6g}, and should be "
            f"{exact[row, column]:.6g}"
        )
    return bool((comparable & ((exact - plain).abs() > MOST_ERRORS * error)).any())


def _some(length: int, count: int) -> list[int]:
    """Up to `count` numbers from 0 to length - 1, both included."""
    return sorted({i * (length - 1) // max(count - 1, 1) for i in range(count)}) if length else []


def _finite_ratio(a: torch.Tensor, b: torch.Tensor) -> float | None:
    ratio = float(a / b) if float(b) else math.nan
    return ratio if 0 < ratio < torch.finfo(torch.float32).max else None


def _with_made_up_locks(inputs: Inputs, strength: float) -> Inputs:
    num_locks, entries = inputs.folds.shape[0], inputs.lock_of_row.shape[0]
    locks = torch.arange(entries, dtype=torch.int32, device=inputs.x.device) % (num_locks + 1)
    return replace(
        inputs,
        lock_of_row=torch.where(locks == num_locks, -1, locks),
        strength_of_row=torch.full_like(inputs.strength_of_row, strength),
    )


def _displacements(inputs: Inputs, rows: list[int]) -> torch.Tensor:
    """d of some rows at strength 1, [rows, width] float64."""
    heads, slots, values = inputs.heads.cpu(), inputs.slots.cpu(), inputs.values.cpu().double()
    locks = inputs.lock_of_row.cpu()[torch.tensor(rows) // inputs.rows_per_entry]
    slot = slots[locks.clamp(min=0).long()][:, heads.clamp(min=0).long()]  # [rows, num_heads]
    shifted = (locks >= 0)[:, None] & (heads >= 0) & (slot >= 0)
    return torch.where(shifted[..., None], values[slot.clamp(min=0).long()], 0.0).flatten(1)


def _unit(dtype: torch.dtype) -> float:
    """The rounding of one number; of float32, that of cuBLAS, which may compute with TF32."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        return 2.0**-10
    return float(torch.finfo(dtype).eps)
