"""Columns that are dequantised some rows at a time: their fold, and how many of them are dequantised for it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastlock
from fastlock.basis import SAMPLED_ROWS, column_norms, likeness
from fastlock.checkpoints.quantised import columns as module
from fastlock.checkpoints.quantised.columns import DequantisedColumns
from fastlock.kernels.fold.reference import HeadColumns
from tests.checkpoints.quantised.test_relocking import checkpoint
from tests.helpers import quantised

HIDDEN, HEAD_DIM = 1100, 128  # several blocks of rows, the last of which is short


def columns_of(dense: torch.Tensor, asked: list[int]) -> DequantisedColumns:
    """Those of W, [hidden, heads * head_dim], which notes how many rows of a head were asked for at a time."""

    def head(first: int):
        def in_rows(rows: slice) -> torch.Tensor:
            numbers = dense[rows, first : first + HEAD_DIM].clone()
            asked.append(len(numbers))
            return numbers

        return in_rows

    return DequantisedColumns([head(first) for first in range(0, dense.shape[1], HEAD_DIM)], len(dense), HEAD_DIM)


def test_its_fold_is_that_of_the_whole_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_NUMBERS", 2**16)
    dense, values = torch.randn(HIDDEN, 3 * HEAD_DIM).double(), torch.randn(3, HEAD_DIM).double()
    asked: list[int] = []
    b = columns_of(dense, asked).exact_fold(values)
    exact = [math.fsum(w * d for w, d in zip(row, values.flatten().tolist(), strict=True)) for row in dense.tolist()]
    assert (b - torch.tensor(exact, dtype=torch.float64)).abs().max() < 1e-12
    assert 0 < max(asked) * HEAD_DIM <= 2**16
    assert sum(asked) == 3 * HIDDEN


def test_a_sample_of_the_rows_is_all_that_is_dequantised_to_compare_norms() -> None:
    dense = torch.randn(4 * SAMPLED_ROWS, 2 * HEAD_DIM).double()
    whole, asked = HeadColumns.side_by_side(dense, HEAD_DIM), list[int]()
    norms = column_norms(whole, HEAD_DIM)
    found, wanted = likeness(columns_of(dense, asked), norms), likeness(whole, norms)
    assert found is not None
    assert wanted is not None
    assert torch.equal(found.spreads, wanted.spreads)
    assert torch.equal(found.levels, wanted.levels)
    assert asked == 2 * [SAMPLED_ROWS]


@pytest.mark.parametrize(("suffix", "number"), [("scales", torch.inf), ("bias", torch.nan)])
def test_what_is_not_finite_is_named(suffix: str, number: float, tmp_path: Path) -> None:
    directory, lock, _ = checkpoint(tmp_path, quantised.gptq, kind="llama", attention_bias=True)
    tensors = load_file(directory / "model.safetensors")
    tensors[f"model.layers.2.self_attn.o_proj.{suffix}"][..., 3] = number
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    what = "locked columns hold NaN" if suffix == "scales" else "bias holds NaN"
    with pytest.raises(fastlock.DamagedError, match=rf"layers\.2\..*: its fold is not finite: its {what}"):
        fastlock.relock_checkpoint(directory, lock, tmp_path / "out", 6.0)
    assert not (tmp_path / "out").exists()
