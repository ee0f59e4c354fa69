"""The gates of many sites by the kernel or by the reference: what is launched, what is written, what is refused."""

import dataclasses

import pytest
import torch

from fastlock import gate_fold as module
from fastlock.errors import DamagedError, FastlockError
from fastlock.gate_fold import GateFold, GateFoldPlan, gate_fold
from fastlock.kernels.fold.reference import HeadColumns
from fastlock.kernels.gate_fold import launch as kernels
from tests.kernels.gate_fold.made import DEVICE, between, gamma, make


@pytest.fixture
def launches(monkeypatch) -> list[int]:
    """How many sites each launch folds. Without a GPU, what is dispatched to CUDA runs in the interpreter."""
    pytest.importorskip("triton")
    sites: list[int] = []

    def launch(table, _launch=kernels.launch) -> None:
        sites.append(len(table.sites))
        _launch(table)

    monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(module, "runs_on", lambda device: True)
    return sites


def fold_of(made, **changes) -> GateFold:
    site = made.site
    f = GateFold(site.columns, site.readers, site.writers, "model.layers.3", values=site.values, bias=site.bias)
    return dataclasses.replace(f, **changes)


def truth_of(made) -> torch.Tensor:
    c = made.before.cpu().double()
    return c + (c @ made.site.writers.flatten(1).t()) @ made.site.readers.flatten(1)


@pytest.mark.parametrize("transposed", [False, True])
def test_columns_are_left_as_they_are_and_threads_change_no_bit(monkeypatch, transposed) -> None:
    monkeypatch.setattr(module, "_NUMBERS_A_THREAD", 64)
    made = [make(37, 16, (0, 3), 2, constant=True, seed=seed, transposed=transposed) for seed in range(2)]
    found, biases, before = {}, {}, torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            found[threads] = gate_fold([fold_of(one) for one in made])
            plan = GateFoldPlan([fold_of(one, kept=one.site.kept) for one in made])
            plan.run()
        finally:
            torch.set_num_threads(before)
        biases[threads] = plan.biases
        for one in made:
            assert torch.equal(one.site.kept, one.before)
            one.site.kept.fill_(torch.nan)
    for one, new, again in zip(made, found[1], found[3], strict=True):
        between(new.cpu(), truth_of(one), gamma(40) * 100)
        assert torch.equal(new, again)
        assert new.is_contiguous()
        assert torch.equal(one.written, one.before.cpu()), "what was read is left as it is"
    for one, bias, again in zip(made, biases[1], biases[3], strict=True):
        exact = one.before.cpu().double() @ one.site.values.flatten() + one.site.bias.cpu().double()
        between(bias.cpu(), exact, gamma(40) * 100)
        assert torch.equal(bias, again)


def test_one_launch_for_each_dtype_and_layout(launches) -> None:
    made = [make(20, 16, (0, 2), seed=seed) for seed in range(2)]
    made += [make(20, 16, (0, 2), dtype=torch.float64), make(20, 16, (0, 2), 9)]
    results = gate_fold([fold_of(one) for one in made])
    assert launches == [2], "neither float64 nor rank 9"
    for one, new in zip(made, results, strict=True):
        c, v, u = one.before.cpu().double(), one.site.readers.flatten(1), one.site.writers.flatten(1)
        between(new.cpu(), truth_of(one), gamma(40) * (c.abs() + (c.abs() @ u.abs().t()) @ v.abs()))


@pytest.mark.parametrize("by_kernel", [False, True])
def test_a_plan_relocks_in_place_and_again_from_what_was_kept(by_kernel, request) -> None:
    launches = request.getfixturevalue("launches") if by_kernel else []
    made = make(20, 16, (0, 2), constant=True, keep=True)
    columns, kept = made.site.columns, made.site.kept
    first = GateFoldPlan([fold_of(made, target=columns, kept=kept)])
    first.run()
    written, (bias,) = made.written, first.biases
    between(bias.cpu(), made.before.cpu().double() @ made.site.values.flatten() + made.site.bias.cpu().double(), 1e-4)
    assert torch.equal(kept, made.before)
    assert first.results == [columns]
    assert first.by_torch == (DEVICE == "cpu" and not by_kernel)
    again = GateFoldPlan([fold_of(made, columns=HeadColumns.side_by_side(kept, 16), target=columns)])
    again.run()
    assert torch.equal(made.written, written)
    kept[3, 20] = torch.nan
    with pytest.raises(DamagedError, match="NaN or infinite weights"):
        again.run()
    kept[3, 20] = made.before[3, 20]
    again.run()
    assert torch.equal(made.written, written), "what went wrong once is forgotten"
    assert launches == [1, 1, 1, 1] * by_kernel


@pytest.mark.parametrize("by_kernel", [False, True])
@pytest.mark.parametrize(
    ("spoil", "kind", "message"),
    [
        (lambda made: made.site.columns.matrix[19, 40].fill_(torch.nan), DamagedError, "NaN or infinite weights"),
        (lambda made: made.site.bias[3].fill_(torch.inf), DamagedError, "its bias holds"),
        (lambda made: made.site.writers.mul_(1e9), FastlockError, "too large for this dtype"),
    ],
)
def test_what_is_not_finite_is_an_error_that_names_the_site(by_kernel, spoil, kind, message, request) -> None:
    """In place as well, where the weights that are read are written over."""
    if by_kernel:
        request.getfixturevalue("launches")
    made = make(20, 16, (0, 2), dtype=torch.float16, constant=True)
    good = fold_of(make(20, 16, (0, 2), dtype=torch.float16, seed=1), name="another")
    spoil(made)
    in_place = {"target": made.site.columns, "kept": made.site.kept}
    for to in [in_place] if by_kernel else [{}, in_place]:
        plan = GateFoldPlan([good, fold_of(made, **to)])
        with pytest.raises(FastlockError, match=f"model.layers.3: .*{message}") as error:
            plan.run()
        assert type(error.value) is kind


def test_parameters_are_read_and_no_gradient_is_asked_for() -> None:
    weight = torch.nn.Parameter(torch.randn(6, 32, device=DEVICE))
    readers = torch.randn(1, 1, 16, dtype=torch.float64)
    with torch.inference_mode():
        (new,) = gate_fold([GateFold(HeadColumns(weight, (16,)), readers, readers, "x")])
    assert not new.requires_grad
    assert not new.is_inference()


def test_no_site_is_no_launch_and_gates_must_fit() -> None:
    assert gate_fold([]) == []
    made = make(20, 16, (0, 2))
    with pytest.raises(FastlockError, match="2 locked heads"):
        gate_fold([fold_of(made, readers=torch.ones(1, 1, 16), writers=torch.ones(1, 1, 16))])
