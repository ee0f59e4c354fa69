"""Locks per request: the op against the unfolded forward, and models whose requests have different locks."""

import copy
import io
import pickle

import accelerate
import pytest
import torch
import torch._inductor.config
import torch.nn.utils.prune
from torch import nn

import fastlock
from fastlock.models import unfolded as unfolded_module
from fastlock.models.locked_linear_op import _dense, locked_linear
from fastlock.models.request_locks import LockedLinear, RequestLocks
from fastlock.models.sites import sites
from tests.helpers.families import CONFIGS, logits, random_lock, reload, same_state, state, tiny_model, tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
# How far a float64 model may be from the truth, in units of its largest logit: the table of folds is float32, and so
# are norms and softmax inside, each good to 2**-24; 16 of these errors.
EXACT = 2.0**-20
# Which of `two_locks` each of four requests has, and how strong.
ASSIGNED, STRENGTHS = [1, -1, 0, 1], [6.0, None, 2.0, 0.5]


def arguments(shape, dtype=torch.float32, locks=(0, -1), bias=True, transposed=False, requires_grad=False):
    """The op's, for 3 heads of 8: lock 0 shifts heads 0 and 2, lock 1 head 2; and the displacement of each lock."""
    values = torch.randn(3, 8)
    d = torch.zeros(2, 24, dtype=torch.float64)
    d[0, :8], d[0, 16:], d[1, 16:] = values[0].double(), values[2].double(), values[1].double()
    weight = torch.randn(24, 20, dtype=dtype).t() if transposed else torch.randn(20, 24, dtype=dtype)
    tensors = [torch.randn(*shape, 24, dtype=dtype), weight, torch.randn(20, dtype=dtype) if bias else None]
    tensors += [torch.tensor([0, -1, 1], dtype=torch.int32), torch.tensor([[0, 2], [-1, 1]], dtype=torch.int32), values]
    tensors += [(d @ weight.double().t()).float(), torch.tensor(locks, dtype=torch.int32)]
    tensors += [1 + 5 * torch.rand(len(locks))]
    tensors = [None if tensor is None else tensor.detach().to(DEVICE) for tensor in tensors]
    for tensor in tensors[:3]:
        if tensor is not None:
            tensor.requires_grad_(requires_grad)
    return tensors, d.to(DEVICE)


def unfolded(tensors, d):
    """The oracle, in float64: d added to each row of x; x, W and c may be given in float64 to be differentiated."""
    x, weight, bias, *_, lock, strength = tensors
    rows = x.reshape(-1, x.shape[-1]).double()
    of_entry = [d[i] * s.double() if i >= 0 else 0 * d[0] for i, s in zip(lock.tolist(), strength, strict=True)]
    shift = torch.stack(of_entry).repeat_interleave(len(rows) // len(lock), 0)
    y = (rows + shift) @ weight.double().t() + (0 if bias is None else bias.double())
    return y.view(*x.shape[:-1], -1)


def close(y, truth, tensors, d):
    """Of each row: within two roundings to y's dtype, and (on a GPU) one of x + d, of the magnitudes that it sums.

    The float32 sums, of 24 terms and the bias, are good to 2**-19 of them.
    """
    *three, heads, slots, values, folds, lock, strength = tensors
    magnitudes = [None if tensor is None else tensor.abs() for tensor in three]
    size = unfolded([*magnitudes, heads, slots, values, folds, lock, strength], d.abs())
    return ((y.double() - truth).abs() <= max(2 * torch.finfo(y.dtype).eps, 2.0**-19) * size).all(-1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("shape", "locks"),
    [
        ((4,), (0, 1, -1, 0)),
        ((4,), (1,)),
        ((2, 5), (-1, 1)),
        ((2, 3, 2), (1, 0)),
        ((1, 6), (0, -1, 1)),
        ((2, 1), (1, 1)),
    ],
)
def test_the_op_is_the_unfolded_forward(shape, locks, dtype) -> None:
    for transposed, bias in ((False, True), (True, False)):
        tensors, d = arguments(shape, dtype, locks, bias, transposed)
        y = locked_linear(*tensors)
        truth = unfolded(tensors, d)
        assert (y.dtype, y.shape, y.is_contiguous()) == (dtype, (*shape, 20), True)
        assert close(y, truth, tensors, d).all()
        # The plain projection is close in the rows without a lock, and in no other: a row is held to its own bound.
        of_entry = torch.tensor(locks, device=DEVICE) < 0
        unlocked = of_entry.repeat_interleave(truth[..., 0].numel() // len(locks)).view(shape)
        assert torch.equal(close(nn.functional.linear(*tensors[:3]), truth, tensors, d), unlocked)


@pytest.mark.skipif(DEVICE == "cuda", reason="there several ways are right, each with bits of its own")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_without_a_lock_have_the_bits_of_the_plain_projection(dtype) -> None:
    tensors, _ = arguments((3, 4), dtype, (0, -1, 1))
    y, plain = locked_linear(*tensors), nn.functional.linear(*tensors[:3])
    assert torch.equal(y[1], plain[1])
    assert not (y[[0, 2]] == plain[[0, 2]]).all(-1).any()


def test_x_of_any_strides_and_of_no_rows() -> None:
    tensors, d = arguments((4, 6), locks=(0, 1, -1, 0))
    truth = unfolded(tensors, d)
    tensors[0] = tensors[0].transpose(0, 1).contiguous().transpose(0, 1)
    assert not tensors[0].is_contiguous()
    assert close(locked_linear(*tensors), truth, tensors, d).all()
    for shape in ((4, 0), (0,)):
        tensors[0] = torch.randn(*shape, 24, device=DEVICE)
        assert locked_linear(*tensors).shape == (*shape, 20)


@pytest.mark.parametrize(
    ("shape", "locks", "dtype", "how"),
    [
        ((2, 3), (0, -1), torch.float32, {"requires_grad": True}),
        ((4,), (0, 1, -1, 1), torch.bfloat16, {"bias": False, "transposed": True}),
        ((3, 2), (0,), torch.float32, {"bias": False, "transposed": True, "requires_grad": True}),
        ((0,), (0, 1), torch.float32, {}),
    ],
)
def test_opcheck(shape, locks, dtype, how) -> None:
    tensors, _ = arguments(shape, dtype, locks, **how)
    torch.library.opcheck(torch.ops.fastlock.locked_linear.default, tensors)


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_the_unfolded_forward(bias) -> None:
    tensors, d = arguments((3, 4), locks=(0, -1, 1), bias=bias, requires_grad=True)
    leaves = [tensor for tensor in tensors[:3] if tensor is not None]
    upstream = torch.randn(3, 4, 20, device=DEVICE)
    found = torch.autograd.grad(locked_linear(*tensors), leaves, upstream)
    expected = torch.autograd.grad(unfolded(tensors, d), leaves, upstream.double())
    for grad, other in zip(found, expected, strict=True):
        torch.testing.assert_close(grad, other.to(grad), rtol=1e-4, atol=1e-4)
    plain = torch.autograd.grad(nn.functional.linear(*tensors[:3]), leaves, upstream)
    assert not torch.allclose(found[1], plain[1], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (0, lambda t: t[..., :16], "x has 16 columns"),
        (0, lambda t: t.double(), "of one floating-point dtype"),
        (2, lambda t: t[:10], "bias is"),
        (2, lambda t: t.half(), "bias is"),
        (3, lambda t: t[:2], "heads is"),
        (4, lambda t: t.long(), "slots is"),
        (4, lambda t: t[:0], "both must be tables"),
        (5, lambda t: t[:, :5].contiguous(), "cannot be divided into heads of 5"),
        (5, lambda t: t.half(), "values is"),
        (6, lambda t: t[:1], "folds is"),
        (6, lambda t: t.t().contiguous().t(), "folds is"),
        (7, lambda t: t.repeat(2), r"strength_of_row is \[2\]"),
        (7, lambda t: t.long(), "lock_of_row is"),
        (8, lambda t: t.half(), "strength_of_row is"),
    ],
)
def test_the_op_refuses_what_it_would_misread(index, wrong, message) -> None:
    tensors, _ = arguments((2, 3))
    tensors[index] = wrong(tensors[index])
    with pytest.raises(fastlock.FastlockError, match=message):
        locked_linear(*tensors)


def test_rows_that_do_not_divide_are_refused() -> None:
    tensors, _ = arguments((5,))
    with pytest.raises(fastlock.FastlockError, match="x has 5 rows, but locks were assigned to 2 requests"):
        locked_linear(*tensors)
    tensors, _ = arguments((5,), locks=())
    with pytest.raises(fastlock.FastlockError, match="0 requests"):
        locked_linear(*tensors)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU is not waited for: there they give NaN")
@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (7, 2, "lock 2 was assigned; give a number from 0 to 1"),
        (7, -2, "lock -2 was assigned"),
        (8, -1.0, "negative strength"),
        (8, float("nan"), "finite number"),
        (8, float("inf"), "finite number"),
    ],
)
def test_locks_and_strengths_that_there_are_not_are_refused_on_a_cpu(index, value, message) -> None:
    tensors, _ = arguments((2, 3))
    tensors[index][1] = value
    with pytest.raises(fastlock.FastlockError, match=message):
        locked_linear(*tensors)


@needs_gpu
def test_locks_that_there_are_not_are_nan_on_a_gpu() -> None:
    tensors, _ = arguments((2, 3), locks=(1, 2))
    y = locked_linear(*tensors)
    assert y[1].isnan().all()
    assert y[0].isfinite().all()


def two_locks(model):
    """They share a layer and a head, and differ in others."""
    last = model.config.get_text_config().num_hidden_layers - 1
    return [random_lock(model, [(0, 3), (0, 1), (last, 2)]), random_lock(model, [(0, 3), (1, 0), (last, 1)], seed=2)]


def prompts(count=4, length=8):
    return torch.cat([tokens(length, seed) for seed in range(count)]).to(DEVICE)


def one_by_one(model, locks, assigned, strengths, run):
    """What `run` gives for each request, [batch, ...], from a run of the whole batch with its lock alone, unfolded."""
    results = []
    for i, (lock, strength) in enumerate(zip(assigned, strengths, strict=True)):
        if lock == -1:
            results.append(run(model)[i])
        else:
            with unfolded_module.unfolded(model, locks[lock], strength):
                results.append(run(model)[i])
    return torch.stack(results)


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_each_request_has_its_own_lock_in_every_family(model_type) -> None:
    """At every position, against the unfolded forward of each."""
    model = tiny_model(model_type, torch.float64).to(DEVICE)
    locks, ids = two_locks(model), prompts()
    plain = logits(model, ids)
    expected = one_by_one(model, locks, ASSIGNED, STRENGTHS, lambda m: logits(m, ids))
    with RequestLocks(model, locks) as request_locks:
        request_locks.assign(ASSIGNED, STRENGTHS)
        got = logits(model, ids)
    effect, error = (expected - plain).abs().amax(-1), float((got - expected).abs().max())
    bound = EXACT * float(expected.abs().max())
    assert effect[[0, 2, 3]].min() > 100 * bound, "the locks must act at every position for this test to mean anything"
    assert error <= bound


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2", "gpt_oss"])
def test_generate_with_a_cache(model_type) -> None:
    model = tiny_model(model_type, torch.float64).to(DEVICE)
    locks, ids = two_locks(model), prompts()
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True}
    how |= {"return_dict_in_generate": True}

    def run(model):
        return torch.stack(model.generate(ids, **how).logits, 1)

    expected, plain = one_by_one(model, locks, ASSIGNED, STRENGTHS, run), run(model)
    assert (expected.argmax(-1) != plain.argmax(-1)).any()
    with RequestLocks(model, locks) as request_locks:
        request_locks.assign(ASSIGNED, STRENGTHS)
        got = run(model)
    torch.testing.assert_close(got, expected, rtol=0, atol=EXACT * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_in_the_dtypes_of_kernels(model_type, dtype) -> None:
    model = tiny_model(model_type, dtype).to(DEVICE)
    locks, ids = two_locks(model), prompts()
    plain = logits(model, ids)
    expected = one_by_one(model, locks, ASSIGNED, STRENGTHS, lambda m: logits(m, ids))
    with RequestLocks(model, locks) as request_locks:
        request_locks.assign([-1] * 4)
        unlocked = logits(model, ids)
        request_locks.assign(ASSIGNED, STRENGTHS)
        got = logits(model, ids)
    if DEVICE == "cpu":
        assert torch.equal(unlocked, plain)
    effect = (expected - plain).double().norm()
    assert (got - expected).double().norm() < 32 * torch.finfo(dtype).eps * (effect + plain.double().norm())
    assert (got - expected).double().norm() < effect / 8


def test_strengths_are_the_locks_own_unless_they_are_given() -> None:
    model = tiny_model("llama", torch.float64)
    first, second = two_locks(model)
    second = fastlock.Lock(second.layers, second.heads, second.directions, second.scales, strength=1.5)
    ids = prompts(3)
    with RequestLocks(model, [first, second]) as request_locks:
        for given, meant in (
            (None, [6, 0, 1.5]),
            (2, [2, 0, 2]),
            ([None, 3, 0.25], [6, 0, 0.25]),
            ([0, 1, None], [0, 0, 1.5]),
        ):
            request_locks.assign([0, -1, 1], given)
            got = logits(model, ids)
            request_locks.assign([0, -1, 1], meant)
            assert torch.equal(got, logits(model, ids))
    with RequestLocks(model, [first]) as request_locks:
        request_locks.assign(torch.tensor([0, -1, 0]), torch.tensor([1.0, 2.0, 3.0]))
        assert request_locks._placed[0][3].strength_of_row.tolist() == [1, 0, 3]


@pytest.mark.parametrize(
    ("locks", "strengths", "message"),
    [
        ([0, 2], None, "lock 2 was assigned; give a number from 0 to 1, or -1"),
        ([0, -2], None, "lock -2"),
        ([0, 1.0], None, "lock 1.0"),
        ([0, True], None, "lock True"),
        ([0, None], None, "lock None"),
        ([], None, "give a list"),
        (0, None, "give a list"),
        ("01", None, "give a list"),
        ([0, 1], [1.0], "1 strengths for 2 requests"),
        ([0, 1], -1.0, "negative strength"),
        ([0, -1], [1.0, -1.0], "negative strength"),
        ([0, 1], [1.0, float("nan")], "finite number"),
        ([0, 1], float("inf"), "finite number"),
        ([0, 1], "6", "strength"),
        ([0, 1], [1.0, True], "strength is True"),
    ],
)
def test_assignments_that_are_refused_change_nothing(locks, strengths, message) -> None:
    model = tiny_model("llama")
    ids = prompts(2)
    with RequestLocks(model, two_locks(model)) as request_locks:
        request_locks.assign([0, 1], 2.0)
        before = logits(model, ids)
        with pytest.raises(fastlock.FastlockError, match=message):
            request_locks.assign(locks, strengths)
        assert torch.equal(logits(model, ids), before)


def test_a_batch_that_was_not_assigned_is_an_error() -> None:
    """Never lost in silence: neither before the first assignment, nor where requests could be taken for one another."""
    model = tiny_model("llama")
    with RequestLocks(model, two_locks(model)) as request_locks:
        with pytest.raises(fastlock.FastlockError, match="a batch of 2 came, but locks were assigned to 0 requests"):
            logits(model, prompts(2))
        request_locks.assign([0, 1])
        logits(model, prompts(2))
        for batch in (1, 3, 4):
            with pytest.raises(fastlock.FastlockError, match=rf"a batch of {batch} came.*to 2 requests"):
                logits(model, prompts(batch))
        request_locks.assign([0, 1, -1, 0])
        with pytest.raises(fastlock.FastlockError, match="a batch of 2 came"):
            logits(model, prompts(2))
        request_locks.assign([0, 1] * 4)  # as many as the tokens of the one that comes
        with pytest.raises(fastlock.FastlockError, match="a batch of 1 came"):
            logits(model, prompts(1, length=8))
        request_locks.assign([0, 1] * 4, packed=True)
        logits(model, prompts(1, length=8))
        with pytest.raises(fastlock.FastlockError, match="7 rows came, but locks were assigned to 8 rows of packed"):
            logits(model, prompts(1, length=7))


def test_one_sequence_may_have_a_lock_for_each_row() -> None:
    """As servers run requests that they packed into one sequence."""
    model = tiny_model("llama")
    module = model.model.layers[0].self_attn.o_proj
    x = torch.randn(1, 6, module.in_features)
    locks = two_locks(model)
    with RequestLocks(model, locks) as request_locks:
        placed = model.model.layers[0].self_attn.o_proj
        request_locks.assign([0, 0, -1, 1, 1, 1], 2.0, packed=True)
        got = placed(x)
        assert torch.equal(placed(x[0]), got[0])
        for rows, lock in ((slice(0, 2), 0), (slice(2, 3), -1), (slice(3, 6), 1)):
            request_locks.assign([lock], 2.0)
            torch.testing.assert_close(placed(x[:, rows]), got[:, rows])


def test_removing_puts_everything_back() -> None:
    for model_type in ("llama", "gpt2", "falcon"):
        model = tiny_model(model_type)
        before, modules = state(model), dict(model.named_modules())
        parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
        request_locks = RequestLocks(model, two_locks(model))
        assert sum(isinstance(module, LockedLinear) for module in model.modules()) == 3
        assert same_state(state(model), before)
        assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
        request_locks.remove()
        request_locks.remove()
        after = dict(model.named_modules())
        assert modules.keys() == after.keys()
        assert all(modules[name] is after[name] for name in modules)
        assert same_state(state(model), before)
        with pytest.raises(fastlock.FastlockError, match="were removed"):
            request_locks.assign([0])


def test_an_error_inside_the_block_puts_everything_back() -> None:
    model = tiny_model("llama")
    with pytest.raises(ZeroDivisionError), RequestLocks(model, two_locks(model)):
        _ = 1 / 0
    assert not any(isinstance(module, LockedLinear) for module in model.modules())


def test_what_took_the_place_of_a_locked_projection_is_not_thrown_away() -> None:
    model = tiny_model("llama")
    request_locks = RequestLocks(model, two_locks(model))
    placed, other = model.model.layers[1].self_attn.o_proj, nn.Linear(128, 64)
    model.model.layers[1].self_attn.o_proj = other
    with pytest.raises(fastlock.FastlockError, match=r"layers\.1\.self_attn\.o_proj was replaced"):
        request_locks.remove()
    assert isinstance(model.model.layers[0].self_attn.o_proj, LockedLinear)
    model.model.layers[1].self_attn.o_proj = placed
    request_locks.remove()


def test_what_is_saved_is_the_model_without_locks(tmp_path) -> None:
    model = tiny_model("llama")
    ids = prompts(2)
    plain = logits(model, ids)
    with RequestLocks(model, two_locks(model)):
        model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(reload(tmp_path / "out"), ids.cpu()).to(plain), plain)


def test_models_and_locks_that_are_refused() -> None:
    model = tiny_model("llama")
    locks = two_locks(model)
    before = dict(model.named_modules())
    for wrong in ([], None, locks[0], "lock.safetensors", [locks[0], "a.safelock"]):
        with pytest.raises(fastlock.FastlockError, match=r"give a list|Lock\.load"):
            RequestLocks(model, wrong)
    with pytest.raises(fastlock.MismatchError, match="head_dim"):
        RequestLocks(model, [locks[0], random_lock(tiny_model("gpt2"))])
    with pytest.raises(fastlock.FastlockError, match="inner part"):
        RequestLocks(model.model, locks)
    request_locks = RequestLocks(model, locks)
    with pytest.raises(fastlock.FastlockError, match="per request already"):
        RequestLocks(model, locks[:1])
    with pytest.raises(fastlock.FastlockError, match=r"has locks per request.*RequestLocks\.remove"):
        fastlock.relock(model, locks[0])
    request_locks.remove()
    fastlock.relock(model, locks[0])
    with pytest.raises(fastlock.FastlockError, match="is relocked"):
        RequestLocks(model, locks)
    twin = tiny_model("llama")
    twin.model.layers = model.model.layers
    with pytest.raises(fastlock.FastlockError, match="part of another model"):
        RequestLocks(twin, locks)
    fastlock.unlock(model)
    model.model.layers[1].self_attn.o_proj.weight.data[0, 3] = float("nan")
    with pytest.raises(fastlock.DamagedError, match=r"layers\.1\.self_attn\.o_proj: a fold is not finite"):
        RequestLocks(model, locks)
    assert all(before[name] is module for name, module in model.named_modules())


def test_a_model_that_came_back_relocked_is_refused(tmp_path) -> None:
    model = tiny_model("llama")
    locks = two_locks(model)
    fastlock.relock(model, locks[0])
    model.save_pretrained(tmp_path / "out")
    loaded = type(model).from_pretrained(tmp_path / "out")
    with pytest.raises(fastlock.FastlockError, match="is relocked"):
        RequestLocks(loaded, locks)


def test_another_parameter_at_the_same_address_is_folded_again() -> None:
    """As where one was freed, and the next one got its memory."""
    model = tiny_model("llama")
    with RequestLocks(model, two_locks(model)) as request_locks:
        placed = model.model.layers[0].self_attn.o_proj
        before = placed.folds.clone()
        placed.weight = old = nn.Parameter(placed.weight.data)
        request_locks.assign([0, 1])
        old.detach().numpy()[:] *= 3  # which torch does not count
        placed.weight = nn.Parameter(old.data)
        assert (placed.weight.data_ptr(), placed.weight._version) == (old.data_ptr(), old._version)
        request_locks.assign([0, 1])
        torch.testing.assert_close(placed.folds, 3 * before)


@pytest.mark.parametrize("change", ["add_", "load_state_dict", "replace", "data"])
def test_changed_weights_are_folded_again(change) -> None:
    """What is changed while the locks are in acts in the locks, and is still there afterwards."""
    model, other = tiny_model("llama", torch.float64), tiny_model("llama", torch.float64, seed=3)
    locks, ids = two_locks(model), prompts().cpu()
    request_locks = RequestLocks(model, locks)
    request_locks.assign(ASSIGNED, STRENGTHS)
    stale = logits(model, ids)
    with torch.no_grad():
        for mine, (*_, locked) in zip(sites(other), request_locks._placed, strict=True):
            if change == "add_":
                locked.weight.add_(mine.weight - locked.weight)
            elif change == "replace":
                locked.weight = nn.Parameter(mine.weight.clone())
            elif change == "data":
                locked.weight.data = mine.weight.clone()
    if change == "load_state_dict":
        model.load_state_dict(other.state_dict())
    other.load_state_dict(model.state_dict())
    expected = one_by_one(other, locks, ASSIGNED, STRENGTHS, lambda m: logits(m, ids))
    got = logits(model, ids)
    assert not torch.allclose(got, stale, atol=1e-2)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    request_locks.remove()
    assert same_state(state(model), state(other))


def test_assigning_folds_changed_weights_again() -> None:
    """A compiled model, or a CUDA graph, does not look at its weights."""
    model = tiny_model("llama")
    with RequestLocks(model, two_locks(model)) as request_locks:
        placed = model.model.layers[0].self_attn.o_proj
        before = placed.folds.clone()
        with torch.no_grad():
            placed.weight.mul_(2)
        request_locks.assign([0, 1])
        torch.testing.assert_close(placed.folds, 2 * before)


def test_another_dtype_keeps_the_tables() -> None:
    model = tiny_model("llama")
    locks, ids = two_locks(model), prompts(2).cpu()
    with RequestLocks(model, locks) as request_locks:
        request_locks.assign([0, 1], 0.7)
        model.to(torch.bfloat16)
        got = logits(model, ids)
        placed = [locked for *_, locked in request_locks._placed]
        assert {table.dtype for locked in placed for table in tables_of(locked)} == {torch.float32, torch.int32}
        assert len({locked.strength_of_row.data_ptr() for locked in placed}) == 1
    with RequestLocks(model, locks) as request_locks:
        request_locks.assign([0, 1], 0.7)
        assert torch.equal(logits(model, ids), got)


def test_refold_sees_what_torch_does_not_count() -> None:
    model = tiny_model("llama")
    with RequestLocks(model, two_locks(model)) as request_locks:
        placed = model.model.layers[0].self_attn.o_proj
        before = placed.folds.clone()
        placed.weight.data.mul_(1.5)
        request_locks.refold()
        torch.testing.assert_close(placed.folds, 1.5 * before)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_tables_hold_each_lock(model_type) -> None:
    """What shifts x, element by element, is the displacement; and what is added to y is its fold."""
    model = tiny_model(model_type)
    locks = two_locks(model)
    layers = [site.layer for site in sites(model)]
    with RequestLocks(model, locks) as request_locks:
        for layer, (*_, original, locked) in zip(layers, request_locks._placed, strict=True):
            head_dim, num_heads = locked.values.shape[1], len(locked.heads)
            weight = (
                original.weight.detach().double() if model_type == "llama" else original.weight.detach().double().t()
            )
            for i, lock in enumerate(locks):
                found = torch.zeros(num_heads, head_dim, dtype=torch.float64)
                for head, column in enumerate(locked.heads.tolist()):
                    slot = -1 if column == -1 else int(locked.slots[i, column])
                    found[head] = 0 if slot == -1 else locked.values[slot].double()
                d = lock.displacement(1.0).get(layer)
                expected = torch.zeros(num_heads * head_dim) if d is None else d.dense(num_heads * head_dim)
                assert torch.equal(found.flatten().float(), expected.float())
                torch.testing.assert_close(locked.folds[i].double(), weight @ expected.double(), rtol=1e-6, atol=1e-6)
            shifted = {head for lock in locks for head in getattr(lock.displacement(1.0).get(layer), "heads", ())}
            assert {head for head, column in enumerate(locked.heads.tolist()) if column >= 0} == shifted


def tables_of(locked):
    return [*locked.buffers(), locked.lock_of_row, locked.strength_of_row]


def test_layers_read_one_assignment_on_another_device() -> None:
    """A graph that is captured there, before anything is assigned anew, sees what is assigned later."""
    model = tiny_model("llama")
    with RequestLocks(model, two_locks(model)) as request_locks:
        request_locks.assign([0, 1])
        model.to("meta")
        placed = [locked for *_, locked in request_locks._placed]
        memory = {locked.lock_of_row.untyped_storage()._cdata for locked in placed}
        assert len(memory) == 1
        assert {table.device.type for locked in placed for table in tables_of(locked)} == {"meta"}


def test_tables_that_move_in_inference_mode_can_be_written_to_outside_it() -> None:
    """A weight that changes later is folded anew, into them."""
    model = tiny_model("llama")
    with RequestLocks(model, two_locks(model)) as request_locks:
        request_locks.assign([0, 1])
        with torch.inference_mode():
            model.to("meta")
        tables = [table for *_, locked in request_locks._placed for table in tables_of(locked)]
        assert {table.device.type for table in tables} == {"meta"}
        assert not any(table.is_inference() for table in tables)


def test_no_table_is_a_buffer_that_ddp_would_overwrite() -> None:
    """Each process assigns its own requests; and what torch.compile takes for constant are a module's buffers."""
    model = tiny_model("llama")
    with RequestLocks(model, two_locks(model)) as request_locks:
        request_locks.assign([0, 1])
        buffers = {id(buffer) for buffer in model.buffers()}
        for *_, locked in request_locks._placed:
            assert not {id(locked.lock_of_row), id(locked.strength_of_row)} & buffers


def test_memory_stays_where_it_is() -> None:
    """CUDA graphs hold addresses: another assignment, or another fold, of the same size is written in place."""
    model = tiny_model("llama").to(DEVICE)
    with RequestLocks(model, two_locks(model)) as request_locks:
        request_locks.assign([0, 1])
        placed = [locked for *_, locked in request_locks._placed]

        def addresses():
            return [[table.data_ptr() for table in tables_of(locked)] for locked in placed]

        before = addresses()
        assert len({(own[-2], own[-1]) for own in before}) == 1, "all layers read one assignment"
        request_locks.assign([-1, 0], [1.0, 2.0])
        request_locks.refold()
        assert addresses() == before
        for count in (3, 300, 2):  # other graphs' batches, and back again
            request_locks.assign([-1, 0, 1] * count)
            assert [own[:-2] for own in addresses()] == [own[:-2] for own in before]
            assert placed[0].lock_of_row.tolist() == [-1, 0, 1] * count
            assert len({(own[-2], own[-1]) for own in addresses()}) == 1
        request_locks.assign([1, -1])
        assert addresses() == before


def test_inference_mode_and_training_go_together() -> None:
    model = tiny_model("llama")
    ids = prompts(2).cpu()
    with torch.inference_mode():
        request_locks = RequestLocks(model, two_locks(model))
        request_locks.assign([0, 1])
        inside = model(ids).logits
    request_locks.assign([0, 1])
    loss = model(ids, labels=ids)
    assert torch.equal(loss.logits, inside)
    loss.loss.backward()
    assert model.model.layers[0].self_attn.o_proj.weight.grad.abs().max() > 0
    assert model.model.layers[0].self_attn.v_proj.weight.grad.abs().max() > 0
    with torch.inference_mode():
        request_locks.assign([1, 1])
        assert not torch.equal(model(ids).logits, inside)
    request_locks.remove()


def test_hooks_and_mode_are_kept() -> None:
    model = tiny_model("llama").train()
    module = model.model.layers[0].self_attn.o_proj
    seen = []
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    with RequestLocks(model, two_locks(model)) as request_locks:
        placed = model.model.layers[0].self_attn.o_proj
        assert placed.training
        request_locks.assign([0, 1])
        model.eval()
        logits(model, prompts(2).cpu())
        assert len(seen) == 1
        handle.remove()
        later = placed.register_forward_hook(lambda module, args, output: seen.append(output.shape))
        logits(model, prompts(2).cpu())
        assert len(seen) == 2
    assert not module.training
    logits(model, prompts(2).cpu())
    assert len(seen) == 3
    later.remove()


def test_hooks_of_every_kind_are_kept() -> None:
    model = tiny_model("llama")
    ids = prompts(2).cpu()
    module = model.model.layers[0].self_attn.o_proj
    seen = []

    def register(module, when):
        return [
            module.register_forward_pre_hook(lambda _m, _a, _k: seen.append(f"{when} pre"), with_kwargs=True),
            module.register_forward_hook(lambda _m, _a, _k, _y: seen.append(f"{when} post"), with_kwargs=True),
            module.register_full_backward_hook(lambda *_: seen.append(f"{when} backward")),
        ]

    def run():
        seen.clear()
        model(ids, labels=ids).loss.backward()
        return sorted(seen)

    of_before = [f"before {kind}" for kind in ("backward", "post", "pre")]
    of_inside = [f"inside {kind}" for kind in ("backward", "post", "pre")]
    handles = register(module, "before")
    request_locks = RequestLocks(model, two_locks(model))
    request_locks.assign([0, 1])
    assert run() == of_before
    for handle in handles:
        handle.remove()
    assert run() == []
    register(model.model.layers[0].self_attn.o_proj, "inside")
    assert run() == of_inside
    request_locks.remove()
    assert run() == of_inside


def test_a_module_with_a_backward_hook_first_set_inside() -> None:
    model = tiny_model("llama")
    seen = []
    request_locks = RequestLocks(model, two_locks(model))
    model.model.layers[0].self_attn.o_proj.register_full_backward_hook(lambda *_: seen.append(1))
    request_locks.remove()
    ids = prompts(2).cpu()
    model(ids, labels=ids).loss.backward()
    assert seen == [1]


def test_modules_whose_place_cannot_be_taken_are_refused() -> None:
    model = tiny_model("llama")
    locks = two_locks(model)
    module = model.model.layers[0].self_attn.o_proj
    module.forward = lambda x: type(module).forward(module, x)
    with pytest.raises(fastlock.UnsupportedError, match=r"layers\.0\.self_attn\.o_proj\.forward was replaced"):
        RequestLocks(model, locks)
    del module.forward
    nn.utils.prune.l1_unstructured(module, "weight", amount=0.5)
    for refused in (RequestLocks, fastlock.relock):
        with pytest.raises(fastlock.UnsupportedError, match=r"weight is not a parameter.*prune\.remove"):
            refused(model, locks if refused is RequestLocks else locks[0])
    nn.utils.prune.remove(module, "weight")
    with RequestLocks(model, locks):
        pass
    fastlock.relock(model, locks[0])


def test_a_twin_of_a_model_with_request_locks_is_not_relocked() -> None:
    """Its biases would act in every request of the other."""
    model, twin = tiny_model("llama"), tiny_model("llama")
    for mine, its in zip(model.model.layers, twin.model.layers, strict=True):
        its.self_attn.o_proj = mine.self_attn.o_proj
    with (
        RequestLocks(model, two_locks(model)),
        pytest.raises(fastlock.FastlockError, match=r"part of another model too, which has locks per request"),
    ):
        fastlock.relock(twin, two_locks(twin)[0])
    fastlock.relock(twin, two_locks(twin)[0])


def test_copies_and_pickles_work_by_themselves() -> None:
    model = tiny_model("llama")
    ids = prompts(2).cpu()
    with RequestLocks(model, two_locks(model)) as request_locks:
        request_locks.assign([0, 1])
        expected = logits(model, ids)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twins = [copy.deepcopy(model), torch.load(file, weights_only=False), pickle.loads(pickle.dumps(model))]
        request_locks.assign([-1, -1])
        for twin in twins:
            assert torch.equal(logits(twin, ids), expected)


def test_a_device_map_on_one_device_works() -> None:
    model = tiny_model("llama")
    locks, ids = two_locks(model), prompts(2).cpu()
    with RequestLocks(model, locks) as request_locks:
        request_locks.assign([0, 1])
        expected = logits(model, ids)
    model = accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    with RequestLocks(model, locks) as request_locks:
        request_locks.assign([0, 1])
        assert torch.equal(logits(model, ids), expected)


def test_autocast() -> None:
    model = tiny_model("llama").to(DEVICE)
    locks, ids = two_locks(model), prompts(2)
    with torch.autocast(DEVICE, torch.bfloat16):
        plain = logits(model, ids)
        with RequestLocks(model, locks) as request_locks:
            request_locks.assign([-1, -1])
            assert (logits(model, ids) == plain).all() or DEVICE == "cuda"
            request_locks.assign([0, 1])
            got = logits(model, ids)
    with RequestLocks(model, locks) as request_locks:
        request_locks.assign([0, 1])
        expected = logits(model, ids)
    assert (got - expected).norm() < (plain - expected).norm() / 8


def test_autocast_leaves_float64_alone() -> None:
    model = tiny_model("llama", torch.float64)
    x = torch.randn(2, 3, 128, dtype=torch.float64)
    with RequestLocks(model, two_locks(model)) as request_locks:
        request_locks.assign([0, 1])
        placed = model.model.layers[0].self_attn.o_proj
        expected = placed(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(placed(x), expected)


def test_the_op_is_not_cast() -> None:
    """Its fake says x's dtype, and so does what runs."""
    tensors, d = arguments((4,), locks=(0, 1, -1, 0))
    with torch.autocast(DEVICE, torch.bfloat16):
        y = locked_linear(*tensors)
    assert y.dtype == torch.float32
    assert close(y, unfolded(tensors, d), tensors, d).all()


def test_gradients_of_a_batch_whose_locks_are_gone() -> None:
    """Assigned anew, in the same memory, before the gradients are made."""
    model = tiny_model("llama")
    x = torch.randn(2, 3, 128)
    with RequestLocks(model, two_locks(model)) as request_locks:
        placed = model.model.layers[0].self_attn.o_proj
        request_locks.assign([0, 1])
        (expected,) = torch.autograd.grad(placed(x).pow(2).sum(), placed.weight)
        y = placed(x).pow(2).sum()
        request_locks.assign([-1, -1])
        (got,) = torch.autograd.grad(y, placed.weight)
    assert torch.equal(got, expected)


def test_a_lock_that_there_is_not_has_no_gradient_of_another() -> None:
    tensors, d = arguments((3,), locks=(1, 2, -2))
    dense = _dense(*tensors[3:6], tensors[7])
    torch.testing.assert_close(dense[0].double(), d[1])
    assert dense[1:].isnan().all()


def test_other_devices_have_a_way_too() -> None:
    for key in ("MPS", "XPU", "PrivateUse1"):
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key("fastlock::locked_linear", key)


def test_no_rows_and_no_entries() -> None:
    tensors, _ = arguments((0,), locks=())
    assert locked_linear(*tensors).shape == (0, 20)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_strength_that_the_dtype_cannot_hold_is_refused(dtype) -> None:
    model = tiny_model("llama", dtype)
    locks, ids = two_locks(model), prompts(2).cpu()
    with RequestLocks(model, locks) as request_locks:
        request_locks.assign([0, 1], 2.0)
        before = logits(model, ids)
        with pytest.raises(fastlock.FastlockError, match=r"too large for lock 1.*Give \S+ at most") as refused:
            request_locks.assign([0, 1], [1.0, 1e39 if dtype == torch.float32 else 3e6])
        assert torch.equal(logits(model, ids), before)
        most = float(str(refused.value).split("Give ")[1].split(" ")[0])
        request_locks.assign([-1, 1], most * 0.99)
        y = [locked(torch.zeros(2, 1, locked.weight.shape[1], dtype=dtype)) for *_, locked in request_locks._placed]
        assert torch.stack(y).isfinite().all()
        assert torch.stack(y).abs().max() > torch.finfo(dtype).max / 8


@pytest.mark.parametrize("given", [torch.tensor(2.0), torch.tensor([2.0, 2.0])])
def test_strengths_as_tensors(given) -> None:
    model = tiny_model("llama")
    with RequestLocks(model, two_locks(model)) as request_locks:
        request_locks.assign([0, 1], given)
        assert request_locks._placed[0][3].strength_of_row.tolist() == [2, 2]


def test_a_compiled_model_takes_any_batch_size() -> None:
    """Compiled twice: for the first size, and for whatever size comes."""
    torch._dynamo.reset()
    model = tiny_model("llama", num_hidden_layers=2)
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = prompts(12)
    with RequestLocks(compiled, two_locks(model)) as request_locks:
        for batch in range(2, 13):
            request_locks.assign([i % 3 - 1 for i in range(batch)])
            got, eager = logits(compiled, ids[:batch]), logits(model, ids[:batch])
            torch.testing.assert_close(got, eager, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_freezing_does_not_freeze_the_locks() -> None:
    torch._dynamo.reset()
    model = tiny_model("llama", num_hidden_layers=2)
    ids = prompts(2)
    with (
        RequestLocks(model, two_locks(model)) as request_locks,
        torch._inductor.config.patch(freezing=True),
        torch.no_grad(),
    ):
        compiled = torch.compile(model, fullgraph=True)
        for locks in ([0, 1], [-1, 0]):  # inductor compiles anew for each, which takes long
            request_locks.assign(locks)
            torch.testing.assert_close(logits(compiled, ids), logits(model, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_module(backend) -> None:
    model = tiny_model("llama").to(DEVICE)
    with RequestLocks(model, two_locks(model)) as request_locks, torch.no_grad():
        request_locks.assign([0, 1])
        placed = model.model.layers[0].self_attn.o_proj
        compiled = torch.compile(placed, fullgraph=True, backend=backend)
        x = torch.randn(2, 5, 128, device=DEVICE)
        for locks in ([0, 1], [1, -1], [-1, -1]):
            request_locks.assign(locks)
            torch.testing.assert_close(compiled(x), placed(x))


def test_a_compiled_model() -> None:
    """Assigned again, of another batch size, and without locks again."""
    torch._dynamo.reset()
    model = tiny_model("llama", num_hidden_layers=2).to(DEVICE)
    locks, ids = two_locks(model), prompts()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    plain = logits(compiled, ids)
    with RequestLocks(compiled, locks) as request_locks:
        for batch, assigned, strengths in ((4, ASSIGNED, STRENGTHS), (4, [-1, 0, 0, -1], 3.0), (2, [1, 0], None)):
            request_locks.assign(assigned, strengths)
            got, eager = logits(compiled, ids[:batch]), logits(model, ids[:batch])
            torch.testing.assert_close(got, eager, rtol=1e-4, atol=1e-4)
            assert not torch.allclose(got, plain[:batch], atol=1e-2)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="Observed exception"):
            logits(compiled, ids[:3])
    torch.testing.assert_close(logits(compiled, ids), plain)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_cuda_graph_sees_the_next_assignment(dtype) -> None:
    model = tiny_model("llama", dtype).to(DEVICE)
    ids = prompts(2)
    with RequestLocks(model, two_locks(model)) as request_locks, torch.no_grad():
        request_locks.assign([0, 1])
        placed = model.model.layers[0].self_attn.o_proj
        x = torch.randn(2, 3, 128, device=DEVICE, dtype=dtype)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            placed(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = placed(x)
        for locks in ([0, 1], [-1, 0], [1, -1]):
            request_locks.assign(locks)
            graph.replay()
            assert torch.equal(y, placed(x))
            assert logits(model, ids).isfinite().all()
        placed.weight.data = placed.weight.data.clone()
        with pytest.raises(fastlock.FastlockError, match="capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            placed(x)


@needs_gpu
def test_reduce_overhead_sees_the_next_assignment() -> None:
    model = tiny_model("llama", torch.bfloat16).to(DEVICE)
    ids = prompts(2)
    with RequestLocks(model, two_locks(model)) as request_locks:
        request_locks.assign([0, 1])
        compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
        for locks in ([0, 1], [1, 1], [-1, 0], [0, -1]):
            request_locks.assign(locks)
            got = logits(compiled, ids).clone()
            torch.testing.assert_close(got, logits(model, ids), rtol=0.1, atol=0.1)
