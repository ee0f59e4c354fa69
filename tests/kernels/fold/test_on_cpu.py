"""The fold on a CPU: threads share the rows of every site, and the result is the same to the last bit."""

import threading

import pytest
import torch

from fastlock import fold as fold_module
from fastlock.errors import DamagedError
from fastlock.fold import Fold, FoldPlan, fold
from fastlock.kernels.fold import reference
from fastlock.kernels.fold.reference import HeadColumns

HIDDEN, HEAD_DIM, HEADS = 1031, 128, (0, 2, 5)


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """As many threads as torch is allowed, each with however little to do."""
    before = torch.get_num_threads()
    monkeypatch.setattr(fold_module, "_NUMBERS_A_THREAD", 1)
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def sites(dtype: torch.dtype) -> list[Fold]:
    made = []
    for name, bias in (("first", torch.randn(HIDDEN).to(dtype)), ("second", None)):
        weight = torch.randn(HIDDEN, 6 * HEAD_DIM).mul(0.02).to(dtype)
        values = torch.randn(len(HEADS), HEAD_DIM, dtype=torch.float64)
        made.append(Fold(HeadColumns.in_projection(weight, HEADS, HEAD_DIM), values, bias, name))
    return made


def in_float64(site: Fold) -> torch.Tensor:
    """The same sums without blocks, threads or steps."""
    b = torch.zeros(HIDDEN, dtype=torch.float64)
    for start, value in zip(site.columns.starts, site.values, strict=True):
        b = b + (site.columns.matrix[:, start : start + HEAD_DIM].double() * value).sum(dim=1)
    return b if site.bias is None else b + site.bias.double()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_it_is_the_float64_sum_rounded_once(dtype: torch.dtype, threads: int) -> None:
    folds = sites(dtype)
    plan = FoldPlan(folds)
    for result in plan.results:
        result.fill_(torch.nan)
    plan.run()
    for site, result in zip(folds, plan.results, strict=True):
        exact, found = in_float64(site), result.double()
        assert result.dtype == dtype
        if dtype.itemsize > 2:
            assert torch.equal(result, exact.to(dtype))
        else:  # of all numbers of its dtype the nearest
            assert result.isfinite().all()
            for step in (1, -1):
                neighbour = (result.view(torch.int16) + step).view(dtype).double()
                assert ((found - exact).abs() <= (neighbour - exact).abs()).all()


def test_each_thread_folds_a_part_of_every_site(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    met = threading.Barrier(threads, timeout=60)
    rows: list[int] = []

    def noted(columns: HeadColumns, *rest: object, _fold=reference.fold) -> torch.Tensor:
        if len(columns.matrix) not in rows:
            met.wait()  # which ends only where as many threads are there at once
        rows.append(len(columns.matrix))
        return _fold(columns, *rest)

    monkeypatch.setattr(reference, "fold", noted)
    fold(sites(torch.bfloat16))
    assert len(rows) == 2 * threads
    assert sum(rows) == 2 * HIDDEN


def test_an_error_in_a_thread_is_raised_and_a_later_run_folds(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    folds = sites(torch.float32)
    plan = FoldPlan(folds)

    def broken(*site: object, _fold=reference.fold) -> torch.Tensor:
        if threads == 1 or threading.current_thread() is not threading.main_thread():
            raise MemoryError("no memory here")
        return _fold(*site)

    with monkeypatch.context() as patched:
        patched.setattr(reference, "fold", broken)
        with pytest.raises(MemoryError, match="no memory here"):
            plan.run()
    plan.run()
    assert torch.equal(plan.results[1], in_float64(folds[1]).float())


@pytest.mark.parametrize("row", [0, HIDDEN // 2, HIDDEN - 1])
def test_what_is_not_finite_is_found_in_every_part(row: int, threads: int) -> None:
    folds = sites(torch.float16)
    folds[1].columns.matrix[row, 2 * HEAD_DIM] = torch.inf
    with pytest.raises(DamagedError, match="second: .*locked columns hold NaN or infinite"):
        fold(folds)


def test_finite_float64_whose_sum_overflows_is_finite() -> None:
    weight = torch.full((4, 1), 1e308, dtype=torch.float64)
    values = torch.ones(1, 1, dtype=torch.float64)
    (result,) = fold([Fold(HeadColumns(weight, (0,)), values, None, "large")])
    assert torch.equal(result, weight[:, 0])


def test_little_work_and_a_single_thread_start_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_is_wanted(*_: object) -> None:
        raise AssertionError("a thread was started")

    monkeypatch.setattr(threading.Thread, "start", none_is_wanted)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        fold(sites(torch.float32))  # 400,000 numbers
        torch.set_num_threads(1)
        monkeypatch.setattr(fold_module, "_NUMBERS_A_THREAD", 1)
        fold(sites(torch.float32))
    finally:
        torch.set_num_threads(before)
