"""Lisa in transformers' Trainer: what is read, what is trained, what is logged, and what is refused.

Each fault of the authors' code has its test: counting micro-batches and losing user rows (`every_user_row`), the term
in the loss (`holds_no_term`), free steps that end anywhere (`free_steps`), names and shards (`test_lisa_ranks`),
forgetting on resume (`never_stopped`), a loader per micro-step (`one_loader`), the token counts of another batch
(`fed_its_batches`), the other snapshot (`authors_loop`), fp16 norms (`test_lisa_loops`), and no user steps
(`test_lisa_schedule`).
"""

from collections import Counter

import pytest
import torch
import transformers
from torch.utils.data import IterableDataset
from transformers import Trainer

from fastlock.errors import FastlockError, UnsupportedError
from fastlock.finetuning.lisa_schedule import Lisa
from fastlock.finetuning.lisa_trainer import lisa
from tests.finetuning.lisa_runs import (
    EVAL_ROWS,
    SAFE,
    SAFE_ROWS,
    USER,
    USER_ROWS,
    LisaRecording,
    Recording,
    Weights,
    arguments,
    lisa_trainer,
    same_optimizer,
)
from tests.helpers.families import same_state, state, tiny_model

ALL_ROWS = USER_ROWS + SAFE_ROWS


def naive(model, batches, schedule, *, learning_rate, weight_decay, steps, clip=None):
    """The authors' loop, without its faults: two snapshots, counters, and the term's gradient; the plain losses.

    The snapshots are those of the authors: one of the weights at the end of either state, the one of the state that is
    left being pulled to. `batches` are the micro-batches of each step.
    """
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, foreach=False)
    state, left = "alignment", schedule.alignment_steps
    snapshots = {"alignment": None, "user": [p.detach().clone() for p in model.parameters()]}
    other = {"alignment": "user", "user": "alignment"}
    losses = []
    for step in range(steps):
        if not left:
            snapshots[state] = [p.detach().clone() for p in model.parameters()]
            state = other[state]
            left = schedule.alignment_steps if state == "alignment" else schedule.user_steps
        optimizer.zero_grad()
        tokens = sum((labels[:, 1:] != -100).sum() for _, labels in batches[step])
        total = 0.0
        for ids, labels in batches[step]:
            logits = model(ids).logits[:, :-1].float()  # as transformers' loss does
            loss = torch.nn.functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), reduction="sum"
            )
            (loss / tokens).backward()
            total += loss.item() / tokens.item()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for parameter, anchor in zip(model.parameters(), snapshots[other[state]], strict=True):
            parameter.grad += schedule.pull * (parameter.detach() - anchor)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / steps)
        optimizer.step()
        losses.append(total)
        left -= 1
    return losses


def micro_batches(trainer):
    """What a recording trainer read: of each step, its micro-batches of tokens and labels."""
    steps = {}
    for step, rows in trainer.read:
        ids, labels = (torch.stack([ALL_ROWS[row][key] for row in rows]) for key in ("input_ids", "labels"))
        steps.setdefault(step, []).append((ids, labels))
    return [steps[step] for step in sorted(steps)]


@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_authors_loop_agrees(tmp_path, clip):
    schedule = Lisa(3, 7, 0.5)
    trainer = lisa_trainer(
        tmp_path, schedule, tiny_model("llama", torch.float64), max_steps=30, max_grad_norm=clip or 0.0
    )
    trainer.train()
    model = tiny_model("llama", torch.float64)
    losses = naive(model, micro_batches(trainer), schedule, learning_rate=1e-3, weight_decay=0.01, steps=30, clip=clip)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    torch.testing.assert_close(torch.tensor(logged), torch.tensor(losses), rtol=1e-5, atol=0)  # the Trainer sums fp32
    for (name, expected), got in zip(model.named_parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9, msg=name)


def test_without_pull_each_step_is_that_of_a_trainer_fed_its_batches(tmp_path):
    one = lisa_trainer(tmp_path, Lisa(2, 3, 0.0), weight_decay=0.0)
    one.train()
    read = [rows for _, rows in one.rows_of_steps().items()]
    steps = len(read)
    fed = [ALL_ROWS[row] for rows in read if len(rows) == 4 for row in rows]
    # The last step of an epoch is smaller; up to there, a plain Trainer reads the same batches.
    full = next(i for i, rows in enumerate(read) if len(rows) < 4)
    other = Recording(
        tiny_model("llama"),
        arguments(
            tmp_path,
            max_steps=full,
            optim="adamw_torch",
            train_sampling_strategy="sequential",
            weight_decay=0.0,
            lr_scheduler_type="constant",
        ),
        train_dataset=fed,
    )
    other.train()
    again = lisa_trainer(tmp_path, Lisa(2, 3, 0.0), weight_decay=0.0, max_steps=full, lr_scheduler_type="constant")
    again.train()
    assert 5 < full < steps
    assert again.losses == other.losses
    assert same_state(state(again.model), state(other.model))


def test_no_alignment_steps_and_no_pull_are_a_plain_trainer(tmp_path):
    options = {"max_grad_norm": 1.0, "warmup_steps": 2, "eval_strategy": "epoch", "per_device_eval_batch_size": 4}
    model = tiny_model("llama", attention_dropout=0.1)
    plain = Recording(
        tiny_model("llama", attention_dropout=0.1),
        arguments(tmp_path, optim="adamw_torch", **options),
        train_dataset=USER_ROWS,
        eval_dataset=EVAL_ROWS,
    )
    plain.train()
    trainer = LisaRecording(
        model, arguments(tmp_path, **options), train_dataset=USER_ROWS, eval_dataset=EVAL_ROWS, lisa=Lisa(0, 1, 0.0)
    )
    trainer.train()
    assert trainer.read == plain.read
    assert trainer.losses == plain.losses
    assert same_state(state(trainer.model), state(plain.model))
    for entry, expected in zip(trainer.state.log_history, plain.state.log_history, strict=True):
        for key in ("loss", "eval_loss", "grad_norm", "learning_rate", "epoch", "step"):
            assert entry.get(key) == expected.get(key)


def test_every_user_row_once_an_epoch(tmp_path):
    trainer = lisa_trainer(tmp_path, Lisa(2, 3, 1.0), num_train_epochs=3)
    trainer.train()
    steps = trainer.rows_of_steps()
    assert list(steps) == list(range(trainer.state.global_step))
    user = [row for step in sorted(steps) for row in steps[step] if row < USER]
    assert [sorted(user[epoch * USER : (epoch + 1) * USER]) for epoch in range(3)] == [list(range(USER))] * 3
    safe = Counter(row for rows in steps.values() for row in rows if row >= USER)
    assert set(safe) == set(range(USER, USER + SAFE))
    for step, rows in steps.items():
        assert {row >= USER for row in rows} == {step % 5 < 2}
    # 6 steps an epoch on the user's data: 18 steps, and 2 before each 3 of them.
    assert trainer.state.max_steps == trainer.state.global_step == 18 + 2 * 6
    assert trainer.state.epoch == 3
    ends = [entry["epoch"] for entry in trainer.state.log_history if "loss" in entry]
    assert [ends.index(epoch) + 1 for epoch in (1.0, 2.0, 3.0)] == [10, 20, 30]


def test_the_anchor_is_taken_at_each_switch_and_kept_between(tmp_path):
    weights = Weights()
    trainer = lisa_trainer(tmp_path, Lisa(2, 3, 1.0, free_steps=3), callbacks=[weights], max_steps=12)
    trainer.train()
    switches = [0, 2, 5, 7, 10]
    for step, (now, anchor) in enumerate(zip(weights.weights, weights.anchors, strict=True)):
        taken = max(switch for switch in switches if switch <= step)
        assert same_state(anchor, weights.weights[taken])
        assert same_state(now, anchor) == (step in switches)
    after = [*weights.weights[1:], {name: p.detach() for name, p in trainer.model.named_parameters()}]
    for entry in trainer.state.log_history[:12]:
        step = entry["step"] - 1
        moved = [(after[step][name] - weights.anchors[step][name]).double().norm() for name in after[step]]
        assert entry["drift"] == pytest.approx(float(torch.stack(moved).norm()), rel=1e-5)


def test_free_steps_are_free_until_a_switch(tmp_path):
    def trained(schedule, steps):
        trainer = lisa_trainer(tmp_path, schedule, max_steps=steps, lr_scheduler_type="constant")
        trainer.train()
        return state(trainer.model)

    free = Lisa(2, 3, 5.0, free_steps=3)  # in the first user state, which ends before step 5
    assert same_state(trained(free, 6), trained(Lisa(2, 3, 0.0), 6))  # the first pull, from the anchor itself, is 0
    assert not same_state(trained(free, 7), trained(Lisa(2, 3, 0.0), 7))
    assert not same_state(trained(Lisa(2, 3, 5.0), 3), trained(Lisa(2, 3, 0.0), 3))


def test_the_loss_of_each_state_is_logged_and_holds_no_term(tmp_path):
    trainer = lisa_trainer(tmp_path, Lisa(2, 3, 1e4), logging_steps=4, max_steps=12)
    trainer.train()
    step_losses = {}
    for (step, _), loss in zip(trainer.read, trainer.losses, strict=True):
        step_losses[step] = step_losses.get(step, 0.0) + loss
    for entry in trainer.state.log_history[:3]:
        steps = range(entry["step"] - 4, entry["step"])
        for name, in_alignment in (("alignment_loss", True), ("user_loss", False)):
            expected = [step_losses[step] for step in steps if (step % 5 < 2) == in_alignment]
            assert entry[name] == pytest.approx(sum(expected) / len(expected))
        assert entry["loss"] == pytest.approx(sum(step_losses[step] for step in steps) / 4)
        assert entry["loss"] < 20  # a term of this pull would be in the thousands
    assert "drift" in trainer.state.log_history[0]


def test_a_state_without_steps_has_no_loss(tmp_path):
    trainer = lisa_trainer(tmp_path, Lisa(2, 3, 0.0), logging_steps=2, max_steps=4)
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert "alignment_loss" in first
    assert "user_loss" not in first
    assert "user_loss" in second
    assert "alignment_loss" not in second
    assert "drift" not in first  # there is no anchor without a pull


def test_evaluation_knows_nothing_of_the_pull(tmp_path):
    trainer = lisa_trainer(
        tmp_path, Lisa(2, 3, 1e4), max_steps=4, eval_strategy="steps", eval_steps=4, eval_dataset=EVAL_ROWS
    )
    trainer.train()
    plain = Trainer(trainer.model, arguments(tmp_path), eval_dataset=EVAL_ROWS)
    logged = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert logged == plain.evaluate()["eval_loss"]


# Within the alignment state, at a switch, at the end of the first epoch, within the third, at the very end.
@pytest.mark.parametrize("stop", [1, 2, 10, 23, 28])
def test_a_resumed_run_is_as_if_never_stopped(tmp_path, whole, stop):
    weights = Weights()
    resumed = run(tmp_path, callbacks=[weights])
    resumed.train(resume_from_checkpoint=str(whole.args.output_dir + f"/checkpoint-{stop}"))
    assert resumed.read == [(step, rows) for step, rows in whole.read if step >= stop]
    assert same_state(state(resumed.model), state(whole.model))
    assert same_optimizer(resumed.optimizer, whole.optimizer)
    assert resumed.state.global_step == whole.state.global_step == 28


def run(directory, **changes):
    model = tiny_model("llama", attention_dropout=0.2)  # with random numbers that must go on, too
    return lisa_trainer(directory, Lisa(2, 4, 0.5), model, num_train_epochs=3, **changes)  # of 10, 8 and 10 steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never stopped, with a checkpoint after each step."""
    trainer = run(tmp_path_factory.mktemp("whole"), save_strategy="steps", save_steps=1)
    trainer.train()
    return trainer


def test_one_loader_is_made_and_its_length_is_that_of_an_epoch(tmp_path, monkeypatch):
    made = []
    get = LisaRecording.get_train_dataloader
    monkeypatch.setattr(LisaRecording, "get_train_dataloader", lambda self: made.append(get(self)) or made[-1])
    trainer = lisa_trainer(tmp_path, Lisa(2, 3, 0.5), num_train_epochs=2)
    trainer.train()
    assert len(made) == 1
    assert len(trainer.accelerator._dataloaders) == 1


def test_half_an_epoch_can_be_trained(tmp_path):
    trainer = lisa_trainer(tmp_path, Lisa(2, 3, 0.5), num_train_epochs=0.5)
    trainer.train()
    # 3 of the 6 steps on the user's data, and the 2 before them.
    assert trainer.state.global_step == 5


def test_a_checkpoint_without_an_anchor_is_refused(tmp_path):
    trainer = lisa_trainer(tmp_path, Lisa(2, 3, 0.5), save_strategy="steps", save_steps=3, save_only_model=True)
    trainer.train()
    resumed = lisa_trainer(tmp_path, Lisa(2, 3, 0.5))
    with pytest.raises(FastlockError, match="step 3 pulls to an anchor, and the checkpoint .* has none"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    weights = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    assert same_state(state(resumed.model), state(weights))


def test_a_second_training_starts_over(tmp_path):
    trainer = lisa_trainer(tmp_path, Lisa(2, 3, 0.5), max_steps=4)
    trainer.train()
    first = trainer.rows_of_steps()
    trainer.read.clear()
    trainer.train()
    assert trainer.rows_of_steps() == first


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    trainer = lisa_trainer(
        tmp_path,
        Lisa(2, 3, 0.5),
        eval_dataset=EVAL_ROWS,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="epoch_number",
        num_train_epochs=2,
    )
    # The first of two evaluations is the better one.
    scores = iter([2.0, 1.0])
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *args, **kwargs: {**evaluate(*args, **kwargs), "eval_epoch_number": next(scores)}
    trainer.args.greater_is_better = True
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-10")
    best = transformers.AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert same_state(state(trainer.model), state(best))


def test_other_settings_of_the_optimizer_are_taken(tmp_path):
    from fastlock.finetuning.proximal_adamw import ProximalAdamW

    trainer = LisaRecording(
        tiny_model("llama"),
        arguments(tmp_path, max_steps=1),
        train_dataset=USER_ROWS,
        alignment_dataset=SAFE_ROWS,
        lisa=Lisa(1, 1, 0.5),
        optimizer_cls_and_kwargs=(ProximalAdamW, {"lr": 0.5, "betas": (0.5, 0.75)}),
    )
    trainer.train()
    assert {group["betas"] for group in trainer.optimizer.param_groups} == {(0.5, 0.75)}
    assert {group["pull"] for group in trainer.optimizer.param_groups} == {0.5}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(USER_ROWS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lisa": None}, "lisa is a NoneType; give a schedule"),
        ({"lisa": {"pull": 1.0}}, "lisa is a dict"),
        ({"alignment_dataset": None}, "alignment_steps is 2, and there is no alignment_dataset"),
        ({"alignment_dataset": []}, "the alignment dataset has no rows"),
        ({"train_dataset": []}, "the user's dataset has no rows"),
        ({"train_dataset": None}, "there is no train_dataset"),
        ({"alignment_dataset": Stream()}, "alignment_dataset is a Stream, which has no length"),
        ({"train_dataset": Stream()}, "train_dataset is a Stream"),
        ({"optimizers": (torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), None)}, "the optimizer was given"),
        ({"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}, "not a ProximalAdamW"),
        ({"optim": "adafactor"}, "optim is 'adafactor'"),
        ({"optim_args": "eps=1"}, "optim_args 'eps=1'"),
        ({"train_sampling_strategy": "group_by_length"}, "'group_by_length', which would mix"),
        ({"ignore_data_skip": True}, "ignore_data_skip is set"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches is set"),
    ],
)
def test_what_does_not_go_with_lisa_is_refused_before_training(tmp_path, changes, message):
    given = {"train_dataset": USER_ROWS, "alignment_dataset": SAFE_ROWS, "lisa": Lisa(2, 3, 1.0)}
    of_trainer = {"lisa", "alignment_dataset", "train_dataset", "optimizers", "optimizer_cls_and_kwargs"}
    given |= {key: value for key, value in changes.items() if key in of_trainer}
    others = {"max_steps": 3} | {key: value for key, value in changes.items() if key not in of_trainer}
    model = tiny_model("llama")
    before = state(model)
    with pytest.raises(FastlockError, match=message):
        lisa(Trainer)(model, arguments(tmp_path, **others), **given)
    assert same_state(state(model), before)


@pytest.mark.parametrize(("trainer", "named"), [(int, "int"), (None, "a NoneType"), ("Trainer", "a str")])
def test_what_is_no_trainer_class_is_refused(trainer, named):
    with pytest.raises(FastlockError, match=f"trainer is {named}; give a class"):
        lisa(trainer)


def test_a_trainer_itself_is_no_class(tmp_path):
    with pytest.raises(FastlockError, match="trainer is a Trainer; give a class"):
        lisa(Trainer(tiny_model("llama"), arguments(tmp_path)))


def test_a_trainer_that_prepares_its_data_otherwise_is_refused():
    class Preferences(Trainer):
        def _prepare_dataset(self, dataset, args):
            return dataset

    with pytest.raises(UnsupportedError, match="Preferences: how it prepares its datasets is not known"):
        lisa(Preferences)


def test_it_is_made_once():
    made = lisa(Trainer)
    assert made.__name__ == "LisaTrainer"
    assert issubclass(made, Trainer)
    assert lisa(made) is made
