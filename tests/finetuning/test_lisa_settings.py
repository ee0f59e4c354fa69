"""Lisa's trainer with adapters, in bfloat16, compiled, with workers that read ahead; and how it may not be sharded."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from fastlock.errors import UnsupportedError
from fastlock.finetuning.lisa_schedule import Lisa
from fastlock.finetuning.lisa_trainer import lisa
from tests.finetuning.lisa_runs import (
    SAFE_ROWS,
    USER,
    USER_ROWS,
    Recording,
    Weights,
    arguments,
    lisa_trainer,
    same_optimizer,
)
from tests.helpers.families import same_state, state, tiny_model

SCHEDULE = Lisa(2, 3, 0.5)


def adapted(dtype=torch.float32):
    torch.manual_seed(0)
    return get_peft_model(
        tiny_model("llama", dtype), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    )


def test_with_lora_only_adapters_are_trained_and_anchored(tmp_path):
    weights = Weights()
    model = adapted()
    before = state(model)
    trainer = lisa_trainer(tmp_path, SCHEDULE, model, callbacks=[weights], max_steps=8)
    trainer.train()
    after = state(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert len(changed) == 3 * 2 * 2
    for step, taken in ((4, 2), (6, 5), (7, 7)):
        assert same_state(weights.anchors[step], weights.weights[taken])
        assert all("lora_" in name for name in weights.anchors[step])


def test_with_lora_a_resumed_run_is_as_if_never_stopped(tmp_path):
    whole = lisa_trainer(tmp_path, SCHEDULE, adapted(), save_strategy="steps", save_steps=6)
    whole.train()
    resumed = lisa_trainer(tmp_path, SCHEDULE, adapted())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert same_state(state(resumed.model), state(whole.model))
    assert same_optimizer(resumed.optimizer, whole.optimizer)


def test_bfloat16_weights_move_and_are_resumed(tmp_path):
    def trainer(**changes):
        return lisa_trainer(tmp_path, SCHEDULE, tiny_model("llama", torch.bfloat16), learning_rate=1e-2, **changes)

    whole = trainer(save_strategy="steps", save_steps=7)
    whole.train()
    before = state(tiny_model("llama", torch.bfloat16))
    after = state(whole.model)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert all(not torch.equal(before[name], after[name]) for name in after)
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert same_state(state(resumed.model), after)
    assert same_optimizer(resumed.optimizer, whole.optimizer)


def test_mixed_precision_pulls_fp32_weights(tmp_path):
    weights = Weights()
    trainer = lisa_trainer(tmp_path, SCHEDULE, callbacks=[weights], bf16=True, max_steps=6)
    trainer.train()
    assert {tensor.dtype for tensor in weights.anchors[-1].values()} == {torch.float32}
    assert same_state(weights.anchors[4], weights.weights[2])
    assert trainer.state.log_history[-1]["train_loss"] > 0


def test_a_compiled_model_trains_the_same(tmp_path):
    def trained(**changes):
        trainer = lisa_trainer(tmp_path, SCHEDULE, tiny_model("llama", num_hidden_layers=1), max_steps=4, **changes)
        trainer.train()
        return trainer

    compiled = trained(torch_compile=True, torch_compile_backend="aot_eager")
    assert hasattr(compiled.model_wrapped, "_orig_mod") or hasattr(compiled.model, "_compiled_call_impl")
    plain = trained()
    assert compiled.read == plain.read
    for got, expected in zip(state(compiled.model).values(), state(plain.model).values(), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_that_read_ahead_read_the_same(tmp_path, persistent):
    plain = lisa_trainer(tmp_path, SCHEDULE)
    plain.train()
    trainer = lisa_trainer(tmp_path, SCHEDULE, dataloader_num_workers=1, dataloader_persistent_workers=persistent)
    trainer.train()
    assert trainer.read == plain.read
    assert same_state(state(trainer.model), state(plain.model))


def test_the_last_batch_can_be_dropped(tmp_path):
    trainer = lisa_trainer(tmp_path, SCHEDULE, dataloader_drop_last=True)
    trainer.train()
    user = [row for _, rows in trainer.read for row in rows if row < USER]
    assert len(user) == 2 * (USER - 1)
    assert {len(rows) for _, rows in trainer.read} == {2}


def test_rows_can_come_in_order(tmp_path):
    trainer = lisa_trainer(tmp_path, SCHEDULE, train_sampling_strategy="sequential")
    trainer.train()
    user = [row for _, rows in trainer.read for row in rows if row < USER]
    assert user == [*range(USER)] * 2


def test_the_seed_of_the_data_decides_their_order(tmp_path):
    def read(**changes):
        trainer = lisa_trainer(tmp_path, SCHEDULE, max_steps=2, **changes)
        trainer.train()
        return trainer.read

    assert read(data_seed=1) == read(data_seed=1, seed=5)
    assert read(data_seed=1) != read(data_seed=2)
    assert read(seed=1) != read(seed=2)


class Sharded(Recording):
    """A Trainer that takes itself for one by DeepSpeed, by FSDP1, by FSDP on XLA, or by none of them."""

    by = ""
    is_fsdp_xla_enabled = property(lambda self: self.by == "FSDP on XLA", lambda self, value: None)

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.is_deepspeed_enabled = self.by == "DeepSpeed"
        if self.by == "FSDP1":
            self.accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=1)


@pytest.mark.parametrize("by", ["DeepSpeed", "FSDP1", "FSDP on XLA"])
def test_sharding_that_would_divide_the_anchor_is_refused_before_training(by, tmp_path, monkeypatch):
    def made():
        return lisa(Sharded)(
            tiny_model("llama"),
            arguments(tmp_path),
            train_dataset=USER_ROWS,
            alignment_dataset=SAFE_ROWS,
            lisa=SCHEDULE,
        )

    assert made().train_dataset is not None
    monkeypatch.setattr(Sharded, "by", by)
    with pytest.raises(UnsupportedError, match=f"this training is by {by}.* Use DDP or FSDP2"):
        made()
