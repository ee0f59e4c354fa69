"""Lisa on two ranks, in processes of their own: DDP and FSDP2 through the Trainer, and FSDP2 in a loop."""

import socket
from collections import Counter

import pytest
import torch

from tests.finetuning.lisa_runs import SAFE_ROWS, USER, USER_ROWS, LisaRecording, arguments
from tests.finetuning.run_on_ranks import LOSSES
from tests.finetuning.test_lisa_loops import BATCHES, SCHEDULE, STEPS, begin, loss_of, optimizer_of, small
from tests.helpers.families import same_state, state, tiny_model
from tests.helpers.ranks import run_on_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks found."""
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
    return run_on_ranks(
        out,
        "tests.finetuning.run_on_ranks",
        lambda rank: [],
        lambda rank: shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        timeout=900,
        weights_only=False,
    )


def rows_of_steps(ranks, key="read"):
    steps = {}
    for rank in ranks:
        for step, rows in rank["ddp"][key]:
            steps.setdefault(step, []).extend(rows)
    return steps


def test_ddp_mixes_no_states_and_loses_no_row(ranks):
    assert [rank["ddp"]["wrapped"] for rank in ranks] == ["DistributedDataParallel"] * 2
    steps = rows_of_steps(ranks)
    # 21 rows in steps of 8: 3 steps an epoch on the user's data, the last of them filled up to 8 rows; 9 in all.
    assert sorted(steps) == list(range(9 + 2 * 3))
    assert {len(rows) for rows in steps.values()} == {8}
    for step, rows in steps.items():
        assert {row >= USER for row in rows} == {step % 5 < 2}
    user = [step for step in sorted(steps) if step % 5 >= 2]
    for epoch in range(3):
        uses = Counter(row for step in user[3 * epoch : 3 * epoch + 3] for row in steps[step])
        assert set(uses) == set(range(USER))
        assert sum(uses.values()) == USER + 3


def test_ddp_keeps_both_ranks_alike(ranks):
    one, other = (rank["ddp"] for rank in ranks)
    assert same_state(one["weights"], other["weights"])
    assert same_state(*one["anchors"])
    assert same_state(one["anchors"][0], other["anchors"][0])
    assert one["drift"] == other["drift"] != []


def test_ddp_logs_the_mean_loss_of_each_state_over_the_ranks(ranks):
    micro = [rank["ddp"]["micro losses"] for rank in ranks]
    per_step = 2
    for step, (loss, user, alignment) in enumerate(ranks[0]["ddp"]["losses"][:15]):
        own = [sum(losses[step * per_step : (step + 1) * per_step]) for losses in micro]
        of_state, other = (alignment, user) if step % 5 < 2 else (user, alignment)
        assert of_state == pytest.approx(sum(own) / 2, rel=1e-5)
        assert of_state == pytest.approx(loss, rel=1e-5)
        assert other is None
    assert LOSSES == ("loss", "user_loss", "alignment_loss")


def test_ddp_resumes_in_a_later_epoch_as_if_never_stopped(ranks):
    for rank in ranks:
        assert rank["ddp"]["resumed"] == [(step, rows) for step, rows in rank["ddp"]["read"] if step >= 8]
        assert same_state(rank["ddp"]["resumed weights"], rank["ddp"]["weights"])


def test_two_ranks_train_as_one_process_with_twice_the_accumulation(ranks, tmp_path):
    trainer = LisaRecording(
        tiny_model("llama"),
        arguments(tmp_path, num_train_epochs=1, gradient_accumulation_steps=4),
        train_dataset=USER_ROWS[:16],
        alignment_dataset=SAFE_ROWS,
        lisa=SCHEDULE,
    )
    trainer.train()
    losses = [entry.get("loss") for entry in trainer.state.log_history]
    assert ranks[0]["even"]["losses"][:-1] == pytest.approx(losses[:-1], rel=1e-4)
    for name, got in ranks[0]["even"]["weights"].items():
        torch.testing.assert_close(got, state(trainer.model)[name], rtol=0, atol=2e-5, msg=name)


def test_fsdp2_trains_as_a_single_process(ranks):
    model = small()
    optimizer = optimizer_of(model)
    drifts = []
    for step in range(STEPS):
        begin(optimizer, step)
        optimizer.zero_grad()
        loss_of(model, BATCHES[step]).backward()
        optimizer.step()
        drifts.append(optimizer.drift())
    for rank in ranks:
        assert rank["fsdp"]["sharded"]
        assert rank["fsdp"]["drift"] == pytest.approx(drifts, rel=1e-4)
        for name, expected in model.named_parameters():
            torch.testing.assert_close(rank["fsdp"]["weights"][name], expected.detach(), rtol=0, atol=1e-5, msg=name)


def test_fsdp2_resumes_from_a_distributed_checkpoint_as_if_never_stopped(ranks):
    for rank in ranks:
        assert same_state(rank["fsdp"]["resumed"], rank["fsdp"]["weights"])


@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_the_trainers_fsdp2_trains_as_a_single_process_and_resumes(kind, ranks, tmp_path):
    trainer = LisaRecording(
        tiny_model("llama"),
        arguments(tmp_path, num_train_epochs=2, gradient_accumulation_steps=4),
        train_dataset=USER_ROWS[:16],
        alignment_dataset=SAFE_ROWS,
        lisa=SCHEDULE,
    )
    trainer.train()
    expected = state(trainer.model)
    drifts, losses = ([e[name] for e in trainer.state.log_history if name in e] for name in ("drift", "loss"))
    for rank in ranks:
        found = rank["trainer's fsdp"][kind]
        assert found["sharded"] == found["anchors"] == {"DTensor"}
        assert found["drift"] == pytest.approx(drifts, rel=1e-3)
        assert found["losses"] == pytest.approx(losses, rel=1e-3)
        for name, got in found["weights"].items():
            torch.testing.assert_close(got, expected[name], rtol=0, atol=5e-5, msg=name)
        assert same_state(found["resumed"], found["weights"])
        assert found["resumed drift"] == found["drift"]
