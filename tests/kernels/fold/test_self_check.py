"""The first launch of a kernel in a process: held to the reference, and left where it is wrong or does not run."""

import math
import warnings

import pytest
import torch

pytest.importorskip("triton")

import fastlock
from fastlock import fold as fold_module
from fastlock.kernels.ahead_of_time.ways import WAYS, NoWayError, WrongResultError
from fastlock.kernels.fold import launch as kernels
from fastlock.kernels.fold import triton_kernel as jit
from fastlock.kernels.fold.self_check import ROWS, check_fold, displacements
from tests.helpers import fake_driver
from tests.helpers.families import random_lock, same_state, state, tiny_model
from tests.kernels.fold.sites import DEVICE, arguments, make_site
from tests.models.test_relocking import biases, expected_biases, same_biases

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="the kernels that are wrong here read the CPU's memory")

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch):
    """Nothing was checked in this process; and what goes to CUDA goes to the interpreter."""
    monkeypatch.setattr(fold_module, "_way", lambda f: fold_module._ByKernel)
    WAYS.forget()
    yield
    WAYS.forget()


def results_of(arguments) -> list[torch.Tensor]:
    """The memory that a launch writes to, as float32: here the interpreter's results are."""
    tables = arguments[0].tolist()
    return [fake_driver.at(row[7], row[1], torch.float32) for row in tables if row[1]]


def nothing(real, arguments, variant, grid):
    pass


def last_row_left_out(real, arguments, variant, grid):
    held = [result[-1].item() for result in results_of(arguments)]
    real(arguments, variant, grid)
    for result, number in zip(results_of(arguments), held, strict=True):
        result[-1] = number


def a_middle_row_left_out(real, arguments, variant, grid):
    held = [result[20].item() for result in results_of(arguments)]
    real(arguments, variant, grid)
    for result, number in zip(results_of(arguments), held, strict=True):
        result[20] = number


def everything_doubled(real, arguments, variant, grid):
    real(arguments, variant, grid)
    for result in results_of(arguments):
        result.mul_(2)


def last_site_zero(real, arguments, variant, grid):
    real(arguments, variant, grid)
    results_of(arguments)[-1].zero_()


def rows_moved_by_one(real, arguments, variant, grid):
    real(arguments, variant, grid)
    for result in results_of(arguments):
        result.copy_(result.roll(1))


def flags_always_set(real, arguments, variant, grid):
    real(arguments, variant, grid)
    arguments[3].fill_(1)


WRONG = [nothing, last_row_left_out, a_middle_row_left_out, everything_doubled, last_site_zero, rows_moved_by_one]
WRONG += [flags_always_set]


def spoil(monkeypatch, wrong) -> list[int]:
    """Let Triton's launches be wrong; and count them."""
    real, sites = jit.launch, []

    def launch(arguments, variant, grid):
        sites.append(len(arguments[0]))
        wrong(real, arguments, variant, grid)

    monkeypatch.setattr(jit, "launch", launch)
    return sites


def right(real, arguments, variant, grid):
    real(arguments, variant, grid)


def some_sites():
    return [make_site(63, 32, (0,), torch.float32, seed=1), make_site(40, 32, (0, 1, 2), torch.float32, seed=2)]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_a_wrong_kernel_is_not_used(wrong, monkeypatch) -> None:
    sites = some_sites()
    launched = spoil(monkeypatch, wrong)
    warned = pytest.warns(RuntimeWarning, match="not run by its jit on the CPU: its result was")
    with warned, pytest.raises(NoWayError, match="its result was"):
        kernels.fold_sites(*arguments(sites))
    assert launched == [2], "once, for the first site and the last"
    assert all(site.guarded.isnan().all() for site in sites), "nothing was written to the results"
    with warnings.catch_warnings(record=True) as others, pytest.raises(NoWayError):
        kernels.fold_sites(*arguments(sites))
    assert (launched, others) == ([2], [])


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_a_bias_that_would_be_replaced_is_as_it_was(wrong, monkeypatch) -> None:
    site = make_site(50, 64, (0, 1), torch.float32)
    before = site.bias.clone()
    spoil(monkeypatch, wrong)
    with pytest.warns(RuntimeWarning), pytest.raises(NoWayError):
        kernels.fold_sites([site.columns], [site.values], [site.bias], [site.bias])
    assert torch.equal(site.bias, before)


# What NumPy says of a loop in the interpreter of Triton 3.6.
OF_INTERPRETER = "Conversion of an array with ndim > 0 to a scalar"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_right_kernel_is_checked_once(dtype, transposed, monkeypatch) -> None:
    """One launch of two sites more than was asked for, and none for the next tables of the variant."""
    launched = spoil(monkeypatch, right)
    many = [make_site(40, 64, (0, 2), dtype, transposed, seed=seed) for seed in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", OF_INTERPRETER, DeprecationWarning)
        for _ in range(3):
            kernels.fold_sites(*arguments(many))
    assert launched == [2, 4, 4, 4]
    kernels.fold_sites(*arguments([make_site(40, 80, (0,), dtype, transposed)]))
    assert launched[4:] == [1, 1], "another variant, of one site"


@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
@pytest.mark.parametrize("wrong", WRONG[:4], ids=lambda wrong: wrong.__name__)
def test_a_model_is_folded_by_the_reference_instead(wrong, kind: str, monkeypatch) -> None:
    model = tiny_model(kind)
    lock, before = random_lock(model, [(0, 1), (2, 0)]), state(model)
    want = expected_biases(model, lock, 2.0)
    spoil(monkeypatch, wrong)
    plan = fastlock.Plan([model], lock, 2.0)
    with pytest.warns(RuntimeWarning, match="fastlock doctor") as warned:
        plan.relock()
    assert len([one for one in warned if not str(one.message).startswith(OF_INTERPRETER)]) == 1
    assert same_biases(biases(model), want)
    assert fastlock.verify(model, lock).strength == 2.0
    plan.relock(strength=3.0)
    assert fastlock.verify(model, lock).strength == 3.0
    fastlock.unlock(model)
    assert same_state(state(model), before)


COMPILER = [
    RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
    RuntimeError("Internal Triton PTX codegen error: ptxas fatal : Unsupported gpu architecture 'sm_121'"),
    type("OutOfResources", (Exception,), {})("out of resource: shared memory, Required: 300000"),
    FileNotFoundError(2, "No such file or directory", "ptxas"),
]


@pytest.mark.parametrize("error", COMPILER, ids=lambda error: type(error).__name__)
def test_a_kernel_that_cannot_be_compiled(error: Exception, monkeypatch) -> None:
    def fails(real, arguments, variant, grid):
        raise error

    model = tiny_model("llama")
    lock = random_lock(model)
    want = expected_biases(model, lock, 2.0)
    spoil(monkeypatch, fails)
    with pytest.warns(RuntimeWarning, match=type(error).__name__):
        fastlock.relock(model, lock, 2.0)
    assert same_biases(biases(model), want)


def test_memory_that_ran_out_is_an_error_and_no_verdict(monkeypatch) -> None:
    def fails(real, arguments, variant, grid):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = tiny_model("llama")
    lock, before = random_lock(model), state(model)
    with monkeypatch.context() as patched:
        spoil(patched, fails)
        with pytest.raises(torch.OutOfMemoryError):
            fastlock.relock(model, lock, 2.0)
    assert same_state(state(model), before)
    launched = spoil(monkeypatch, right)
    fastlock.relock(model, lock, 2.0)
    assert launched == [2, 2]


def test_another_lock_may_ask_for_a_kernel_that_is_wrong(monkeypatch) -> None:
    """Heads that start where 16 bytes do not: another variant. The same biases go on, by the reference."""
    wide = torch.randn(64, 257)[:, 1:]
    weight = {0: wide.clone()}
    direction = torch.randn(1, 32)

    def lock(head: int) -> fastlock.Lock:
        rows = torch.tensor([0]), torch.tensor([head])
        return fastlock.Lock(*rows, direction / direction.norm(), torch.tensor([1.5]), head_dim=32)

    plan = fastlock.Plan([weight], lock(1), 2.0)
    plan.relock()
    placed = plan.biases[0][0]
    WAYS.forget()
    spoil(monkeypatch, everything_doubled)
    with pytest.warns(RuntimeWarning):
        plan.relock(lock(2), 2.0)
    d = lock(2).displacement(2.0)[0].dense(256)
    assert plan.biases[0][0].data_ptr() == placed.data_ptr()
    torch.testing.assert_close(placed, (weight[0].double() @ d.double()).float(), rtol=1e-5, atol=1e-5)
    assert plan._built._plan.by_torch
    plan.relock(strength=3.0)
    torch.testing.assert_close(placed, (1.5 * weight[0].double() @ d.double()).float(), rtol=1e-5, atol=1e-5)


def test_a_wrong_cubin_leaves_the_jit(monkeypatch, tmp_path) -> None:
    """A cubin of the fake driver that writes nothing; Triton's interpreter stands for the JIT."""
    library = fake_driver.FakeDriver()
    library.stack.append(fake_driver.context_of(0))
    variant = kernels.build_table(*arguments([make_site(40, 32, (0,), torch.float32)])).variant
    fake_driver.write_folder(tmp_path / "cubins", [fake_driver.describe(variant)])
    fake_driver.install(monkeypatch, tmp_path / "cubins", library, checked=True)
    site = make_site(40, 32, (0, 1), torch.float32)
    table = kernels.build_table(*arguments([site]))
    assert len(library.launches) == 1, "the check"
    kernels.launch(table)
    assert len(library.launches) == 2
    WAYS.forget()
    monkeypatch.setattr(fake_driver, "run_fold", lambda *arguments: None)
    with pytest.warns(RuntimeWarning, match="not run by its cubin on cuda:0"):
        table = kernels.build_table(*arguments([site]))
    assert [bad.way for bad in WAYS.bad(0)] == ["cubin"]
    site.guarded.fill_(math.nan)
    launches = len(library.launches)
    kernels.launch(table)
    assert len(library.launches) == launches
    assert site.out.isfinite().all()


@pytest.mark.parametrize("strength", [0.0, 2.0])
def test_a_strength_of_zero_hides_nothing(strength: float, monkeypatch) -> None:
    spoil(monkeypatch, last_site_zero)
    model = tiny_model("llama")
    with pytest.warns(RuntimeWarning):
        fastlock.relock(model, random_lock(model, [(0, 1), (2, 0)]), strength)


@pytest.mark.parametrize("number", [math.nan, math.inf, 0.0])
def test_weights_that_cannot_tell_leave_it_to_the_next_table(number: float, monkeypatch) -> None:
    sites = some_sites()
    for site in sites:
        site.weight.fill_(number)
    launched = spoil(monkeypatch, right)
    kernels.fold_sites(*arguments(sites))
    assert launched == [2, 2]
    kernels.fold_sites(*arguments(some_sites()))
    kernels.fold_sites(*arguments(some_sites()))
    assert launched == [2, 2, 2, 2, 2]
    assert WAYS.bad(None) == []


@pytest.mark.parametrize("number", [3e38, 6e4])
def test_what_overflows_says_nothing(number: float) -> None:
    """Finite weights whose fold float32, or the results, cannot hold."""
    site = make_site(40, 64, (0, 1), torch.float32 if number > 1e30 else torch.float16)
    site.weight.fill_(number)
    kernels.build_table(*arguments([site]))
    assert WAYS.bad(None) == []


@pytest.mark.parametrize("hidden", [1, 2, 7, 8, 9, 100])
def test_the_first_and_the_last_row_are_among_the_compared_ones(hidden: int) -> None:
    """A launch that is right but for one row: found in either of them, whatever the number of rows is."""
    site = make_site(hidden, 64, (0, 1), torch.float32)

    def launch(spoilt, values, results):
        d = values[0].flatten()
        results[0].copy_(site.weight[:, :128].double() @ d + site.bias.double())
        results[0][spoilt] += 1
        return torch.zeros(2, dtype=torch.int32)

    for spoilt in (0, hidden - 1):
        with pytest.raises(WrongResultError, match=f"row {spoilt} of {hidden} is"):
            check_fold(lambda *given, at=spoilt: launch(at, *given), [site.columns], [site.bias], 64, torch.float32)
    assert ROWS == 8


def test_the_made_up_displacements_are_of_every_column() -> None:
    d = displacements(3, 128)
    assert torch.equal(d, d.float().double())
    assert (d != 0).double().mean() > 0.97
    assert not any(torch.equal(d[i], d[j]) for i in range(3) for j in range(i))
