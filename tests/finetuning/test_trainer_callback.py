"""Relocking at the end of a Trainer's run."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer
from transformers import TrainerCallback as Callback

import fastlock
from fastlock.errors import FastlockError, MismatchError, UnsupportedError
from fastlock.finetuning.lisa_schedule import Lisa
from fastlock.finetuning.trainer_callback import TrainerCallback
from fastlock.models.unfolded import unfolded
from tests.finetuning.lisa_runs import EVAL_ROWS, USER_ROWS, arguments, lisa_trainer
from tests.helpers.families import logits, random_lock, reload, same_state, state, tiny_model, tokens

LOCK = random_lock(tiny_model("llama"))


def trainer_of(directory, model, callbacks, **changes):
    options = {"max_steps": 3, "optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2} | changes
    return Trainer(
        model, arguments(directory, **options), train_dataset=USER_ROWS, eval_dataset=EVAL_ROWS, callbacks=callbacks
    )


def trained(directory, kind="llama", **changes):
    """The same run without a lock."""
    trainer = trainer_of(directory, tiny_model(kind), [], **changes)
    trainer.train()
    return trainer.model


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_the_trained_model_is_relocked_and_saved_so(tmp_path, kind):
    lock = random_lock(tiny_model(kind))
    callback = TrainerCallback(lock, strength=2.0)
    trainer = trainer_of(tmp_path, tiny_model(kind), [callback])
    trainer.train()
    plain = trained(tmp_path / "plain", kind)
    ids = tokens()
    with unfolded(plain.eval(), lock, 2.0):
        expected = logits(plain, ids)
    torch.testing.assert_close(logits(trainer.model.eval(), ids), expected, rtol=1e-4, atol=1e-4)
    assert callback.receipt.strength == 2.0
    assert callback.receipt.lock_digest == lock.digest
    trainer.save_model(str(tmp_path / "saved"))
    loaded = reload(tmp_path / "saved").eval()
    assert torch.equal(logits(loaded, ids), logits(trainer.model, ids))
    assert fastlock.verify(tmp_path / "saved", lock)
    fastlock.unlock(trainer.model)
    assert same_state(state(trainer.model), state(plain))


def test_checkpoints_hold_no_lock_and_can_be_resumed(tmp_path):
    whole = trainer_of(tmp_path, tiny_model("llama"), [TrainerCallback(LOCK)], max_steps=4)
    whole.train()
    for step in (2, 4):
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}")
        assert saved.config.attention_bias is False
        assert not any(name.endswith("o_proj.bias") for name in saved.state_dict())
    unlocked = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert same_state(state(unlocked), state(trained(tmp_path / "plain", max_steps=4)))
    resumed = trainer_of(tmp_path / "resumed", tiny_model("llama"), [TrainerCallback(LOCK)], max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same_state(state(resumed.model), state(whole.model))
    assert fastlock.verify(resumed.model, LOCK)


def test_the_best_model_is_what_is_relocked(tmp_path):
    trainer = lisa_trainer(
        tmp_path,
        Lisa(1, 1, 0.5),
        callbacks=[TrainerCallback(LOCK)],
        eval_dataset=EVAL_ROWS,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
    )
    trainer.train()
    best = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    fastlock.relock(best, LOCK)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert same_state(state(trainer.model), state(best))


def test_a_second_run_begins_without_the_lock(tmp_path):
    callback = TrainerCallback(LOCK)
    trainer = trainer_of(tmp_path, tiny_model("llama"), [callback])
    trainer.train()
    trainer.train()
    assert fastlock.verify(trainer.model, LOCK)
    fastlock.unlock(trainer.model)
    twice = trainer_of(tmp_path / "twice", tiny_model("llama"), [])
    twice.train()
    twice.train()
    assert same_state(state(trainer.model), state(twice.model))


class Stop(Callback):
    def on_step_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def test_an_interrupted_run_leaves_no_lock(tmp_path):
    callback = TrainerCallback(LOCK)
    trainer = trainer_of(tmp_path, tiny_model("llama"), [callback, Stop()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert callback.receipt is None
    assert not any(name.endswith("o_proj.bias") for name in trainer.model.state_dict())


def adapted(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))


def relocked(model):
    fastlock.relock(model, LOCK)
    return model


@pytest.mark.parametrize(
    ("model", "lock", "error", "message"),
    [
        (lambda: tiny_model("llama"), random_lock(tiny_model("llama"), [(7, 0)]), MismatchError, "layer 7"),
        (
            lambda: adapted(tiny_model("llama")),
            LOCK,
            UnsupportedError,
            "PeftModel trains adapters",
        ),
        (lambda: relocked(tiny_model("llama")), LOCK, FastlockError, "is relocked, and training would change"),
        (
            lambda: tiny_model("mistral", sliding_window=4),
            random_lock(tiny_model("mistral")),
            UnsupportedError,
            "sliding",
        ),
    ],
)
def test_what_would_fail_at_the_end_fails_before_training(tmp_path, model, lock, error, message):
    model = model()
    before = state(model)
    trainer = trainer_of(tmp_path, model, [TrainerCallback(lock)])
    with pytest.raises(error, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    assert same_state(state(model), before)
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("arguments", "message"), [(("lock",), "lock is"), ((LOCK, -1.0), "strength"), ((LOCK, float("nan")), "strength")]
)
def test_a_lock_and_a_strength_are_asked_for(arguments, message):
    with pytest.raises(FastlockError, match=message):
        TrainerCallback(*arguments)
