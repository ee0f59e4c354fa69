"""The fold of many adapters in memory: each row is layer(d) - layer(0) of the adapted layer, in float64."""

import math

import pytest
import torch
from torch import nn

import fastlock
from fastlock.kernels.adapter_fold import launch as kernel
from fastlock.models import resident_adapters
from tests.helpers.families import random_lock, tiny_model

peft = pytest.importorskip("peft")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOCKED = [(0, 1), (0, 3), (2, 0)]
HIDDEN, WIDTH = 64, 128  # of the tiny Llama, whose heads are wider than its hidden size


def adapter(ranks, seed, dtype=torch.float32, hidden=HIDDEN):
    """{layer: (A, B, s)}, random."""
    generator = torch.Generator().manual_seed(seed)
    return {
        layer: (
            (torch.randn(rank, WIDTH, generator=generator) / 8).to(DEVICE, dtype),
            (torch.randn(hidden, rank, generator=generator) / 8).to(DEVICE, dtype),
            0.25 * (seed + 1),
        )
        for layer, rank in ranks.items()
    }


def bare(dtype=torch.float32):
    generator = torch.Generator().manual_seed(77)
    return {layer: torch.randn(HIDDEN, WIDTH, generator=generator).to(DEVICE, dtype) for layer in (0, 2)}


def exact(weight, low_rank, d):
    """The shift of the adapted layer's output, computed as the layer computes: of d, and of nothing."""
    d = d.dense(WIDTH)
    shift = nn.functional.linear(d, weight.cpu().double())
    if low_rank is not None:
        a, b, s = (x.cpu().double() if isinstance(x, torch.Tensor) else x for x in low_rank)
        shift = shift + s * nn.functional.linear(nn.functional.linear(d, a), b)
    return shift


@pytest.fixture(params=["reference", "kernel"])
def launches(request, monkeypatch):
    """How many sites each launch had: by the reference none; by the kernel in Triton's interpreter, or on a GPU."""
    sites: list[int] = []
    if request.param == "kernel":
        pytest.importorskip("triton")
        monkeypatch.setattr(kernel, "runs_on", lambda device: True)
    elif DEVICE == "cuda":
        pytest.skip("on a GPU, the kernel folds")

    def launch(table, _launch=kernel.launch):
        sites.append(len(table.sites))
        _launch(table)

    monkeypatch.setattr(kernel, "launch", launch)
    return sites


def test_every_row_is_the_shift_of_its_adapted_layer(launches, request) -> None:
    """Ranks, scales and layers differ; one adapter leaves a layer alone, one all of them; one is there twice."""
    base, lock = bare(), random_lock(tiny_model("llama"), LOCKED)
    adapters = [adapter({0: 8, 2: 16}, 1), adapter({0: 4}, 2), {}, adapter({1: 4, 2: 3}, 3)]
    adapters += [adapters[0], adapter({2: 40}, 4)]
    found = fastlock.fold_adapters(base, adapters, lock, 3.0)
    displacements = lock.displacement(3.0)
    assert list(found) == [0, 2]
    for layer, rows in found.items():
        assert (rows.shape, rows.dtype, rows.device.type) == ((6, HIDDEN), torch.float32, DEVICE)
        for row, one in zip(rows, adapters, strict=True):
            want = exact(base[layer], one.get(layer), displacements[layer])
            torch.testing.assert_close(row.cpu().double(), want, rtol=0, atol=2e-6 * want.abs().max())
        assert torch.equal(rows[0], rows[4])
        assert not torch.equal(rows[0], rows[1])
    launches.clear()  # of the checks, too
    fastlock.fold_adapters(base, adapters, lock, 3.0)
    # One launch, and one for the rank whose rows are not read 16 bytes at a time.
    assert launches == ([6, 1] if "kernel" in request.node.name else [])


def test_rows_are_rounded_once_to_the_bases_dtype() -> None:
    base, lock = bare(torch.bfloat16), random_lock(tiny_model("llama"), LOCKED)
    adapters = [adapter({0: 8, 2: 8}, seed) for seed in range(3)]
    found = fastlock.fold_adapters(base, adapters, lock, 3.0)
    for layer, rows in found.items():
        want = torch.stack([exact(base[layer], one[layer], lock.displacement(3.0)[layer]) for one in adapters])
        assert rows.dtype == torch.bfloat16
        # The nearest: no neighbour is nearer.
        off = (rows.cpu().double() - want).abs()
        for step in (-1, 1):
            neighbour = (rows.cpu().view(torch.int16) + step).view(torch.bfloat16)
            assert (off <= (neighbour.double() - want).abs() + 1e-12).all()


def peft_model(**settings):
    """A tiny Llama in float64 with LoRAs of its own rank, scale and targets; all of their numbers are random."""
    model = tiny_model("llama", torch.float64)
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["o_proj", "q_proj"], **settings}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**lora), adapter_name="one", autocast_adapter_dtype=False)
    others = {
        "two": peft.LoraConfig(
            r=8, lora_alpha=4, use_rslora=True, target_modules=["o_proj"], rank_pattern={"0.self_attn.o_proj": 3}
        ),
        "three": peft.LoraConfig(r=2, target_modules=["o_proj"], layers_to_transform=[0]),
        "four": peft.LoraConfig(r=2, target_modules=["q_proj"]),
    }
    for name, config in others.items():
        wrapped.add_adapter(name, config, autocast_adapter_dtype=False)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64) / 4
    return wrapped


NAMES = ["one", "two", "three", "four"]


def test_adapters_of_a_peft_model_by_name() -> None:
    """Against PEFT's own forward of each projection, with each adapter active in turn; none has to be."""
    model = peft_model()
    lock = random_lock(model.get_base_model(), LOCKED)
    found = fastlock.fold_adapters(model, [*NAMES, "one"], lock, 2.0)
    displacements = lock.displacement(2.0)
    for number, name in enumerate(NAMES):
        model.set_adapter(name)
        for layer, rows in found.items():
            projection = model.get_base_model().model.layers[layer].self_attn.o_proj
            d = displacements[layer].dense(WIDTH)
            shift = projection(torch.stack([d, torch.zeros_like(d)])).detach()
            torch.testing.assert_close(rows[number], shift[0] - shift[1], rtol=1e-12, atol=1e-12)
    assert all(torch.equal(rows[0], rows[4]) for rows in found.values())
    assert model.active_adapters == ["four"]


def test_a_whole_model_with_the_row_in_its_bias_is_the_unfolded_forward() -> None:
    model = peft_model()
    inner = model.get_base_model()
    lock = random_lock(inner, LOCKED)
    found = fastlock.fold_adapters(model, ["two"], lock, 2.0)
    model.set_adapter("two")
    ids = torch.arange(3, 13)[None]

    def shifted(how):
        hooks = [how(inner.model.layers[layer].self_attn.o_proj, layer) for layer in found]
        with torch.no_grad():
            logits = model(ids).logits
        for hook in hooks:
            hook.remove()
        return logits

    d = {layer: displacement.dense(WIDTH) for layer, displacement in lock.displacement(2.0).items()}
    before = shifted(lambda p, layer: p.register_forward_pre_hook(lambda _, x: (x[0] + d[layer], *x[1:])))
    after = shifted(lambda p, layer: p.register_forward_hook(lambda _, x, y: y + found[layer][0]))
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10)
    assert (after - shifted(lambda p, layer: p.register_forward_hook(lambda *_: None))).abs().max() > 0.01


def test_no_adapters_and_a_base_that_has_a_lock_already() -> None:
    model = tiny_model("llama")
    lock = random_lock(model, LOCKED)
    before = fastlock.fold_adapters(model, [], lock)
    assert {layer: rows.shape for layer, rows in before.items()} == {0: (0, HIDDEN), 2: (0, HIDDEN)}
    alone = fastlock.fold_adapters(model, [{}], lock)
    fastlock.relock(model, lock)
    for layer, rows in fastlock.fold_adapters(model, [{}], lock).items():
        assert torch.equal(rows, alone[layer])
        assert torch.equal(rows[0], model.model.layers[layer].self_attn.o_proj.bias), "of a base without a bias"


def refused(kind, message, adapters, base=None, strength=2.0):
    lock = random_lock(tiny_model("llama"), LOCKED)
    with pytest.raises(kind, match=message) as caught:
        fastlock.fold_adapters(bare() if base is None else base, adapters, lock, strength)
    assert type(caught.value) is kind


A, B = torch.zeros(4, WIDTH), torch.zeros(HIDDEN, 4)


@pytest.mark.parametrize(
    ("kind", "low_rank", "message"),
    [
        (fastlock.MismatchError, (A[:, 1:], B, 1.0), "of another base"),
        (fastlock.MismatchError, (A, B[1:], 1.0), "of another base"),
        (fastlock.MismatchError, (A.t(), B, 1.0), "as PEFT has them"),
        (fastlock.MismatchError, (A[:0], B[:, :0], 1.0), "as PEFT has them"),
        (fastlock.UnsupportedError, (A, B.half(), 1.0), "A is float32 and B float16"),
        (fastlock.UnsupportedError, (A.int(), B.int(), 1.0), "A is int32"),
        (fastlock.DamagedError, (A, B, math.inf), "scale is inf"),
        (fastlock.FastlockError, (A, B), r"adapters\[1\]\[2\] is not \(A, B, s\)"),
        (fastlock.FastlockError, (A, B, "1"), r"is not \(A, B, s\)"),
        (fastlock.FastlockError, (A, B.to("meta"), 1.0), "Move them there"),
    ],
)
@pytest.mark.skipif(DEVICE == "cuda", reason="these are on the CPU")
def test_refuses_adapters_that_do_not_fit(kind, low_rank, message) -> None:
    refused(kind, message, [{}, {2: low_rank}])


def test_refuses_what_is_no_adapter() -> None:
    refused(fastlock.FastlockError, "give a list", {0: (A, B, 1.0)})
    refused(fastlock.FastlockError, "give a list", "one")
    refused(fastlock.FastlockError, r"adapters\[0\] is a int", [5])
    refused(fastlock.FastlockError, "has no adapter 'one': it is no PeftModel", ["one"])
    refused(fastlock.FastlockError, "its adapters are one, two, three, four", ["none"], peft_model())
    refused(fastlock.FastlockError, "strength", [{}], strength=-1.0)


def test_refuses_adapters_of_a_peft_model_that_are_no_plain_lora() -> None:
    dora = peft_model(use_dora=True)
    refused(fastlock.UnsupportedError, "one, model.layers.0.*DoraLinearVariant", ["two", "one"], dora)
    merged = peft_model()
    merged.merge_adapter(["two"])
    refused(fastlock.UnsupportedError, "merged", ["one"], merged)
    other = peft.get_peft_model(tiny_model("llama"), peft.LoHaConfig(r=2, target_modules=["o_proj"]))
    refused(fastlock.UnsupportedError, "peft.tuners.loha", ["default"], other)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_is_not_finite_is_told_of_the_right_one(number, launches) -> None:
    broken = adapter({2: 4}, 1)
    broken[2][1][5, 3] = number
    refused(fastlock.DamagedError, r"^adapters\[1\], base\[2\]: its fold is not finite: its matrices", [{}, broken])
    base = bare()
    base[2][0, :] = number
    refused(
        fastlock.DamagedError, r"^base\[2\]: its fold is not finite: its locked columns", [adapter({2: 4}, 1)], base
    )
    strong = adapter({0: 4}, 1)
    refused(fastlock.FastlockError, "strength is too large", [strong], bare(torch.float16), strength=1e5)
    strong[0] = (*strong[0][:2], 1e38)
    refused(fastlock.FastlockError, r"^adapters\[0\], base\[0\].*strength is too large", [strong], strength=100.0)


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's kernel is spoilt here")
def test_a_kernel_that_is_wrong_is_left_and_the_reference_folds(monkeypatch) -> None:
    pytest.importorskip("triton")
    from fastlock.kernels.ahead_of_time.ways import WAYS

    base, lock = bare(), random_lock(tiny_model("llama"), LOCKED)
    adapters = [adapter({0: 4, 2: 8}, 1)]
    want = fastlock.fold_adapters(base, adapters, lock)
    monkeypatch.setattr(kernel, "runs_on", lambda device: True)
    monkeypatch.setattr(kernel, "_ways", lambda *_: {"jit": lambda arguments, grid: lambda: None})
    WAYS.forget()
    try:
        with pytest.warns(RuntimeWarning, match="is not run by its jit"):
            found = fastlock.fold_adapters(base, adapters, lock)
    finally:
        WAYS.forget()
    for layer, rows in found.items():
        torch.testing.assert_close(rows, want[layer], rtol=1e-6, atol=1e-7)
    assert resident_adapters.fold_adapters is fastlock.fold_adapters
