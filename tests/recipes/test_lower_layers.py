"""The layers below the first one that is trained are run once, and change nothing."""

from __future__ import annotations

import contextlib
from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastlock.recipes.lessons import Row, log_probabilities
from fastlock.recipes.lower_layers import LowerLayers

ROWS = [Row([5, 9, 2, 7, 4], 2), Row([3, 8, 6], 1), Row([1, 2, 3, 4, 5, 6, 7], 4)]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize("first", [0, 1, 3])
def test_a_pass_that_begins_higher_says_the_same(model: LlamaForCausalLM, first: int) -> None:
    whole = log_probabilities(model, ROWS)
    below = LowerLayers(model, first)
    states = below.read(ROWS)
    run: list[int] = []
    handles = [
        layer.self_attn.register_forward_hook(lambda *_, n=n: run.append(n))
        for n, layer in enumerate(model.model.layers)
    ]
    again = log_probabilities(model, ROWS, partial(below.skipped, states))
    for handle in handles:
        handle.remove()
    assert run == list(range(first, 4))
    assert torch.allclose(again, whole, rtol=0, atol=1e-6)  # log_softmax is of float32
    assert torch.equal(log_probabilities(model, ROWS), whole)
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)


def test_rows_may_be_put_together_otherwise_than_they_were_read(model: LlamaForCausalLM) -> None:
    below = LowerLayers(model, 2)
    states = [below.read([row])[0] for row in reversed(ROWS)]
    again = log_probabilities(model, ROWS[::-1], partial(below.skipped, states))
    assert torch.allclose(again, log_probabilities(model, ROWS[::-1]), rtol=0, atol=1e-6)


def test_what_all_rows_begin_with_is_left_to_the_cache(model: LlamaForCausalLM) -> None:
    begin = list(range(1, 13))
    rows = [Row([*begin, 5, 9, 2], 2), Row([*begin, 3, 8, 6, 7], 1)]
    shared: list[int] = []
    below = LowerLayers(model, 2)
    states = below.read(rows)

    def beginning(count: int) -> contextlib.AbstractContextManager[None]:
        shared.append(count)
        return below.skipped(states, count)

    again = log_probabilities(model, rows, beginning)
    assert shared == [12]
    assert torch.allclose(again, torch.cat([log_probabilities(model, [row]) for row in rows]), rtol=0, atol=1e-6)


def test_gradients_reach_what_is_trained(model: LlamaForCausalLM) -> None:
    below = LowerLayers(model, 2)
    log_probabilities(model, ROWS, partial(below.skipped, below.read(ROWS))).sum().backward()
    weights = [layer.self_attn.o_proj.weight for layer in model.model.layers]
    assert [weight.grad is not None for weight in weights] == [False, False, True, True]
    model.zero_grad()


def test_a_layer_that_somebody_wrapped_is_wrapped_again(model: LlamaForCausalLM) -> None:
    layer = model.model.layers[0]
    layer.forward = own = layer.forward
    below = LowerLayers(model, 2)
    with below.skipped(below.read(ROWS)):
        assert layer.forward is not own
    assert layer.__dict__["forward"] is own
    del layer.forward


def test_what_is_not_plain_is_run_whole(model: LlamaForCausalLM) -> None:
    below = LowerLayers(model, 2)
    again = log_probabilities(model, ROWS, partial(below.skipped, [None] * 3))
    assert torch.equal(again, log_probabilities(model, ROWS))
    handle = model.model.layers[1].register_forward_hook(lambda _module, _args, output: output + 0)
    assert below.read(ROWS)[0] is not None
    handle.remove()
