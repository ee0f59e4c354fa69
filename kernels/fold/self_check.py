"""The first launch of a fold kernel in a process, held to the reference: see `ahead_of_time.ways`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fastlock.kernels.ahead_of_time.ways import WrongResultError
from fastlock.kernels.fold.reference import HeadColumns, bound, exact_fold, magnitude

# Of the rows that are compared: the first, the last, and some between them.
ROWS = 8


def check_fold(
    launch: Callable[[list[torch.Tensor], list[torch.Tensor]], torch.Tensor],
    columns: Sequence[HeadColumns],
    biases: Sequence[torch.Tensor | None],
    head_dim: int,
    dtype: torch.dtype,
) -> bool:
    """Fold some sites into memory of their own, by the launch to be checked, and compare a few rows of each.

    The displacements are made up: the user's may be zero, or so large that nothing is finite, and would tell nothing.

    Args:
        launch: given the values of each site, [heads, head_dim] float64, and its result, [hidden] of `dtype`: folds,
            and returns the flags, [1 + sites] int32, as in `launch.Table`.
        columns: the locked heads' columns of each site.
        biases: of each site, or None.
        head_dim: columns of one head.
        dtype: of the results.

    Returns:
        True; False if the rows that were compared are not finite, or zero, and cannot tell.

    Raises:
        WrongResultError: what was written is wrong, or something was not written.
    """
    values = [displacements(len(of_site.starts), head_dim) for of_site in columns]
    results = [of.matrix.new_full((of.matrix.shape[0],), float("nan"), dtype=dtype) for of in columns]
    flags = launch(values, results).cpu()  # which waits for the launch
    written = [result.cpu() for result in results]
    told = False
    for site, (of_site, bias, value, result) in enumerate(zip(columns, biases, values, written, strict=True)):
        if bool(flags[1 + site]) == bool(result.isfinite().all()):
            raise WrongResultError("its result was not written, or its flags do not say whether the result is finite")
        told |= _compare(of_site, bias, value, result)
    return told


def displacements(heads: int, head_dim: int) -> torch.Tensor:
    """Numbers that differ from head to head and column to column, [heads, head_dim] float64; float32 can hold them."""
    steps = torch.arange(heads * head_dim, dtype=torch.float64, device="cpu").view(heads, head_dim)
    return ((steps * 37) % 101 - 50) / 64


def _compare(columns: HeadColumns, bias: torch.Tensor | None, values: torch.Tensor, result: torch.Tensor) -> bool:
    """Whether some rows could be compared. Raises as `check_fold` if one is wrong."""
    hidden = len(result)
    if hidden == 0:
        return False
    rows = sorted({i * (hidden - 1) // (ROWS - 1) for i in range(ROWS)})
    matrix = columns.matrix
    some = HeadColumns(matrix[torch.tensor(rows, device=matrix.device)].cpu(), columns.starts)
    c = None if bias is None else bias.detach()[torch.tensor(rows, device=bias.device)].cpu()
    exact, got = exact_fold(some, values, c), result[rows].double()
    of_heads = magnitude(some, values)
    size = of_heads + (0 if c is None else c.double().abs())
    error = bound(exact, size, values.numel() + 1, result.dtype)
    # In float32, or in the result's dtype, larger numbers overflow; and of NaN there is nothing to say.
    comparable = size + error < min(torch.finfo(result.dtype).max, torch.finfo(torch.float32).max)
    wrong = comparable & ~((got - exact).abs() <= error)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise WrongResultError(
            f"its result was wrong: row {rows[row]} of {hidden} is {got[row]:.6g}, and should be {exact[row]:.6g}"
        )
    return bool((comparable & (of_heads > 0)).any())
