"""Freezing: every tensor of the band, and no other; thawing; and what is refused before anything is changed."""

import copy
import gc
import hashlib
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import fastlock
from fastlock.errors import FastlockError, MismatchError, UnsupportedError
from tests.helpers.families import CONFIGS, gated_lock, random_lock, tiny_gemma3, tiny_model, tokens


def digests(model: nn.Module) -> dict[str, str]:
    return {
        name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in model.state_dict().items()
    }


def trained(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def train(model: nn.Module, steps: int = 3, **options: Any) -> None:
    """Some steps of AdamW, with a weight decay that moves whatever it may."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, **options)
    for step in range(steps):
        ids = tokens(seed=step)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


def test_the_band_stays_bit_for_bit_and_the_rest_is_trained(tmp_path) -> None:
    model = tiny_model("llama", num_hidden_layers=5)
    before = digests(model)
    frozen = fastlock.freeze(model, fastlock.Band(1, 3))
    train(model)
    model.save_pretrained(tmp_path)
    after = digests(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto"))
    band = {name for name in before if name.startswith(("model.layers.1.", "model.layers.2.", "model.layers.3."))}
    assert band == set(frozen.trained)
    assert {"model.layers.1.input_layernorm.weight", "model.layers.3.post_attention_layernorm.weight"} <= band
    assert {name for name in before if before[name] == after[name]} == band
    assert frozen.parameters == sum(model.state_dict()[name].numel() for name in band)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_every_family_is_frozen_and_thawed(kind) -> None:
    model = tiny_model(kind)
    before = trained(model)
    layers = {name for name in before if ".1." in name.replace(".experts.1.", "")}
    frozen = fastlock.freeze(model, fastlock.Band(1, 1, model_type=kind))
    assert set(frozen.trained) == {name for name in layers if name.startswith(f"{frozen.path}.1.")}
    assert frozen.trained, kind
    assert {name for name, is_trained in trained(model).items() if not is_trained and before[name]} <= set(
        frozen.trained
    )
    assert not any(trained(model)[name] for name in frozen.trained)
    fastlock.thaw(model)
    assert trained(model) == before


def test_thawing_gives_back_exactly_what_was_trained() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.requires_grad_(False)
    model.model.embed_tokens.requires_grad_(False)
    before = trained(model)
    fastlock.freeze(model, fastlock.Band(0, 1))
    assert trained(model) != before
    fastlock.thaw(model)
    assert trained(model) == before
    with pytest.raises(FastlockError, match="no band of it is frozen"):
        fastlock.thaw(model)


def test_an_earlier_gradient_cannot_move_the_band() -> None:
    model = tiny_model("llama")
    ids = tokens()
    model(ids, labels=ids).loss.backward()
    frozen = fastlock.freeze(model, fastlock.Band(1, 1))
    before = digests(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  # of all parameters, as people write it
    optimizer.step()
    after = digests(model)
    assert all(after[name] == before[name] for name in frozen.trained)
    assert after["model.norm.weight"] != before["model.norm.weight"]


def test_gradients_still_flow_through_the_band() -> None:
    model = tiny_model("llama")
    fastlock.freeze(model, fastlock.Band(1, 2))
    ids = tokens()
    model(ids, labels=ids).loss.backward()
    assert model.model.layers[0].mlp.down_proj.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.model.layers[1].parameters())


def test_a_copy_keeps_what_was_frozen() -> None:
    model = tiny_model("llama")
    before = trained(model)
    fastlock.freeze(model, fastlock.Band(0, 0))
    copied = copy.deepcopy(model)
    fastlock.thaw(copied)
    assert trained(copied) == before
    assert trained(model) != before


def test_a_compiled_model_is_frozen_and_compiled_anew() -> None:
    model = tiny_model("llama")
    compiled = torch.compile(model, backend="eager")
    ids = tokens()
    compiled(ids, labels=ids).loss.backward()
    assert model.model.layers[1].mlp.down_proj.weight.grad is not None
    model.zero_grad()
    frozen = fastlock.freeze(compiled, fastlock.Band(1, 1))
    compiled(ids, labels=ids).loss.backward()
    assert all(parameter.grad is None for parameter in model.model.layers[1].parameters())
    assert model.model.layers[0].mlp.down_proj.weight.grad is not None
    assert "model.layers.1.mlp.down_proj.weight" in frozen.trained
    fastlock.thaw(compiled)
    compiled(ids, labels=ids).loss.backward()
    assert model.model.layers[1].mlp.down_proj.weight.grad is not None


def test_the_decoder_of_a_model_that_sees_is_meant() -> None:
    model = tiny_gemma3()
    frozen = fastlock.freeze(model, fastlock.Band(0, 0))
    assert frozen.path == "model.language_model.layers"
    assert all(parameter.requires_grad for parameter in model.model.vision_tower.parameters())


class DistributedDataParallel(nn.Module):
    """Of the name by which a wrapper is known, without its processes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [DistributedDataParallel, nn.DataParallel], ids=["DDP", "DataParallel"])
def test_wrapped_models_are_refused(wrap) -> None:
    model = tiny_model("llama")
    before = trained(model)
    with pytest.raises(UnsupportedError, match=f"{wrap.__name__}.*before it is wrapped"):
        fastlock.freeze(wrap(model), fastlock.Band(0, 0))
    assert trained(model) == before


def test_a_sharded_model_is_refused(tmp_path) -> None:
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.fsdp import fully_shard

    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = tiny_model("llama")
        fully_shard(model.model.layers[0])
        fully_shard(model)
        with pytest.raises(UnsupportedError, match="FSDP.*before it is wrapped"):
            fastlock.freeze(model, fastlock.Band(0, 0))
        assert all(trained(model).values())
    finally:
        destroy_process_group()


def test_a_model_with_adapters_is_refused() -> None:
    import peft

    model = tiny_model("llama")
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    before = trained(tuned)
    with pytest.raises(UnsupportedError, match="lora_outside"):
        fastlock.freeze(tuned, fastlock.Band(0, 0))
    assert trained(tuned) == before


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD], ids=["AdamW", "SGD"])
def test_a_parameter_that_an_optimizer_holds_is_refused(make) -> None:
    model = tiny_model("llama")
    optimizer = make(model.parameters(), lr=0.1)
    with pytest.raises(FastlockError, match=rf"optimizer \({make.__name__}\) already holds model\.layers\.1\."):
        fastlock.freeze(model, fastlock.Band(1, 1))
    assert all(trained(model).values())
    del optimizer
    fastlock.freeze(model, fastlock.Band(1, 1))


def test_an_optimizer_of_the_rest_is_no_obstacle_and_one_that_is_gone_neither() -> None:
    model = tiny_model("llama")
    rest = torch.optim.AdamW(model.model.layers[0].parameters(), lr=0.1)
    gone = torch.optim.AdamW(model.parameters(), lr=0.1)
    gone.itself = gone  # only the garbage collector can take it away
    gc.disable()
    try:
        del gone
        fastlock.freeze(model, fastlock.Band(1, 2))
    finally:
        gc.enable()
    assert len(rest.param_groups) == 1


@pytest.mark.parametrize(
    ("band", "error", "said"),
    [
        (fastlock.Band(2, 3), MismatchError, r"\[2, 3\] lies outside.*3 layers, 0 to 2"),
        (fastlock.Band(0, 1, 32), MismatchError, "layers 32"),
        (fastlock.Band(0, 1, 3, "gemma"), MismatchError, "model_type gemma"),
        ((0, 1), FastlockError, "the band is tuple"),
        (None, FastlockError, "no band stands out"),
    ],
)
def test_bands_of_other_models_are_refused(band, error, said) -> None:
    model = tiny_model("llama")
    with pytest.raises(error, match=said):
        fastlock.freeze(model, band)
    assert all(trained(model).values())


def test_a_second_band_is_refused() -> None:
    model = tiny_model("llama")
    fastlock.freeze(model, fastlock.Band(0, 0))
    with pytest.raises(FastlockError, match=r"\[0, 0\] is frozen already.*thaw"):
        fastlock.freeze(model, fastlock.Band(1, 1))
    assert trained(model)["model.layers.1.mlp.up_proj.weight"]


@pytest.mark.parametrize("make", [random_lock, gated_lock])
def test_a_relocked_model_is_refused(make) -> None:
    """A lock is folded from what training would change, and could not be taken out again."""
    model = tiny_model("llama")
    before = trained(model)
    fastlock.relock(model, make(model), 1.0)
    with pytest.raises(FastlockError, match=r"is relocked, and training would change.*fastlock\.unlock\(model\)"):
        fastlock.freeze(model, fastlock.Band(0, 0))
    fastlock.unlock(model)
    assert trained(model) == before
    assert fastlock.freeze(model, fastlock.Band(0, 0)).parameters


def test_families_without_a_plain_list_are_refused() -> None:
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    )
    with pytest.raises(UnsupportedError, match="one plain list.*has 2 lists of 2 layers"):
        fastlock.freeze(t5, fastlock.Band(0, 0))
    albert = transformers.AlbertForMaskedLM(
        transformers.AlbertConfig(
            vocab_size=32,
            embedding_size=8,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=8,
        )
    )
    with pytest.raises(UnsupportedError, match="one plain list.*has 0 lists"):
        fastlock.freeze(albert, fastlock.Band(0, 0))


def test_shared_parameters_are_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    with pytest.raises(UnsupportedError, match=r"layers\.1 and model\.layers\.2 share a parameter"):
        fastlock.freeze(model, fastlock.Band(1, 1))
    model = tiny_model("llama")
    model.model.norm.weight = model.model.layers[1].input_layernorm.weight
    with pytest.raises(UnsupportedError, match=r"model\.norm\.weight is also a parameter of model\.layers\.1"):
        fastlock.freeze(model, fastlock.Band(0, 0))


def test_what_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="Linear is not a transformers model"):
        fastlock.freeze(nn.Linear(2, 2), fastlock.Band(0, 0))


def test_modules_that_were_replaced_cannot_be_thawed() -> None:
    model = tiny_model("llama")
    fastlock.freeze(model, fastlock.Band(1, 1))
    model.model.layers[1].mlp = nn.Identity()
    with pytest.raises(FastlockError, match=r"layers\.1\.mlp.*no longer there \(3 in all\)"):
        fastlock.thaw(model)


def test_the_trainer_leaves_the_band_alone(tmp_path) -> None:
    model = tiny_model("llama")
    frozen = fastlock.freeze(model, fastlock.Band(1, 1))
    before = digests(model)
    rows = [{"input_ids": tokens(seed=seed)[0], "labels": tokens(seed=seed)[0]} for seed in range(8)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, learning_rate=1e-2, weight_decay=0.1, report_to=[], save_strategy="no", use_cpu=True
    )
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    after = digests(model)
    assert {name for name in before if before[name] == after[name]} == set(frozen.trained)
