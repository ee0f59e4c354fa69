"""`locate`: the planted band is found, shuffled kinds give none, and what cannot be used is refused beforehand."""

import dataclasses
import json
import re
import statistics

import pytest
import torch
import transformers

import fastlock
from fastlock.errors import FastlockError, UnsupportedError
from fastlock.finetuning.band_prompts import BandPrompts, shipped_band_prompts
from fastlock.finetuning.locate_report import write_report
from tests.finetuning.planted import FIRST, LAST, LAYERS, Planted, planted_model, planted_prompts, refused
from tests.helpers.families import same_state, state, tiny_model
from tests.helpers.words import Words

PROMPTS = planted_prompts(borderline=100)


def located(model, prompts=PROMPTS, **options):
    return fastlock.locate(model, Planted(), prompts, judge=refused, new_tokens=1, batch_size=25, **options)


@pytest.fixture(scope="module")
def found():
    return located(planted_model())


def test_the_planted_band_is_found(found) -> None:
    band = found.band
    assert (band.first, band.last, band.num_layers, band.model_type) == (FIRST, LAST, LAYERS, "llama")
    assert found
    assert "stands out" in found.reason
    assert band.evidence is found.evidence
    assert found.evidence.first_range == (FIRST, LAST)
    fastlock.freeze(planted_model(), band)


@pytest.mark.parametrize(("first", "last", "least"), [(1, 3, 0.3), (2, 5, 0.3), (4, 6, 0.2)])
def test_wherever_it_is_planted(first, last, least) -> None:
    found = located(planted_model(first=first, last=last, least=least))
    assert (found.band.first, found.band.last) == (first, last)


def test_the_counts_are_those_of_scaled_copies(found) -> None:
    """By hand: weights multiplied for good, every request asked alone, one token."""
    by_range = {(one.first, one.last): one for one in found.evidence.counts}
    assert set(by_range) == {
        (-1, -1),
        *((FIRST, last) for last in range(FIRST, LAYERS)),
        *((first, LAST) for first in range(LAST + 1)),
        *((0, 2), (6, 8)),
    }
    scale = by_range[FIRST, LAST].scale
    for (first, last), count in by_range.items():
        model = planted_model()
        with torch.no_grad():
            for layer in model.model.layers[first : last + 1] if first >= 0 else ():
                for parameter in layer.parameters():
                    if parameter.dim() > 1:
                        parameter.mul_(scale)
            rows = [Planted()(prompt)["input_ids"] for prompt in PROMPTS.borderline]
            refusals = sum(int(model(torch.tensor([row])).logits[0, -1].argmax()) == 103 for row in rows)
        assert (count.refused, count.judged) == (refusals, len(rows)), (first, last)
    best = max(by_range.values(), key=lambda one: one.refused)
    assert (best.first, best.last) == (FIRST, LAST)


def test_the_scale_is_the_papers_rule() -> None:
    """The first step of 0.05 whose counts have a standard deviation of 15 among 721 prompts."""
    least = 15 / 721 * len(PROMPTS.borderline)

    def spread(scale: float) -> float:
        counts = located(planted_model(least=0.6), scale=scale).evidence.counts
        return statistics.stdev(one.refused for one in counts if one.first == FIRST)

    spreads = [spread(scale) for scale in (1.05, 1.1, 1.15)]
    assert spreads[0] < spreads[1] < least < spreads[2]
    assert spreads[1] > 0.9 * least, "a rule that is a little laxer would choose 1.1"
    counts = located(planted_model(least=0.6)).evidence.counts
    assert {one.scale for one in counts if one.first >= 0} == {1.15}


def test_the_best_of_many_ranges_must_be_better_than_the_best_by_chance() -> None:
    """Seven prompts that only the best refuses are significant for one range, and not for the best of a dozen."""
    found = located(planted_model(first=4, last=6), scale=1.05)
    (baseline,) = (one for one in found.evidence.tests if one.first < 0)
    assert (baseline.only_best, baseline.only_other) == (7, 0)
    assert baseline.p < 0.02
    assert found.band is None
    assert re.search(r"\[4, 6\], the best of 1\d ranges, does not refuse significantly more", found.reason)


def test_scaled_down_the_same_layers_are_found() -> None:
    found = located(planted_model(least=0.1), scale=0.9)
    assert (found.band.first, found.band.last) == (FIRST, LAST)
    assert "fewer" in found.reason


def test_shuffled_kinds_give_none() -> None:
    half = len(PROMPTS.normal) // 2
    shuffled = dataclasses.replace(
        PROMPTS,
        normal=PROMPTS.normal[:half] + PROMPTS.malicious[half:],
        malicious=PROMPTS.malicious[:half] + PROMPTS.normal[half:],
    )
    found = located(planted_model(), shuffled)
    assert found.band is None
    assert not found
    assert "shuffles" in found.reason
    assert found.evidence.first_range is None
    assert found.evidence.counts == ()


def test_a_model_that_never_refuses_has_none() -> None:
    found = located(planted_model(least=100))
    assert found.band is None
    assert "no scale up to 1.5" in found.reason


def test_most_of_a_model_is_no_band() -> None:
    """Refusal planted in seven layers of nine."""
    found = located(planted_model(first=1, last=7, least=1.2), scale=1.1)
    assert found.band is None
    assert "[1, 7], is more than half of the 9 layers" in found.reason


def test_counts_that_could_be_chance_give_none() -> None:
    """The same planted layers, too few borderline requests to tell."""
    found = located(planted_model(), planted_prompts(borderline=12), scale=1.1)
    assert found.band is None
    assert "does not refuse significantly more" in found.reason
    assert found.evidence.counts
    assert found.evidence.tests


def test_a_first_range_may_be_given() -> None:
    found = located(planted_model(), first_range=(4, 5), scale=1.1)
    assert found.evidence.first_range == (4, 5)
    assert {one.last for one in found.evidence.counts if one.first == 4} == set(range(4, LAYERS))
    assert (found.band.first, found.band.last) == (FIRST, LAST)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_model_is_afterwards_as_it_was(dtype) -> None:
    model = planted_model(dtype)
    model.train()
    before = state(model)
    located(model, scale=1.1)
    assert same_state(state(model), before)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_ctrl_c_leaves_the_model_as_it_was() -> None:
    model = planted_model()
    before = state(model)

    def progress(items, description):
        for number, item in enumerate(items):
            if "scaled" in description and number == 1:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        located(model, progress=progress)
    assert same_state(state(model), before)
    assert not any("forward" in layer.__dict__ or layer._forward_hooks for layer in model.model.layers)


def test_the_band_and_its_evidence_come_back_from_disk(found, tmp_path) -> None:
    write_report(tmp_path, found, {"made": "by a test"})
    assert fastlock.Band.load(tmp_path / "band.json") == found.band
    data = json.loads((tmp_path / "located.json").read_text())
    assert data["band"] == [FIRST, LAST]
    assert data["evidence"]["counts"][0]["refused"] == found.evidence.counts[0].refused


def test_the_same_call_finds_the_same(found) -> None:
    assert located(planted_model()) == found


class Broken(Words):
    chat_template = "broken"

    def apply_chat_template(self, *_arguments: object, **_options: object) -> str:
        raise ValueError("no {{ end }}")


@pytest.mark.parametrize(
    ("tokenizer", "options", "error", "said"),
    [
        (Broken(), {}, FastlockError, r"normal prompt 1.*template fails \(ValueError: no \{\{ end \}\}\)"),
        (Words(1000), {}, FastlockError, "Give the tokenizer that belongs to this model"),
        (Words(), {"scale": 1}, FastlockError, "scale is 1;"),
        (Words(), {"scale": 0.0}, FastlockError, "scale is 0.0"),
        (Words(), {"scale": float("nan")}, FastlockError, "scale is nan"),
        (Words(), {"scale": "1.2"}, FastlockError, "scale is '1.2'"),
        (Words(), {"new_tokens": 0}, FastlockError, "new_tokens is 0"),
        (Words(), {"batch_size": 0}, FastlockError, "batch_size is 0"),
        (Words(), {"first_range": (2, 1)}, FastlockError, "reversed"),
        (Words(), {"first_range": (1, 3)}, FastlockError, "integer from 0 to 2 in a model of 3 layers"),
        (Words(), {"first_range": 3}, FastlockError, "first_range is 3"),
        (Words(), {"prompts": ["a"]}, FastlockError, "give BandPrompts"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_computed(
    tokenizer, options, error, said, monkeypatch
) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(model, "forward", None)
    options = {"prompts": BandPrompts(("a b", "c d"), ("e f", "g h"), ("i j",)), **options}
    with pytest.raises(error, match=said):
        fastlock.locate(model, tokenizer, **options)


def test_models_that_cannot_be_searched_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="does not generate"):
        fastlock.locate(tiny_model("llama").model, Words())
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    )
    with pytest.raises(UnsupportedError, match="one plain list"):
        fastlock.locate(t5, Words())
    quantised = tiny_model("llama")
    quantised.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(UnsupportedError, match=r"layers\.1\.mlp\.up_proj\.weight is torch\.uint8"):
        fastlock.locate(quantised, Words())


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (((), ("a", "b"), ("c",)), "`normal`: there are 0 prompts, and at least 2"),
        ((("a", "b"), ("c",), ("d",)), "`malicious`: there are 1 prompts"),
        ((("a", "b"), ("c", "d"), ()), "`borderline`: there are 0 prompts"),
        ((("a", "b"), ("c", " "), ("d",)), "`malicious`: give a list of texts"),
        ((("a", "b"), "cd", ("d",)), "`malicious`: give a list of texts"),
        ((("a", "b"), ("c", 3), ("d",)), "`malicious`: give a list of texts"),
        ((("a", "\ud800"), ("c", "d"), ("e",)), "half a character"),
        ((("a", "b"), ("c", "b"), ("d",)), "'b' is both a normal and a malicious prompt"),
    ],
)
def test_prompts_that_are_empty_or_one_sided_are_refused(prompts, said) -> None:
    with pytest.raises(FastlockError, match=said):
        BandPrompts(*prompts)


def test_the_shipped_prompts_are_three_kinds_and_none_of_those_that_evaluate() -> None:
    from fastlock.evaluation.prompts import shipped_prompts

    prompts = shipped_band_prompts()
    assert (len(prompts.normal), len(prompts.malicious), len(prompts.borderline)) == (100, 100, 177)
    assert len(set(prompts.borderline)) == 177
    evaluated = shipped_prompts()
    assert not {*evaluated.harmful, *evaluated.harmless} & {*prompts.borderline, *prompts.normal}
    assert prompts.digest != dataclasses.replace(prompts, normal=prompts.normal[1:]).digest
