"""Locks with a gate on models in memory: what is written, what it computes, and that nothing is left of it."""

import copy
import hashlib
import pickle
import sys
from collections.abc import Callable

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from torch import nn
from torch.nn.utils import parametrize, prune

import fastlock
from fastlock.models.sites import Site, sites
from fastlock.models.unfolded import unfolded
from tests.helpers.families import gated_lock, logits, random_lock, same_state, state, tiny_model, tokens


def rewritten(model: nn.Module, lock: fastlock.Lock, strength: float) -> dict[int, torch.Tensor]:
    """W + s (W U) Vᵀ of each locked layer, [hidden, width] float64, by dense matrices over all heads."""
    found = {}
    for site in sites(model):
        width = site.num_heads * site.head_dim
        readers, writers = (torch.zeros(width, lock.rank, dtype=torch.float64) for _ in range(2))
        for layer, head, v, u in zip(lock.layers, lock.heads, lock.readers, lock.writers, strict=True):
            if layer == site.layer:
                readers[head * site.head_dim : (head + 1) * site.head_dim] = v.double().T
                writers[head * site.head_dim : (head + 1) * site.head_dim] = u.double().T
        if readers.any():
            weight = site.weight.double()
            found[site.layer] = weight + strength * (weight @ writers) @ readers.T
    return found


def weight_of(model: nn.Module, layer: int) -> torch.Tensor:
    return sites(model)[layer].weight


def is_rounding_of(found: torch.Tensor, exact: torch.Tensor) -> bool:
    """Within half a unit in the last place, and what two float64 sums in other orders differ by."""
    unit = torch.exp2(exact.abs().clamp(min=torch.finfo(found.dtype).tiny).log2().floor())
    return bool(((found.double() - exact).abs() <= unit * torch.finfo(found.dtype).eps / 2 + 1e-13).all())


@pytest.mark.parametrize("constant", [True, False], ids=["both", "gate"])
@pytest.mark.parametrize("model_type", ["gpt2", "opt", "gpt_neox"])
def test_a_relocked_model_is_the_unfolded_one(model_type: str, constant: bool) -> None:
    """In families whose norms do not round to float32."""
    model, ids = tiny_model(model_type, torch.float64), tokens()
    lock, before, plain = gated_lock(model, constant=constant), state(model), logits(model, ids)
    with unfolded(model, lock, 1.5):
        truth = logits(model, ids)
    receipt = fastlock.relock(model, lock, 1.5)
    assert (truth - plain).abs().max() > 0.1
    torch.testing.assert_close(logits(model, ids), truth, rtol=0, atol=1e-12)
    assert (receipt.rank, receipt.constant) == (2, constant)
    fastlock.unlock(model)
    assert same_state(state(model), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_locked_columns_are_written_rounded_once_and_no_others(model_type: str, dtype: torch.dtype) -> None:
    model = tiny_model(model_type, dtype)
    lock, before = gated_lock(model), state(model)
    exact = rewritten(model, lock, 0.75)
    originals = {layer: weight_of(model, layer).clone() for layer in range(3)}
    fastlock.relock(model, lock, 0.75)
    heads = {0: [1, 3], 1: [], 2: [2]}
    for layer, original in originals.items():
        locked = torch.zeros(original.shape[1], dtype=torch.bool)
        for head in heads[layer]:
            locked[head * lock.head_dim : (head + 1) * lock.head_dim] = True
        found = weight_of(model, layer)
        assert torch.equal(found[:, ~locked], original[:, ~locked])
        if heads[layer]:
            assert is_rounding_of(found[:, locked], exact[layer][:, locked])
            assert not torch.equal(found[:, locked], original[:, locked])
    fastlock.unlock(model)
    assert same_state(state(model), before)


def test_the_constant_goes_through_the_original_weights() -> None:
    """b = c + s W d with the W of before, when the gate is there already, too."""
    model, other = tiny_model("opt", torch.bfloat16), tiny_model("opt", torch.bfloat16)
    lock = gated_lock(model)
    for _ in range(2):
        fastlock.relock(model, lock, 2.0)
    fastlock.relock(other, random_lock(other), 2.0)
    for layer in (0, 2):
        assert torch.equal(sites(model)[layer].bias, sites(other)[layer].bias)


def test_the_weight_stays_the_same_tensor_and_torch_counts_the_writes() -> None:
    model = tiny_model("gpt2")
    lock, parameter = gated_lock(model, constant=False), sites(model)[0].module.weight
    address, version, names = parameter.data_ptr(), parameter._version, state(model).keys()
    fastlock.relock(model, lock)
    fastlock.relock(model, lock, 0.5)
    assert sites(model)[0].module.weight is parameter
    assert parameter.data_ptr() == address
    assert parameter._version > version
    assert parameter.requires_grad
    assert parameter.is_leaf
    assert state(model).keys() == names, "what is kept is not saved"


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_relocking_starts_from_the_original_columns(model_type: str) -> None:
    model = tiny_model(model_type)
    before = state(model)
    locks = [
        gated_lock(model, [(0, 1), (1, 0)]),
        random_lock(model, [(0, 1)], seed=4),
        gated_lock(model, [(1, 3), (1, 0), (2, 2)], seed=9, rank=3, constant=False),
        gated_lock(model, [(1, 0), (0, 2)], seed=5),
    ]
    for lock, strength in zip(locks, (1.0, 6.0, 0.0, 2.0), strict=True):
        fresh = tiny_model(model_type)
        fastlock.relock(model, lock, strength)
        fastlock.relock(fresh, lock, strength)
        assert same_state(state(model), state(fresh))
        assert fastlock.verify(model, lock) if strength else True
    fastlock.unlock(model)
    assert same_state(state(model), before)


def test_strength_zero_changes_nothing() -> None:
    model = tiny_model("llama", torch.bfloat16)
    before = state(model)
    fastlock.relock(model, gated_lock(model, constant=False), 0.0)
    assert same_state(state(model), before)


def test_relocked_brings_the_earlier_lock_back() -> None:
    model = tiny_model("opt")
    first, second = gated_lock(model), gated_lock(model, [(1, 0), (0, 1)], seed=5, constant=False)
    plain = state(model)
    fastlock.relock(model, first, 2.0)
    before = state(model)
    with fastlock.relocked(model, second, 3.0):
        assert fastlock.verify(model, second).strength == 3.0
    assert same_state(state(model), before)
    assert fastlock.verify(model, first)
    with pytest.raises(ZeroDivisionError), fastlock.relocked(model, random_lock(model)):
        raise ZeroDivisionError
    assert same_state(state(model), before)
    fastlock.unlock(model)
    assert same_state(state(model), plain)


def check_as_before(models: list[nn.Module], before: list[dict[str, torch.Tensor]], locks: list[fastlock.Lock]) -> None:
    """After an error: every weight is as it was, and the models can be relocked."""
    assert all(same_state(state(model), earlier) for model, earlier in zip(models, before, strict=True))
    fastlock.relock_many(models, locks, 2.0)
    assert all(fastlock.verify(model, lock) for model, lock in zip(models, locks, strict=True))


@pytest.mark.parametrize("locked_before", [False, True])
def test_an_error_part_way_leaves_all_models_as_they_were(locked_before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail after each single weight that is written, or written back."""
    module = sys.modules["fastlock.models.columns"]
    write = module.write_columns
    for failing in range(8 if locked_before else 4):
        models = [tiny_model("llama"), tiny_model("phi", torch.bfloat16, head_dim=32, hidden_size=128)]
        if locked_before:
            fastlock.relock_many(models, [gated_lock(model, seed=8) for model in models], 1.0)
        before, classes, done = [state(model) for model in models], [type(model) for model in models], 0
        locks = [gated_lock(model, [(0, 1), (2, 0)]) for model in models]

        def failing_late(site: Site, heads: object, columns: torch.Tensor, failing: int = failing) -> None:
            nonlocal done
            write(site, heads, columns)
            done += 1
            if done == failing + 1:
                raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr(module, "write_columns", failing_late)
            with pytest.raises(MemoryError):
                fastlock.relock_many(models, locks, 2.0)
        assert [type(model) for model in models] == classes
        check_as_before(models, before, locks)


@pytest.mark.parametrize("locked_before", [False, True])
def test_an_interrupted_fold_writes_to_no_weight(locked_before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module, done = sys.modules["fastlock.gate_fold"], 0
    models = [tiny_model(model_type, torch.bfloat16) for model_type in ("llama", "gpt2")]
    locks = [gated_lock(model) for model in models]
    if locked_before:
        fastlock.relock_many(models, locks, 1.0)
    before = [state(model) for model in models]

    def interrupted(site: object, rewrite: Callable[[object], bool] = module.rewrite) -> bool:
        nonlocal done
        rewrite(site)
        done += 1
        if done == 3:
            raise KeyboardInterrupt
        return True

    with monkeypatch.context() as patch:
        patch.setattr(module, "rewrite", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fastlock.relock_many(models, locks, 2.0)
    check_as_before(models, before, locks)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_what_is_kept_lies_as_the_weight_does_and_stays_where_it_is(model_type: str) -> None:
    """Bit for bit, the sign of a zero included; and relocked once more, the original columns are not copied again."""
    model = tiny_model(model_type, torch.bfloat16)
    lock, site = gated_lock(model, constant=False), sites(model)[2]
    site.weight[3, 2 * lock.head_dim] = -0.0
    of_head = slice(2 * lock.head_dim, 3 * lock.head_dim)  # the one head that is locked there
    before, unlocked = site.weight[:, of_head].clone(), state(model)
    fastlock.relock(model, lock, 1.0)
    original, placed = site.module.fastlock_original_columns, site.module.fastlock_placed_columns
    assert same_state({"": original.contiguous()}, {"": before})
    assert torch.equal(placed, site.weight[:, of_head])
    transposed = site.weight.stride(1) != 1
    assert [kept.stride(1) != 1 for kept in (original, placed)] == [transposed] * 2 == [model_type == "gpt2"] * 2
    fastlock.relock(model, lock, 2.0)
    assert site.module.fastlock_original_columns.data_ptr() == original.data_ptr()
    assert site.module.fastlock_placed_columns.data_ptr() not in (original.data_ptr(), placed.data_ptr())
    fastlock.unlock(model)
    assert same_state(state(model), unlocked)


def test_the_receipt_has_digests_of_what_was_read_and_written() -> None:
    model = tiny_model("gpt2", torch.bfloat16)
    lock = gated_lock(model)

    def digest() -> str:
        parts = [(0, [1, 3]), (2, [2])]
        of_site = [
            torch.cat([weight_of(model, layer)[:, head * 16 : head * 16 + 16] for head in heads], dim=1).contiguous()
            for layer, heads in parts
        ]
        return hashlib.sha256(
            b"".join(hashlib.sha256(c.view(torch.int16).numpy().tobytes()).digest() for c in of_site)
        ).hexdigest()

    read = digest()
    receipt = fastlock.relock(model, lock)
    again = fastlock.relock(model, lock, 2.0)
    written = again.to_dict()
    assert (written["weights_digest"], written["written_digest"]) == (read, digest())
    with pytest.raises(fastlock.FastlockError, match="changed since"):
        receipt.to_dict()
    alone = fastlock.relock(model, gated_lock(model, constant=False))
    assert alone.biases_digest == hashlib.sha256().hexdigest()
    assert copy.deepcopy(again).to_dict() == written


def test_a_weight_that_was_changed_since_is_not_overwritten() -> None:
    model = tiny_model("llama")
    lock = gated_lock(model, constant=False)
    fastlock.relock(model, lock)
    with torch.no_grad():
        sites(model)[2].module.weight[5, 2 * 32 + 7] += 1
    trained = state(model)
    for change in (fastlock.unlock, lambda model: fastlock.relock(model, lock)):
        with pytest.raises(fastlock.DamagedError, match=r"layers\.2\.self_attn\.o_proj\.weight was changed since"):
            change(model)
    assert same_state(state(model), trained)
    verification = fastlock.verify(model, lock)
    assert (verification.state, verification.altered) == ("altered", (2,))
    assert "weights that the gate does not give" in verification.reason


@pytest.mark.parametrize("constant", [True, False], ids=["both", "gate"])
def test_what_was_there_before_may_be_loaded_over_a_gate(constant: bool) -> None:
    """It is no change that could be lost."""
    model, once = tiny_model("opt"), tiny_model("opt")
    lock, before = gated_lock(model, constant=constant), state(model)
    fastlock.relock(once, lock, 2.0)
    for _ in range(2):
        fastlock.relock(model, lock, 2.0)
        assert same_state(state(model), state(once))
        model.load_state_dict(before)
    with pytest.raises(fastlock.DamagedError, match="changed since"), fastlock.relocked(model, lock):
        raise AssertionError  # as nothing could be put back afterwards and still be called the earlier lock
    assert same_state(state(model), before)
    fastlock.unlock(model)
    with fastlock.relocked(model, lock):
        model.load_state_dict(before)
    assert same_state(state(model), before)
    assert fastlock.verify(model, lock).state == "not locked"


def parametrized(module: nn.Module) -> None:
    class Same(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 1.0 * weight

    parametrize.register_parametrization(module, "weight", Same())


@pytest.mark.parametrize(
    ("hide", "message", "show"),
    [
        (lambda module: prune.identity(module, "weight"), "not a parameter", lambda m: prune.remove(m, "weight")),
        (parametrized, "not a plain linear layer", lambda m: parametrize.remove_parametrizations(m, "weight")),
        (lambda module: cpu_offload(module, torch.device("cpu")), "no weights in memory", remove_hook_from_module),
    ],
    ids=["pruned", "parametrized", "offloaded"],
)
def test_a_gate_is_not_taken_out_of_a_weight_that_nobody_can_write_to(
    hide: Callable[[nn.Module], None], message: str, show: Callable[[nn.Module], None]
) -> None:
    model, ids = tiny_model("llama"), tokens()
    lock, plain = gated_lock(model, constant=False), logits(model, ids)
    plan = fastlock.Plan([model], lock)
    plan.relock()
    locked, module = logits(model, ids), sites(model)[2].module
    hide(module)
    for change in (fastlock.unlock, lambda model: fastlock.relock(model, lock, 2.0), lambda _: plan.relock()):
        with pytest.raises(fastlock.UnsupportedError, match=message):
            change(model)
    assert torch.equal(logits(model, ids), locked)
    show(module)
    fastlock.unlock(model)
    assert torch.equal(logits(model, ids), plain)


def test_a_projection_that_was_replaced_since_is_told() -> None:
    model = tiny_model("llama")
    fastlock.relock(model, gated_lock(model, constant=False))
    attention = model.model.layers[0].self_attn
    attention.o_proj = nn.Linear(128, 64, bias=False)
    with pytest.raises(fastlock.DamagedError, match=r"layers\.0\.self_attn\.o_proj was replaced since"):
        fastlock.unlock(model)


def test_what_is_kept_moves_with_the_model() -> None:
    model, half = tiny_model("opt"), tiny_model("opt").bfloat16()
    lock, before = gated_lock(model), state(half)
    fastlock.relock(model, lock)
    twin = copy.deepcopy(model)
    model.bfloat16()
    assert fastlock.verify(model, lock)
    fastlock.unlock(model)
    assert same_state(state(model), before)
    fastlock.unlock(twin)
    assert same_state(state(twin), state(tiny_model("opt")))


def test_models_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = tiny_model("gpt2")
        lock, before = gated_lock(model, constant=False), state(model)
    exact = rewritten(model, lock, 6.0)
    fastlock.relock(model, lock, 6.0)
    assert is_rounding_of(weight_of(model, 0)[:, 16:32], exact[0][:, 16:32])
    fastlock.unlock(model)
    assert same_state(state(model), before)


def tied(model: nn.Module) -> None:
    layers = model.model.layers
    layers[1].self_attn.o_proj.weight = layers[0].self_attn.o_proj.weight


def shared(model: nn.Module) -> None:
    layers = model.model.layers
    layers[1].self_attn.o_proj.weight = nn.Parameter(layers[0].self_attn.o_proj.weight.detach())


def expanded(model: nn.Module) -> None:
    layer = model.model.layers[0]
    layer.self_attn.o_proj.weight = nn.Parameter(torch.randn(64, 1).expand(64, 128))


def on_meta(model: nn.Module) -> None:
    model.model.layers[0].self_attn.o_proj.to("meta")


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (tied, r"layers\.0\.self_attn\.o_proj\.weight shares its memory with model\.layers\.1.*adapter of the lock"),
        (shared, r"layers\.0\.self_attn\.o_proj\.weight shares its memory with model\.layers\.1"),
        (expanded, r"layers\.0\.self_attn\.o_proj\.weight is expanded"),
        (on_meta, "no weights in memory"),
    ],
)
def test_weights_that_cannot_be_written_are_refused(alter: Callable[[nn.Module], None], message: str) -> None:
    model = tiny_model("llama")
    alter(model)
    before = state(model)
    with pytest.raises(fastlock.UnsupportedError, match=message):
        fastlock.relock(model, gated_lock(model))
    assert not hasattr(model, "_fastlock")
    if alter is not on_meta:
        assert same_state(state(model), before)


def test_memory_that_two_models_share_takes_one_gate() -> None:
    first = tiny_model("llama")
    second = copy.deepcopy(first)
    for own, other in zip(sites(first), sites(second), strict=True):
        other.module.weight = nn.Parameter(own.module.weight.detach())
    lock, before = gated_lock(first), state(first)
    with pytest.raises(fastlock.UnsupportedError, match="shares its memory with .* another of these models"):
        fastlock.relock_many([first, second], lock)
    assert same_state(state(first), before)
    fastlock.relock(first, lock)
    for late in (lock, random_lock(first)):
        with pytest.raises(fastlock.UnsupportedError, match="holds a gate already"):
            fastlock.relock(second, late)
    fastlock.unlock(first)
    assert same_state(state(first), before)
    fastlock.relock(second, lock)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_memory_that_a_copy_shares_takes_one_gate(copied: Callable[[nn.Module], nn.Module]) -> None:
    """The copy of a relocked model, which nobody relocked, and a third one over its memory."""
    model, third = tiny_model("llama"), tiny_model("llama")
    lock, unlocked = gated_lock(model), state(model)
    fastlock.relock(model, lock)
    twin = copied(model)
    for own, other in zip(sites(third), sites(twin), strict=True):
        own.module.weight = nn.Parameter(other.module.weight.detach())
    before = state(third)
    for late in (lock, random_lock(third)):
        with pytest.raises(fastlock.UnsupportedError, match="holds a gate already"):
            fastlock.relock(third, late)
    assert same_state(state(third), before)
    fastlock.unlock(twin)
    assert same_state(state(third), unlocked)
    fastlock.relock(third, lock)


def test_adapters_take_no_gate() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["o_proj"], r=2, init_lora_weights=False)
    model = tiny_model("llama")
    lock, before = gated_lock(model), state(model)
    copies = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["o_proj"], r=2)
    for adapters in (config, copies):
        adapted = peft.get_peft_model(copy.deepcopy(model), adapters)
        with pytest.raises(fastlock.UnsupportedError, match="is quantised or adapted.*adapter of the lock"):
            fastlock.relock(adapted, lock)
    fastlock.relock(model, lock)
    around = peft.get_peft_model(model, config)
    for refused in (lambda: fastlock.relock(around, random_lock(model)), lambda: fastlock.verify(around, lock)):
        with pytest.raises(fastlock.UnsupportedError, match="adapters were put around"):
            refused()
    fastlock.unlock(around)
    assert same_state(state(around.unload()), before)


def test_what_verify_finds() -> None:
    model = tiny_model("gpt2", torch.bfloat16)
    lock = gated_lock(model)
    assert fastlock.verify(model, lock).state == "not locked"
    assert "no receipt" in fastlock.verify(model, lock).reason
    fastlock.relock(model, lock, 1.5)
    found = fastlock.verify(model, lock)
    assert (found.state, found.strength, found.layers) == ("locked", 1.5, (0, 2))
    assert "another lock" in fastlock.verify(model, gated_lock(model, seed=2)).reason
    assert "another lock" in fastlock.verify(model, random_lock(model)).reason
    with torch.no_grad():
        sites(model)[0].bias[3] += 1
    assert fastlock.verify(model, lock).altered == (0,)
