"""Counts of ranges: scaled as by hand, replayed as computed, and the weights come back bit for bit."""

import copy
import sys
from typing import Any

import pytest
import torch
from torch import nn

from fastlock.errors import UnsupportedError
from fastlock.finetuning import over_refusal, scaling
from fastlock.finetuning.decoder_layers import decoder_layers
from fastlock.finetuning.over_refusal import UNSCALED, OverRefusal, apart, count_of, paired_test
from fastlock.finetuning.scaling import check_scalable, scaled, scaled_weights
from fastlock.inference.batching import no_progress
from fastlock.inference.generation import evaluating, generate
from tests.helpers.families import CONFIGS, same_state, state, tiny_model

ROWS = [[5, 6, 7], [9, 10, 11, 12, 13, 14, 15], [8, 20], [33, 34, 35, 36]]
SCALE = 1.3


class Numbers:
    """A tokenizer whose answers are their tokens."""

    pad_token_id, eos_token_id = 0, 2

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return [" ".join(map(str, row)) for row in rows]


class Texts:
    """A judge that keeps what it was shown; its verdict is a function of all of the answer."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, _prompt: str, answer: str) -> bool:
        self.seen.append(answer)
        return sum(map(int, answer.split())) % 2 == 0


def asking(model: Any, judge: Any, batch_size: int = 3) -> OverRefusal:
    return OverRefusal(
        *(model, Numbers(), decoder_layers(model), ["a", "b", "c", "d"], ROWS, judge, 6, batch_size, no_progress)
    )


def by_hand(model: Any, first: int, last: int) -> list[str]:
    """The answers of a copy whose weights were multiplied once and for all."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer in decoder_layers(other).layers[first : last + 1] if first >= 0 else ():
            for parameter in layer.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(SCALE)
    with evaluating(other):
        batches = ([0, 2, 3], [1])  # of like lengths, as they are asked
        answers = {}
        for batch in batches:
            ordered = sorted(batch, key=lambda row: len(ROWS[row]))
            texts = generate(other, Numbers(), [ROWS[row] for row in ordered], 6)
            answers |= dict(zip(ordered, texts, strict=True))
    return [answers[row] for row in range(4)]


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_every_range_answers_as_a_scaled_copy_does(kind) -> None:
    """In every family, replayed layers and all: prefill, cache and what follows."""
    model = tiny_model(kind)
    before = state(model)
    for name, ranges in (
        ("growing", [(1, 1), (1, 2)]),
        ("shrinking", [(2, 2), (1, 2), (0, 2)]),
        ("each", [(1, 1), (2, 2)]),
        ("unscaled", [UNSCALED]),
    ):
        judge = Texts()
        asked = asking(model, judge)
        arguments = {"growing": (1, SCALE), "shrinking": (2, SCALE), "each": (ranges, SCALE), "unscaled": ()}[name]
        verdicts = getattr(asked, name)(*arguments)
        assert list(verdicts) == ranges
        expected = [by_hand(model, *one) for one in ranges]
        assert judge.seen == [text for texts in expected for text in texts]
        fresh = Texts()
        assert list(verdicts.values()) == [tuple(fresh("", text) for text in texts) for texts in expected]
    assert same_state(state(model), before)
    assert not any("forward" in layer.__dict__ or layer._forward_hooks for layer in decoder_layers(model).layers)


def test_the_layers_below_a_range_are_computed_once() -> None:
    """Layer 0 reads each batch once for all ranges; without replaying, once more for each."""
    model = tiny_model("llama", num_hidden_layers=5)
    computed = [0] * 5

    def counting(number: int, compute: Any) -> Any:
        def forward(hidden: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
            computed[number] += hidden.shape[1] > 1  # a whole batch, not the next token
            return compute(hidden, *arguments, **keywords)

        return forward

    for number, layer in enumerate(model.model.layers):
        layer.forward = counting(number, layer.forward)
    asking(model, Texts(), 4).growing(2, SCALE)
    # Recorded once; then the range's last layer is the first that is computed: (2,2), (2,3), (2,4).
    assert computed == [1, 1, 2, 3, 4]
    computed[:] = [0] * 5
    asking(model, Texts(), 4).shrinking(3, SCALE)
    # Recorded once below 3; then ranges that begin with 3, 2, 1, 0.
    assert computed == [2, 3, 4, 5, 5]
    assert all("counting" in layer.forward.__qualname__ for layer in model.model.layers)


def test_families_that_were_not_checked_are_computed_anew(monkeypatch) -> None:
    model = tiny_model("llama")
    replayed, computed = Texts(), Texts()
    asking(model, replayed).growing(1, SCALE)
    monkeypatch.setattr(over_refusal, "FAMILIES", {})
    monkeypatch.setattr(over_refusal, "recording", _one_layer_only(over_refusal.recording))
    asking(model, computed).growing(1, SCALE)
    assert replayed.seen == computed.seen


def _one_layer_only(recording: Any) -> Any:
    def checked(layers: Any) -> Any:
        assert len(layers) == 1, "what lies below a range was recorded"
        return recording(layers)

    return checked


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scaling_restores_every_bit_and_writes_to_none(dtype) -> None:
    model = tiny_model("llama", dtype)
    layer = model.model.layers[1]
    before = state(model)
    addresses = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    versions = {name: parameter._version for name, parameter in model.named_parameters()}
    with scaled(layer, 1.15):
        for name, parameter in layer.named_parameters():
            old = before[f"model.layers.1.{name}"]
            expected = old if parameter.dim() == 1 else (old.double() * 1.15).to(dtype)
            assert torch.allclose(parameter.double(), expected.double(), rtol=torch.finfo(dtype).eps, atol=1e-6)
            assert parameter.dim() == 1 or not torch.equal(parameter, old)
    assert same_state(state(model), before)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == addresses
    assert {name: parameter._version for name, parameter in model.named_parameters()} == versions


def test_dividing_again_would_not_restore_bfloat16() -> None:
    """Why the bytes are kept."""
    weight = tiny_model("llama", torch.bfloat16).model.layers[0].mlp.up_proj.weight.data
    assert not torch.equal((weight * 1.15) / 1.15, weight)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt], ids=["an error", "Ctrl-C"])
def test_a_judge_that_fails_leaves_the_weights(error) -> None:
    model = tiny_model("llama")
    before = state(model)
    seen = []

    def judge(_prompt: str, _answer: str) -> bool:
        seen.append(1)
        raise error

    with pytest.raises(error):
        asking(model, judge).growing(0, SCALE)
    assert seen
    assert same_state(state(model), before)


def test_an_interruption_at_any_line_leaves_the_weights() -> None:
    """Ctrl-C while the weights are changed or put back: at each line of the module, and in generation."""
    model = tiny_model("llama")
    before = state(model)
    total = _lines(model, None)
    assert total > 20
    for stop in range(total):
        with pytest.raises(KeyboardInterrupt):
            _lines(model, stop)
        assert same_state(state(model), before), stop


def _lines(model: nn.Module, stop: int | None) -> int:
    """How many lines of `scaled` run while a range is counted; KeyboardInterrupt at one of them."""
    count = 0

    def trace(frame: Any, event: str, _argument: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename != scaling.__file__ or frame.f_code.co_name != "scaled":
            return None
        if event == "line":
            count += 1
            if count - 1 == stop:
                raise KeyboardInterrupt
        return trace

    asked = OverRefusal(*(model, Numbers(), decoder_layers(model), ["a"], ROWS[:1], Texts(), 1, 1, no_progress))
    sys.settrace(trace)
    try:
        asked.each([(1, 1)], SCALE)
    finally:
        sys.settrace(None)
    return count


def test_weights_that_cannot_be_scaled_are_refused() -> None:
    def layer(parameter: nn.Parameter) -> nn.Module:
        module = nn.Module()
        module.weight = parameter
        return module

    check_scalable(layer(nn.Parameter(torch.zeros(2, 2))), "layer")
    for parameter, said in (
        (
            nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False),
            "layer.weight is torch.uint8.*quantised",
        ),
        (nn.Parameter(torch.zeros(2, 2).to(torch.float8_e4m3fn), requires_grad=False), "quantised"),
        (nn.Parameter(torch.zeros(2, 2, device="meta")), "not on this device"),
        (nn.Parameter(torch.zeros(2)), "no weights"),
    ):
        with pytest.raises(UnsupportedError, match=said):
            check_scalable(layer(parameter), "layer")


def test_norms_and_biases_are_not_scaled() -> None:
    layer = tiny_model("gpt2").transformer.h[0]
    names = {name for name, _ in scaled_weights(layer)}
    assert names == {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}


def test_counts_leave_out_what_the_judge_could_not_tell() -> None:
    count = count_of((1, 2), 1.1, (True, None, False, True))
    assert (count.refused, count.judged) == (2, 3)
    assert 0.2 < count.low < 2 / 3 < count.high < 0.95
    unsure = count_of((1, 2), 1.1, (None,))
    assert (unsure.refused, unsure.judged, unsure.low, unsure.high) == (0, 0, 0.0, 1.0)


def test_pairs_are_compared_prompt_by_prompt() -> None:
    test = paired_test((True, True, False, None, True), (False, True, True, True, None), (3, 4), True)
    assert (test.first, test.last, test.elsewhere) == (3, 4, True)
    assert (test.only_best, test.only_other, test.p) == (1, 1, 1.0)


@pytest.mark.parametrize(
    ("band", "layers", "expected"),
    [
        ((3, 5), 9, [(0, 2), (6, 8)]),
        ((4, 5), 9, [(0, 1), (2, 3), (6, 7)]),
        ((0, 4), 8, [(5, 7)]),
        ((2, 5), 9, [(0, 1), (6, 8)]),
        ((0, 2), 3, []),
        ((1, 1), 3, [(0, 0), (2, 2)]),
    ],
)
def test_ranges_apart(band, layers, expected) -> None:
    assert apart(band, layers) == expected
