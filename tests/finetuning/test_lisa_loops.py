"""Lisa in a loop of one's own: the pieces, with a GradScaler, clipping, flat partitions and distributed checkpoints."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.utils.data import ConcatDataset, DataLoader

from fastlock.finetuning.alternation import Alternation
from fastlock.finetuning.lisa_schedule import Lisa
from fastlock.finetuning.proximal_adamw import ProximalAdamW
from tests.finetuning.lisa_runs import SAFE_ROWS, USER_ROWS
from tests.helpers.families import same_state, state, tiny_model

SCHEDULE = Lisa(2, 3, 0.5)
STEPS = 9


def small(dtype=torch.float32):
    return tiny_model("llama", dtype, num_hidden_layers=1)


def batches():
    """The batch of each optimizer step, as a DataLoader reads it."""
    sampler = Alternation(len(USER_ROWS), len(SAFE_ROWS), SCHEDULE, batch_size=3)
    loader = DataLoader(ConcatDataset([USER_ROWS, SAFE_ROWS]), batch_size=3, sampler=sampler)
    read = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        read += list(loader)
    return read[:STEPS]


BATCHES = batches()


def loss_of(model, batch):
    return model(input_ids=batch["input_ids"], labels=batch["labels"]).loss


def begin(optimizer, step, schedule=SCHEDULE):
    """What a loop does before a step."""
    if schedule.switches_at(step):
        optimizer.anchor()
    for group in optimizer.param_groups:
        group["pull"] = schedule.pull_at(step)


def trained(model, optimizer, steps=range(STEPS)):
    for step in steps:
        begin(optimizer, step)
        optimizer.zero_grad()
        loss_of(model, BATCHES[step]).backward()
        optimizer.step()
    return model


def expected_of(model, *, clip=None, skipped=()):
    """The same training by torch's AdamW, with the term's gradient added by hand."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    anchor = None
    for step in range(STEPS):
        if step % 5 in (0, 2):
            anchor = [p.detach().clone() for p in model.parameters()]
        if step in skipped:
            continue
        optimizer.zero_grad()
        loss_of(model, BATCHES[step]).backward()
        for parameter, old in zip(model.parameters(), anchor, strict=True):
            parameter.grad += 0.5 * (parameter.detach() - old)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip, foreach=False)
        optimizer.step()
    return model


def optimizer_of(model, **changes):
    return ProximalAdamW(model.parameters(), lr=1e-3, **changes)


def close(model, expected, tolerance=1e-6):
    for (name, got), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance, msg=name)


def test_the_pieces_make_lisa():
    model = small()
    close(trained(model, optimizer_of(model)), expected_of(small()))
    assert not same_state(state(model), state(small()))


def test_clipping_in_the_optimizer_includes_the_term():
    model = small()
    close(trained(model, optimizer_of(model, max_grad_norm=0.5)), expected_of(small(), clip=0.5))


def test_a_grad_scaler_that_skips_a_step_leaves_the_schedule_in_step():
    model = small(torch.float32)
    optimizer = optimizer_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    for step in range(STEPS):
        begin(optimizer, step)
        optimizer.zero_grad()
        scaler.scale(loss_of(model, BATCHES[step])).backward()
        if step == 5:  # a switch, whose first step overflows
            next(model.parameters()).grad[0, 0] = torch.inf
        before = state(model)
        scaler.step(optimizer)
        assert same_state(before, state(model)) == (step == 5)
        scaler.update()
    assert scaler.get_scale() == 2.0**9
    close(model, expected_of(small(), skipped=[5]))


def test_float16_is_pulled_too():
    # fp16 squares overflow from 256 on: the drift is measured in wider numbers.
    weight = torch.nn.Parameter(torch.full((1000,), 300.0, dtype=torch.float16))
    optimizer = ProximalAdamW([weight], lr=1.0, pull=1.0, weight_decay=0.0, state_dtype=torch.float32)
    optimizer.anchor()
    with torch.no_grad():
        weight += 300
    assert optimizer.drift() == pytest.approx(300 * 1000**0.5)
    for _ in range(250):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    assert optimizer.drift() < 150 * 1000**0.5


def test_flat_partitions_as_of_zero_give_the_same_bits():
    whole, cut = small(), small()
    reference = optimizer_of(whole)
    parameters = list(cut.parameters())
    flat = torch.cat([p.detach().flatten() for p in parameters])
    middle = flat.numel() // 2 + 13  # within a tensor
    shards = [torch.nn.Parameter(flat[:middle].clone()), torch.nn.Parameter(flat[middle:].clone())]
    ranks = [ProximalAdamW([shard], lr=1e-3) for shard in shards]
    for step in range(STEPS):
        begin(reference, step)
        reference.zero_grad()
        loss_of(whole, BATCHES[step]).backward()
        gradients = torch.cat([p.grad.flatten() for p in whole.parameters()])
        for optimizer, shard, part in zip(ranks, shards, gradients.split([middle, flat.numel() - middle]), strict=True):
            begin(optimizer, step)
            shard.grad = part.clone()
            optimizer.step()
        reference.step()
        gathered = torch.cat([shard.detach() for shard in shards])
        assert torch.equal(gathered, torch.cat([p.detach().flatten() for p in whole.parameters()]))


def test_a_distributed_checkpoint_goes_on_as_if_never_stopped(tmp_path):
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def training(model, optimizer):
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": moments}

    whole = small()
    optimizer = optimizer_of(whole)
    trained(whole, optimizer, range(4))
    dcp.save(training(whole, optimizer), checkpoint_id=tmp_path / "dcp", no_dist=True)
    trained(whole, optimizer, range(4, STEPS))

    resumed = small()
    again = optimizer_of(resumed)
    again.anchor()  # makes room for the anchor that is loaded
    before = state(resumed)
    held = training(resumed, again)
    assert same_state(before, state(resumed))
    dcp.load(held, checkpoint_id=tmp_path / "dcp", no_dist=True)
    set_state_dict(resumed, again, model_state_dict=held["model"], optim_state_dict=held["optimizer"])
    trained(resumed, again, range(4, STEPS))
    assert same_state(state(resumed), state(whole))
    anchors = [[s["anchor"] for s in o.state.values()] for o in (optimizer, again)]
    assert all(torch.equal(a, b) for a, b in zip(*anchors, strict=True))


def test_bfloat16_weights_with_an_fp32_anchor_are_saved_and_loaded():
    model = small(torch.bfloat16)
    optimizer = optimizer_of(model, anchor_dtype=torch.float32)
    trained(model, optimizer, range(4))
    resumed = small(torch.bfloat16)
    resumed.load_state_dict(model.state_dict())
    again = optimizer_of(resumed, anchor_dtype=torch.float32)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert {s["anchor"].dtype for s in again.state.values()} == {torch.float32}
    trained(model, optimizer, range(4, STEPS))
    trained(resumed, again, range(4, STEPS))
    assert same_state(state(resumed), state(model))
