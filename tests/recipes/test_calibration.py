"""The search for the best lock, and for the best strength of a lock: on stand-ins and on tiny models."""

import dataclasses
import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlock
from fastlock.errors import FastlockError
from fastlock.evaluation.prompts import Prompts, shipped_prompts
from fastlock.recipes.calibration import Calibration, calibrate
from fastlock.recipes.calibration_report import calibration_html, picture
from fastlock.recipes.measuring import Measuring
from fastlock.recipes.trials import Measurement, best, best_strength
from tests.helpers.calibrating import PAIRS, PROMPTS, at, odd, small
from tests.helpers.families import gated_lock, random_lock, same_state, state, tiny_model

module = importlib.import_module("fastlock.recipes.calibration")


def test_calibration_finds_what_is_planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-in measurements with one good corner: many refusals only from prompt-end, at a strength about 2."""
    model, tokenizer = small()

    def measure(_self: Any, lock: Any, strength: float) -> Measurement:
        right = lock.recipe.startswith("prompt-end")
        return Measurement(math.exp(-(math.log(strength / 2) ** 2)) if right else 0.1, over_refusals=0.0, cost=1)

    monkeypatch.setattr(Measuring, "measure", measure)
    found = calibrate(model, tokenizer, PAIRS, prompts=PROMPTS, trials=40, new_tokens=1)
    assert found.chosen.recipe == "prompt-end"
    assert found.chosen.refusals > 0.9
    assert found.lock.strength == found.chosen.strength == pytest.approx(2, rel=0.4)
    assert found.chosen == best(found.trials)
    assert len(found.trials) == 40


def test_what_is_measured_is_the_relocked_model() -> None:
    """Every trial's numbers, measured again by hand on the lock that the trial describes."""
    model, tokenizer = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = calibrate(model, tokenizer, PAIRS, prompts=PROMPTS, trials=5, new_tokens=3, judge=odd)
    deciding, reported = module._divided(PROMPTS, None, 42)
    assert (len(deciding.harmful), len(reported.harmful), len(reported.texts)) == (4, 4, 1)
    assert set(deciding.harmful) | set(reported.harmful) == set(PROMPTS.harmful)
    assert {answer.prompt for answer in found.after.harmful} == set(reported.harmful)
    without = fastlock.evaluate(model, tokenizer, deciding, judge=odd, new_tokens=3)[0]
    for tried in found.trials:
        lock = fastlock.extract(model, tokenizer, PAIRS, tried.heads, tried.tokens, recipe=tried.recipe)
        after = fastlock.evaluate(model, tokenizer, deciding, [(lock, tried.strength)], judge=odd, new_tokens=3)[1]
        assert (tried.refusals, tried.over_refusals) == (after.refusals, after.over_refusals)
        assert tried.cost == pytest.approx(after.perplexity / without.perplexity, rel=1e-6)
    assert len({tried.cost for tried in found.trials}) == 5
    assert {name: torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()} == dict.fromkeys(
        before, True
    )


def test_the_same_inputs_give_the_same_lock_and_a_file_of_it_everything(tmp_path: Path) -> None:
    model, tokenizer = small()
    first, second = (calibrate(model, tokenizer, PAIRS, prompts=PROMPTS, trials=6, new_tokens=1) for _ in range(2))
    assert (first.lock.digest, first.trials) == (second.lock.digest, second.trials)
    first.lock.save(tmp_path / "l.safetensors")
    loaded = fastlock.Lock.load(tmp_path / "l.safetensors")
    assert loaded.strength == first.chosen.strength
    measured = json.loads(loaded.calibration or "")
    assert measured["refusals"] == first.chosen.refusals
    assert measured["held_out"]["perplexity"] == first.after.perplexity
    # relock takes the calibrated strength by itself
    assert fastlock.relock(model, loaded).strength == first.chosen.strength


def test_a_lock_comes_from_the_base() -> None:
    model, tokenizer = small()
    base = tiny_model("llama", num_hidden_layers=4, vocab_size=4096)
    with torch.no_grad():
        base.model.embed_tokens.weight.mul_(torch.rand(4096, 1))
    found = calibrate(model, tokenizer, PAIRS, base=base, prompts=PROMPTS, trials=1, new_tokens=1)
    chosen = found.chosen
    of = [
        fastlock.extract(network, tokenizer, PAIRS, chosen.heads, chosen.tokens, recipe=chosen.recipe)
        for network in (base, model)
    ]
    assert found.lock == of[0] != of[1]


def test_a_users_own_cost() -> None:
    model, tokenizer = small()
    seen = []

    def cost(network: Any, given: Any) -> float:
        assert given is tokenizer
        seen.append(network.model.layers[0].self_attn.o_proj.bias is not None)
        return 2.0 + len(seen)

    found = calibrate(model, tokenizer, PAIRS, prompts=PROMPTS, trials=3, cost=cost, new_tokens=1)
    assert [tried.cost for tried in found.trials] == [4 / 3, 5 / 3, 2.0]
    # of a lock, whose strength 0 is the model as it is
    seen.clear()
    lock = random_lock(model)
    found = calibrate(model, tokenizer, lock=lock, prompts=PROMPTS, trials=3, cost=cost, new_tokens=1)
    assert [tried.cost for tried in found.trials] == [1.0, 4 / 3, 5 / 3]
    assert seen == [False, True, True]


def test_without_texts_the_shipped_ones_are_read() -> None:
    """Their perplexity, measured by hand; none of them where the cost is the user's own."""
    model, tokenizer = small()
    asked = dataclasses.replace(PROMPTS, texts=())
    options: dict[str, Any] = {"trials": 2, "new_tokens": 1}
    for how in ({"pairs": PAIRS}, {"lock": random_lock(model)}):
        found = calibrate(model, tokenizer, prompts=asked, **how, **options)
        filled = dataclasses.replace(PROMPTS, texts=shipped_prompts().texts)
        assert found.trials == calibrate(model, tokenizer, prompts=filled, **how, **options).trials
        assert found.trials[-1].cost != 1.0
        assert found.after.perplexity is not None
    # where another set is held out, all of them decide
    held_out = Prompts(("harm x it",), ("good x day",))
    found = calibrate(model, tokenizer, PAIRS, prompts=asked, held_out=held_out, **options)
    assert found.trials == calibrate(model, tokenizer, PAIRS, prompts=filled, held_out=held_out, **options).trials
    found = calibrate(model, tokenizer, PAIRS, prompts=asked, cost=lambda *_: 2.0, **options)
    assert [tried.cost for tried in found.trials] == [1.0, 1.0]
    assert found.after.perplexity is None


def test_a_cost_that_is_no_number_is_without_end() -> None:
    model, tokenizer = small()
    costs = iter([2.0, math.nan, 2.0])
    found = calibrate(model, tokenizer, PAIRS, prompts=PROMPTS, trials=2, cost=lambda *_: next(costs), new_tokens=1)
    assert [tried.cost for tried in found.trials] == [math.inf, 1.0]
    assert found.chosen == found.trials[1]


@pytest.mark.parametrize("cost", [0.0, -1.0, None])
def test_a_cost_that_is_no_cost(cost: float | None) -> None:
    model, tokenizer = small()
    for costs in (iter([cost]), iter([1.0, cost])):
        with pytest.raises(FastlockError, match="must be a number above 0"):
            calibrate(
                model, tokenizer, PAIRS, prompts=PROMPTS, trials=1, cost=lambda *_, c=costs: next(c), new_tokens=1
            )


def test_without_a_verdict_on_harmless_requests_nothing_fits() -> None:
    model, tokenizer = small()

    def judge(prompt: str, answer: str) -> bool | None:
        return None if prompt in PROMPTS.harmless else True

    lock = random_lock(model)
    found = calibrate(model, tokenizer, lock=lock, prompts=PROMPTS, trials=2, judge=judge, new_tokens=1)
    assert {tried.over_refusals for tried in found.trials} == {1.0}


def test_of_a_given_lock_the_strength_is_searched() -> None:
    """Every trial's numbers, measured again by hand; strength 0 is the model as it is, and its cost 1."""
    model, tokenizer = small()
    before = state(model)
    lock = random_lock(model, seed=6, base_model="tiny", recipe="trained: by hand", strength=6.0)
    found = calibrate(model, tokenizer, lock=lock, prompts=PROMPTS, trials=10, new_tokens=3, judge=odd)
    assert same_state(state(model), before)
    deciding, reported = module._divided(PROMPTS, None, 42)
    locks = [(lock, tried.strength) for tried in found.trials if tried.strength]
    without, *after = fastlock.evaluate(model, tokenizer, deciding, locks, judge=odd, new_tokens=3)
    for tried, evaluation in zip(found.trials, [without, *after], strict=True):
        assert (tried.recipe, tried.tokens, tried.heads) == (None, None, None)
        assert (tried.refusals, tried.over_refusals) == (evaluation.refusals, evaluation.over_refusals)
        assert tried.cost == pytest.approx(evaluation.perplexity / without.perplexity, rel=1e-6)
    assert (found.trials[0].strength, found.trials[0].cost) == (0.0, 1.0)
    assert found.chosen == best_strength(found.trials)
    assert found.chosen.strength > 0
    assert (found.lock, found.lock.strength) == (lock, found.chosen.strength)
    assert (found.lock.base_model, found.lock.recipe) == ("tiny", "trained: by hand")
    measured = json.loads(found.lock.calibration)
    assert measured["strength"] == found.chosen.strength
    assert {"recipe", "tokens", "heads"}.isdisjoint({*measured, *found.to_dict()["chosen"]})
    assert {answer.prompt for answer in found.after.harmful} == set(reported.harmful)
    assert (found.after.strength, found.before.strength) == (found.chosen.strength, None)
    assert found.held_out == (found.before, found.after)
    assert found.why_no_lock is None


@pytest.mark.parametrize(("made", "most"), [(gated_lock, 2.0), (random_lock, 8.0)])
def test_a_gate_is_not_tried_at_strengths_that_it_was_not_made_for(
    made: Any, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it was calibrated at before; the best one is found between them."""
    model, tokenizer = small()

    def measure(_self: Any, _lock: Any, strength: float) -> Measurement:
        return Measurement(min(strength / 1.2, 1.0), 0.0, 1.0 if strength <= 1.2 else 1.1)

    monkeypatch.setattr(Measuring, "measure", measure)
    lock = dataclasses.replace(made(model), strength=6.0)
    found = calibrate(model, tokenizer, lock=lock, prompts=PROMPTS, new_tokens=1)
    strengths = [tried.strength for tried in found.trials]
    assert (min(strengths), max(strengths), len({*strengths})) == (0.0, most, 20)
    assert 1.18 < found.chosen.strength <= 1.2


@pytest.mark.parametrize(
    ("refused", "why"),
    [
        (lambda prompt, _: prompt in PROMPTS.harmful, "This checkpoint needs no lock: without one, it refuses 100% of"),
        (lambda *_: False, "This checkpoint is not helped by this lock: without one, it refuses 0% of the harmful"),
    ],
)
def test_a_lock_that_helps_nothing_is_not_chosen(refused: Any, why: str) -> None:
    """Though at some strength the perplexity is lower."""
    model, tokenizer = small()
    found = calibrate(model, tokenizer, lock=random_lock(model), prompts=PROMPTS, new_tokens=1, judge=refused)
    assert len(found.trials) == 20
    assert min(tried.cost for tried in found.trials) < 1
    assert (found.chosen, found.lock) == (found.trials[0], None)
    assert found.why_no_lock.startswith(why)
    assert found.held_out == (found.before,) == (found.after,)
    assert (found.before.lock, len(found.before.harmful)) == (None, 4)
    data = found.to_dict()
    assert (data["lock"], data["why_no_lock"], len(data["held_out"])) == (None, found.why_no_lock, 1)
    page = calibration_html(found, {})
    assert found.why_no_lock in page
    assert "0 (baseline)" in page


def test_whether_refusals_were_kept_is_said_by_the_trial() -> None:
    nothing: Any = None
    for refusals, needs in ((0.9, True), (0.89, False)):
        why = Calibration(None, at(0, refusals), (), nothing, nothing).why_no_lock or ""
        assert ("needs no lock" in why, "not helped" in why) == (needs, not needs)


def test_what_can_not_be_done_with_a_given_lock(tmp_path: Path) -> None:
    """Before anything is written."""
    model, tokenizer = small()
    lock = random_lock(model)
    journal = tmp_path / "out" / "journal.jsonl"

    def refused(match: str, kind: type[FastlockError] = FastlockError, **options: Any) -> None:
        given = {"model": model, "lock": lock, "prompts": PROMPTS, "journal": journal} | options
        with pytest.raises(FastlockError, match=match) as error:
            calibrate(tokenizer=tokenizer, **given)
        assert type(error.value) is kind
        assert not journal.parent.exists()

    refused("lock is a str; load it first", lock="a.lock.safetensors")
    refused("lock and base are both given", base=model)
    refused("lock and pairs are both given", pairs=PAIRS)
    refused("lock and harmless are both given", harmless=["a", "b"])
    refused("trials is 0; it must be an integer from 1", trials=0)
    refused("16", fastlock.MismatchError, lock=random_lock(tiny_model("llama", head_dim=16)))
    refused("layer 6", fastlock.MismatchError, lock=random_lock(model, [(6, 0)]))
    for key, value in (("num_layers", {"num_hidden_layers": 3}), ("head_dim", {"head_dim": 16})):
        base = tiny_model("llama", **({"num_hidden_layers": 4, "vocab_size": 4096} | value))
        message = f"base: its {key} is {next(iter(value.values()))}, but .* Give the aligned base"
        refused(message, fastlock.MismatchError, lock=None, base=base)
    base = small()[0]
    fastlock.relock(base, lock)
    refused("LlamaForCausalLM is relocked, .* Unlock it first", lock=None, base=base)
    no_plain = small()[0]
    no_plain.model.layers[2].self_attn.o_proj = torch.nn.Identity()
    message = r"layers.2.self_attn.o_proj is a .*Identity, not a plain linear layer"
    refused(message, fastlock.UnsupportedError, lock=None, model=no_plain)
    fastlock.relock(model, lock)
    refused("LlamaForCausalLM is relocked, .* Unlock it first")
    refused("LlamaForCausalLM is relocked, .* Unlock it first", lock=None, base=small()[0])


def test_a_cost_without_end_can_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A strength that breaks the model has no finite perplexity."""
    model, tokenizer = small()

    def measure(_self: Any, _lock: Any, strength: float) -> Measurement:
        return Measurement(min(strength, 1.0), over_refusals=0.0, cost=math.inf if strength > 1 else 1.0)

    monkeypatch.setattr(Measuring, "measure", measure)
    options: dict[str, Any] = {"lock": random_lock(model), "prompts": PROMPTS, "new_tokens": 1}
    for _ in range(2):
        found = calibrate(model, tokenizer, trials=8, journal=tmp_path / "journal.jsonl", **options)
        assert (found.chosen.strength, found.trials[2].cost) == (1.0, math.inf)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [one["cost"] for one in data["trials"]][:3] == [1.0, 1.0, "inf"]
    assert "× inf" in picture(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trials": 0}, "trials is 0; it must be an integer from 1"),
        ({"trials": True}, "trials is True"),
        ({"seed": -1}, "seed is -1"),
        ({"prompts": Prompts(harmful=("a", "b"))}, "prompts: both harmful and harmless prompts are needed"),
        ({"held_out": Prompts(harmless=("a", "b"))}, "held_out: both harmful and harmless prompts are needed"),
        ({"prompts": Prompts(("a",), ("b", "c"))}, "harmful: a single one cannot both decide and be held out"),
        ({"held_out": Prompts(("x", "harm 3 it"), ("y",))}, "'harm 3 it' both decides and is held out"),
        ({"cost": lambda *_: math.nan}, "the model's cost without a lock is nan"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    model, tokenizer = small()
    with pytest.raises(FastlockError, match=message):
        calibrate(model, tokenizer, PAIRS, **({"prompts": PROMPTS, "new_tokens": 1} | options))
