"""The search for the best lock, and for a lock's best strength: on stand-ins, on tiny models, and as a command."""

import dataclasses
import importlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastlock
from fastlock.cli import main as cli
from fastlock.errors import FastlockError
from fastlock.evaluation.prompts import Prompts, shipped_prompts
from fastlock.recipes.calibration import Calibration, calibrate
from fastlock.recipes.calibration_report import calibration_html, picture, trial_cells, trial_columns
from fastlock.recipes.measuring import Measuring
from fastlock.recipes.trials import Measurement, Trial, best, best_strength, frontier, next_strength
from tests.helpers.families import random_lock, same_state, state, tiny_model, word_tokenizer

module = importlib.import_module("fastlock.recipes.calibration")
PAIRS = fastlock.shipped_pairs()[:6]
PROMPTS = Prompts(
    harmful=tuple(f"harm {i} it" for i in range(8)),
    harmless=tuple(f"good {i} day" for i in range(6)),
    texts=("the quick brown fox jumps", "over the lazy dog again", "and once more"),
)


def trial(refusals: float, over_refusals: float, cost: float, heads: int = 4) -> Trial:
    return Trial("prompt-end", 1, heads, 1.0, refusals, over_refusals, cost)


def at(strength: float, refusals: float = 0.0, over_refusals: float = 0.0, cost: float = 1.0) -> Trial:
    """A trial of a lock that is given."""
    return Trial(None, None, None, strength, refusals, over_refusals, cost)


def small() -> tuple[Any, Any]:
    model = tiny_model("llama", num_hidden_layers=4, vocab_size=4096)
    return model, word_tokenizer(fastlock.shipped_pairs())


def test_the_frontier_is_what_nothing_beats() -> None:
    """Against the definition, on random trials with many ties."""
    random = np.random.RandomState(0)
    trials = [trial(*random.randint(0, 5, 3) / 4 + [0, 0, 1]) for _ in range(200)]
    found = frontier(trials)

    def beats(a: Trial, b: Trial) -> bool:
        no_worse = a.refusals >= b.refusals and a.over_refusals <= b.over_refusals and a.cost <= b.cost
        return no_worse and (a.refusals > b.refusals or a.over_refusals < b.over_refusals or a.cost < b.cost)

    unbeaten = {(t.refusals, t.over_refusals, t.cost) for t in trials if not any(beats(other, t) for other in trials)}
    assert {(t.refusals, t.over_refusals, t.cost) for t in found} == unbeaten
    assert len(found) == len(unbeaten)
    assert [t.refusals for t in found] == sorted((t.refusals for t in found), reverse=True)


def test_the_best_that_fits_is_chosen() -> None:
    fits = trial(0.7, 0.02, 1.03)
    assert best([trial(1.0, 0.03, 1.0), trial(1.0, 0.0, 1.04), fits, trial(0.6, 0.0, 1.0)]) == fits


def test_what_a_model_refuses_as_it_is_may_be_refused() -> None:
    """Else only a lock that takes refusals away would fit."""
    for tried, strength in (
        ([(0, 0.95, 0.05, 1.0), (1, 0.97, 0.3, 1.01), (8, 0.10, 0.0, 1.0)], 0),
        ([(0, 0.0, 0.05, 1.0), (1, 1.0, 0.05, 1.0), (8, 0.0, 0.0, 1.02)], 1),
        ([(0, 0.9, 0.05, 1.0), (0.125, 0.85, 0.0, 1.0), (1, 1.0, 0.05, 1.0)], 1),
    ):
        assert (
            best_strength([dataclasses.replace(at(*numbers), allowed=0.05) for numbers in tried]).strength == strength
        )


def test_a_strength_that_refuses_less_is_never_chosen() -> None:
    assert best_strength([at(0, 0.95, 0.3, 1.0), at(1, 0.9, 0.0, 1.0)]).strength == 0


def test_without_one_that_fits_the_best_compromise_is() -> None:
    compromise = trial(0.9, 0.1, 1.1)
    assert best([trial(1.0, 0.9, 1.0), compromise, trial(0.95, 0.1, math.e)]) == compromise


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


def odd(_prompt: str, answer: str) -> bool:
    return len(answer) % 2 == 1


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


def test_a_stopped_search_goes_on(tmp_path: Path) -> None:
    model, tokenizer = small()
    journal = tmp_path / "journal.jsonl"
    options: dict[str, Any] = {"prompts": PROMPTS, "new_tokens": 1, "journal": journal}

    def stopping(items: Any, description: str) -> Any:
        for i, item in enumerate(items):
            if description == "Trying locks" and i == 3:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, tokenizer, PAIRS, trials=5, progress=stopping, **options)
    counted: list[int] = []

    def counting(items: Any, description: str) -> Any:
        counted.extend([len(items)] * (description == "Trying locks"))
        return items

    found = calibrate(model, tokenizer, PAIRS, trials=5, progress=counting, **options)
    assert (counted, len(found.trials)) == ([2], 5)
    again = calibrate(model, tokenizer, PAIRS, trials=5, **options)
    assert again.trials == found.trials
    with pytest.raises(FastlockError, match=r"journal.jsonl: it is of another search \(another length of answers\)"):
        calibrate(model, tokenizer, PAIRS, trials=5, **(options | {"new_tokens": 2}))


def steered(monkeypatch: pytest.MonkeyPatch, stop_in: int | None = None) -> None:
    """Stand-in measurements that the search can follow; Ctrl-C in one of them, counted from 0."""
    counted = iter(range(1000))

    def measure(_self: Any, lock: Any, strength: float) -> Measurement:
        if next(counted) == stop_in:
            raise KeyboardInterrupt
        return Measurement(len(lock) / 16, over_refusals=strength / 8, cost=1 + abs(strength - 2))

    monkeypatch.setattr(Measuring, "measure", measure)


@pytest.mark.parametrize("stops", [[4], [0, 1, 0], [12], [3, 9]], ids=str)
def test_a_stopped_search_tries_what_it_would_have_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: list[int]
) -> None:
    """Each stop is in the middle of a trial, the last ones where Optuna goes by the earlier trials (from 10 on)."""
    model, tokenizer = small()
    options: dict[str, Any] = {"prompts": PROMPTS, "new_tokens": 1, "trials": 15}
    steered(monkeypatch)
    whole = calibrate(model, tokenizer, PAIRS, **options).trials
    assert len({(one.recipe, one.tokens, one.heads, one.strength) for one in whole}) == 15
    for stop in stops:
        steered(monkeypatch, stop)
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, tokenizer, PAIRS, journal=tmp_path / "journal.jsonl", **options)
    steered(monkeypatch)
    for trials in (8, 15):  # and one that was at its end, and gets more to try
        found = calibrate(model, tokenizer, PAIRS, journal=tmp_path / "journal.jsonl", **(options | {"trials": trials}))
        assert found.trials == whole[: max(trials, sum(stops))]


def test_a_search_goes_by_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = small()
    steered(monkeypatch)
    first, second = (
        calibrate(model, tokenizer, PAIRS, prompts=PROMPTS, new_tokens=1, trials=3, seed=seed) for seed in (1, 2)
    )
    assert not {one.strength for one in first.trials} & {one.strength for one in second.trials}


def test_a_journal_that_was_cut_off_anywhere_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As no room, no power or a kill leave it: before a line's end, in its middle, in the first one; zeros behind."""
    model, tokenizer = small()
    steered(monkeypatch)
    journal = tmp_path / "journal.jsonl"
    options: dict[str, Any] = {"prompts": PROMPTS, "new_tokens": 1, "trials": 2, "journal": journal}
    whole = calibrate(model, tokenizer, PAIRS, **options)
    written = journal.read_bytes()
    ends = [place + 1 for place, byte in enumerate(written) if byte == ord("\n")]
    assert len(ends) >= 8
    for cut in {end - back for end in ends for back in (1, 20)} | {0, 1, 15}:
        journal.write_bytes(written[:cut] + bytes(cut % 3 if cut > 15 else 0))
        found = calibrate(model, tokenizer, PAIRS, **options)
        assert (found.trials, found.chosen) == (whole.trials, whole.chosen)
        for line in journal.read_bytes().splitlines():
            json.loads(line)
    assert [path.name for path in tmp_path.iterdir()] == ["journal.jsonl"]


def test_a_run_that_was_killed_while_it_wrote_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Optuna's own lock of the journal stays behind."""
    model, tokenizer = small()
    steered(monkeypatch)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waits"))
    journal = tmp_path / "journal.jsonl"
    options: dict[str, Any] = {"prompts": PROMPTS, "new_tokens": 1, "journal": journal}
    calibrate(model, tokenizer, PAIRS, trials=1, **options)
    (tmp_path / "journal.jsonl.lock").symlink_to(journal)
    assert len(calibrate(model, tokenizer, PAIRS, trials=2, **options).trials) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["journal.jsonl"]


def test_a_journal_for_which_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever line it is that is written in part: the same call goes on when there is room again."""
    import optuna

    backend = optuna.storages.journal.JournalFileBackend
    append = backend.append_logs
    model, tokenizer = small()
    steered(monkeypatch)
    journal = tmp_path / "journal.jsonl"
    options: dict[str, Any] = {"prompts": PROMPTS, "new_tokens": 1, "trials": 2}
    whole = calibrate(model, tokenizer, PAIRS, journal=journal, **options).trials
    lines = journal.read_bytes().count(b"\n")
    for room in range(lines):
        journal.unlink()
        left = iter([True] * room)

        def appending(self: Any, logs: Any, left: Iterator[bool] = left) -> None:
            if next(left, False):
                return append(self, logs)
            with journal.open("ab") as file:
                file.write(json.dumps(logs[0], separators=(",", ":")).encode()[:20])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(backend, "append_logs", appending)
        with pytest.raises(FastlockError, match=r"journal.jsonl: cannot be written .*No space .* run the same command"):
            calibrate(model, tokenizer, PAIRS, journal=journal, **options)
        monkeypatch.setattr(backend, "append_logs", append)
        assert calibrate(model, tokenizer, PAIRS, journal=journal, **options).trials == whole


def test_a_fault_of_the_judges_is_not_the_journals(tmp_path: Path) -> None:
    model, tokenizer = small()

    def judge(*_: str) -> bool:
        raise OSError("the judge's own")

    with pytest.raises(OSError, match="the judge's own"):
        calibrate(
            model, tokenizer, PAIRS, prompts=PROMPTS, new_tokens=1, judge=judge, journal=tmp_path / "journal.jsonl"
        )


def test_nothing_is_said_by_optuna(tmp_path: Path) -> None:
    """Of a trial that fails or is stopped: the error says it."""
    model, tokenizer = small()
    said: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = said.append  # type: ignore[method-assign]
    logging.getLogger("optuna").addHandler(handler)
    try:
        for error in (KeyboardInterrupt, FastlockError):

            def judge(*_: str, error: Any = error) -> bool:
                raise error

            with pytest.raises(error):
                calibrate(
                    model,
                    tokenizer,
                    PAIRS,
                    prompts=PROMPTS,
                    new_tokens=1,
                    judge=judge,
                    journal=tmp_path / "journal.jsonl",
                )
    finally:
        logging.getLogger("optuna").removeHandler(handler)
    assert [record.getMessage() for record in said] == []


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


@pytest.mark.parametrize("changed", ["judge", "cost", "model"])
def test_a_journal_of_another_judge_cost_or_model_in_memory(tmp_path: Path, changed: str) -> None:
    model, tokenizer = small()
    options: dict[str, Any] = {"prompts": PROMPTS, "trials": 1, "new_tokens": 1, "journal": tmp_path / "j"}
    calibrate(model, tokenizer, PAIRS, **options)
    other: dict[str, Any] = {"judge": {"judge": odd}, "cost": {"cost": lambda *_: 1.0}, "model": {}}[changed]
    if changed == "model":
        model.model.layers[0].self_attn.o_proj.weight.data *= 2
    with pytest.raises(FastlockError, match=rf"of another search \(another {changed}"):
        calibrate(model, tokenizer, PAIRS, **options, **other)


def test_a_lower_cost_alone_needs_no_lock() -> None:
    as_it_is = at(0, 0.9, 0.05)
    assert best_strength([at(1, 0.9, 0.05, 0.5), at(2, 0.8, 0.1, 0.5), as_it_is]) == as_it_is
    for helps in (at(1, 0.95, 0.05), at(1, 0.9, 0.0)):
        assert best_strength([as_it_is, helps]) == helps


def test_the_strength_is_refined_around_the_best_and_then_wherever_little_was_tried() -> None:
    """What fits ends at a strength that is no power of 2; the more the stronger until there."""
    limit, tried = 0.3117, []
    for _ in range(30):
        strength = next_strength(tried)
        tried.append(at(strength, min(1.0, strength), 0.0, 1.0 if strength <= limit else 1.04))
    strengths = [trial.strength for trial in tried]
    assert strengths[:8] == [0.0, 1.0, 4.0, 0.25, 2.0, 0.5, 8.0, 0.125]
    assert len(set(strengths)) == 30
    assert limit - 0.01 < best_strength(tried[:18]).strength <= limit
    assert min(abs(a - b) for i, a in enumerate(strengths) for b in strengths[:i]) > 0.005 / 2
    assert {3.0, 5.0, 6.0, 7.0} <= set(strengths)


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


def test_a_stopped_search_for_a_strength_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    model, tokenizer = small()
    lock = random_lock(model)
    options: dict[str, Any] = {"lock": lock, "prompts": PROMPTS, "new_tokens": 3, "judge": odd, "trials": 12}
    journal = tmp_path / "not" / "there" / "journal.jsonl"

    def stopping(items: Any, description: str) -> Iterator[Any]:
        assert description == "Trying strengths"
        yield from list(items)[:9]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, tokenizer, journal=journal, progress=stopping, **options)
    resumed = calibrate(model, tokenizer, journal=journal, **options)
    assert resumed.trials == calibrate(model, tokenizer, **options).trials
    assert len(resumed.trials) == 12
    # a weaker lock of the same rows is another; its strength, which is searched, is not
    same = dataclasses.replace(lock, strength=3.0)
    assert calibrate(model, tokenizer, journal=journal, **(options | {"lock": same})).trials == resumed.trials
    written = journal.read_bytes()
    other = dataclasses.replace(lock, scales=lock.scales / 2)
    for changed, name in (({"lock": other}, "lock"), ({"lock": None}, "base, extraction set"), ({"seed": 1}, "set of")):
        with pytest.raises(FastlockError, match=rf"another search \(another {name}"):
            calibrate(model, tokenizer, journal=journal, **(options | changed))
    assert journal.read_bytes() == written
    of_base = tmp_path / "base.jsonl"
    calibrate(model, tokenizer, PAIRS, journal=of_base, prompts=PROMPTS, new_tokens=3, judge=odd, trials=1)
    with pytest.raises(FastlockError, match=r"another search \(another lock\)"):
        calibrate(model, tokenizer, journal=of_base, **options)


def test_a_model_is_another_when_its_files_are(tmp_path: Path) -> None:
    model, tokenizer = small()
    model.save_pretrained(tmp_path / "model")
    model.config._name_or_path = str(tmp_path / "model")
    options: dict[str, Any] = {"lock": random_lock(model), "prompts": PROMPTS, "new_tokens": 1, "trials": 1}
    options["journal"] = tmp_path / "journal.jsonl"
    calibrate(model, tokenizer, **options)
    calibrate(model, tokenizer, **options)
    os.utime(tmp_path / "model" / "model.safetensors", (1, 1))
    with pytest.raises(FastlockError, match=r"another search \(another model\)"):
        calibrate(model, tokenizer, **options)


BEGUN = '{"op_code":0,"worker_id":"x","study_name":"calibrate","directions":[2,1,1]}\n'
TRIAL = '{"op_code":4,"worker_id":"x","study_id":0,"datetime_start":null,"state":1,"value":null,"values":[0,0,1]}\n'


@pytest.mark.parametrize(
    "text",
    [
        *("{\n}\n", "{}\n", "[1]\n", '{"op_code":99,"worker_id":"x"}\n', "my notes", '{"op": "no end'),
        *('{"mine": 1}\n{"mine": 2}', f"{BEGUN}{BEGUN[:30]}{BEGUN}", f"{BEGUN}{BEGUN[:30]}{BEGUN}{BEGUN[:30]}"),
        *(f"{BEGUN}{TRIAL}", f"{BEGUN}\n", BEGUN + "[" * 100_000 + "\n", BEGUN.replace('"directions"', '"x"')),
    ],
    ids=lambda text: repr(text[:9]),
)
def test_a_journal_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    model, tokenizer = small()
    journal = tmp_path / "journal.jsonl"
    journal.write_text(text)
    with pytest.raises(fastlock.DamagedError, match=r"journal.jsonl: cannot be resumed .* Give another place"):
        calibrate(model, tokenizer, lock=random_lock(model), prompts=PROMPTS, new_tokens=1, journal=journal)
    assert journal.read_text() == text


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


def test_without_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    model, tokenizer = small()
    with pytest.raises(FastlockError, match=r"pip install 'fastlock\[calibrate\]'"):
        calibrate(model, tokenizer, PAIRS, prompts=PROMPTS, new_tokens=1)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `fastlock calibrate CHECKPOINT` on a tiny checkpoint, with options: what it prints."""
    model, tokenizer = small()
    model.save_pretrained(tmp_path / "CHECKPOINT")
    tokenizer.save_pretrained(tmp_path / "CHECKPOINT")
    random_lock(model).save(tmp_path / "given.safetensors")
    for kind, texts in vars(PROMPTS).items():
        (tmp_path / f"{kind}.txt").write_text("\n".join(texts))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*options: str, code: int = 0, kinds: Any = ("harmful", "harmless", "texts")) -> str:
        files = [part for kind in kinds for part in (f"--{kind}", f"{kind}.txt")]
        monkeypatch.setattr(sys, "argv", ["fastlock", "calibrate", "CHECKPOINT", *files, "--new-tokens", "1", *options])
        with pytest.raises(SystemExit) as end:
            cli.main()
        printed = capsys.readouterr()
        assert (end.value.code or 0) == code, printed
        return printed.out or printed.err

    return run


def test_the_command(command: Any) -> None:
    printed = json.loads(command("--out", "OUT", "--trials", "4", "--json"))
    assert printed == json.loads(Path("OUT/calibration.json").read_text())
    assert len(printed["trials"]) == 4
    assert printed["chosen"] in printed["frontier"]
    lock = fastlock.Lock.load("OUT/lock.safetensors")
    assert (lock.digest, lock.strength) == (printed["lock"], printed["chosen"]["strength"])
    assert "<svg" in Path("OUT/calibration.html").read_text()
    picture = Path("OUT/frontier.svg").read_text()
    assert picture.count("<circle") == 5  # the trials, and the ring
    assert "<style>" in picture  # it stands alone


def planted(monkeypatch: pytest.MonkeyPatch, kept: float) -> None:
    """Stand-in measurements of a model that refuses that much as it is; of a lock best at strength 1."""

    def measure(_self: Any, _lock: Any, strength: float) -> Measurement:
        return Measurement(max(kept, min(1.0, strength)), over_refusals=0.0, cost=1 + max(0, strength - 1))

    monkeypatch.setattr(Measuring, "measure", measure)


def test_the_command_for_a_lock(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, 0.0)
    assert "at strength 1\n" in command("--lock", "given.safetensors", "--out", "OUT")
    given, lock = fastlock.Lock.load("given.safetensors"), fastlock.Lock.load("OUT/lock.safetensors")
    assert (lock, lock.strength) == (given, 1.0)
    data = json.loads(Path("OUT/calibration.json").read_text())
    assert data["given lock"] == f"given.safetensors (sha256 {given.digest})"
    assert (data["lock"], data["why_no_lock"], len(data["trials"])) == (given.digest, None, 20)
    assert [one["strength"] for one in data["held_out"]] == [None, 1.0]
    assert Path("OUT/frontier.svg").read_text().count("<circle") == 21
    assert "<th>strength" in Path("OUT/calibration.html").read_text()
    assert "<th>recipe" not in Path("OUT/calibration.html").read_text()
    assert fastlock.relock(small()[0], lock).strength == 1.0


def test_the_command_writes_no_lock_where_none_is_needed(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor leaves the one that an earlier run there has chosen."""
    options = ["--lock", "given.safetensors", "--out", "OUT", "--trials", "2"]
    planted(monkeypatch, 0.0)
    command(*options)
    assert Path("OUT/lock.safetensors").exists()
    Path("OUT/journal.jsonl").unlink()
    planted(monkeypatch, 1.0)
    printed = command(*options)
    assert "This checkpoint needs no lock: without one, it refuses 100% of the harmful requests" in printed
    assert "No lock was written." in printed
    assert not Path("OUT/lock.safetensors").exists()
    assert json.loads(Path("OUT/calibration.json").read_text())["lock"] is None


def test_the_command_refuses_before_it_writes(command: Any) -> None:
    lock = ["--lock", "given.safetensors"]
    assert "--lock and --base are both given" in command(*lock, "--base", "CHECKPOINT", "--out", "OUT", code=2)
    assert "--lock and --pairs are both given" in command(*lock, "--pairs", "x.jsonl", "--out", "OUT", code=2)
    assert "--trials" in command(*lock, "--out", "OUT", "--trials", "0", code=2)
    Path("damaged.safetensors").write_bytes(Path("given.safetensors").read_bytes()[:-3])
    assert "damaged.safetensors: " in command("--lock", "damaged.safetensors", "--out", "OUT", code=cli.REFUSED)
    random_lock(tiny_model("llama", head_dim=16)).save("other.safetensors")
    assert "head_dim" in command("--lock", "other.safetensors", "--out", "OUT", code=cli.REFUSED)
    tiny_model("llama", vocab_size=4096).save_pretrained("BASE")
    assert "base: its num_layers is 3" in command("--base", "BASE", "--out", "OUT", code=cli.REFUSED)
    given = fastlock.Lock.load("given.safetensors")
    fastlock.relock_checkpoint("CHECKPOINT", given, "RELOCKED")
    Path("CHECKPOINT").rename("ORIGINAL")
    Path("RELOCKED").rename("CHECKPOINT")
    assert "is relocked" in command(*lock, "--out", "OUT", code=cli.REFUSED)
    assert not list(Path("OUT").iterdir())


@pytest.mark.parametrize("out", ["harmful.txt", "harmful.txt/deeper", "/proc/fastlock"])
def test_the_command_says_where_it_can_not_write(command: Any, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    """Before it loads a model."""
    monkeypatch.setattr("fastlock.models.loading.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    printed = command("--lock", "given.safetensors", "--out", out, code=cli.REFUSED)
    assert printed.startswith(f"fastlock: {out}: ")
    assert "Give another directory." in printed


def test_the_command_without_texts(command: Any) -> None:
    printed = json.loads(command("--out", "OUT", "--trials", "1", "--json", kinds=("harmful", "harmless")))
    assert printed["held_out"][0]["perplexity"] > 1
    assert "prompts: both harmful and harmless" in command("--out", "NEW", code=cli.REFUSED, kinds=("harmful", "texts"))


def test_the_command_that_is_stopped_goes_on(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steered(monkeypatch, 2)
    options = ["--out", "OUT", "--trials", "4", "--json"]
    assert command(*options, code=130) == "stopped; run the same command again to resume\n"
    assert [path.name for path in Path("OUT").iterdir()] == ["journal.jsonl"]
    with Path("OUT/journal.jsonl").open("ab") as journal:
        journal.write(b'{"op_code":4,"wor')
    steered(monkeypatch)
    resumed = json.loads(command(*options))
    assert resumed["trials"] == json.loads(command("--out", "NEW", "--trials", "4", "--json"))["trials"]


def test_the_command_keeps_out_of_another_calibration(command: Any) -> None:
    given = fastlock.Lock.load("given.safetensors")
    dataclasses.replace(given, scales=given.scales * 2).save("other.safetensors")
    command("--lock", "given.safetensors", "--out", "OUT", "--trials", "1")
    before = {path: path.read_bytes() for path in Path("OUT").iterdir()}
    refused = {"code": cli.REFUSED}
    assert "another lock" in command("--lock", "other.safetensors", "--out", "OUT", **refused)
    assert "another base" in command("--out", "OUT", **refused)
    os.utime("CHECKPOINT/model.safetensors", (1, 1))
    assert "another model" in command("--lock", "given.safetensors", "--out", "OUT", **refused)
    assert {path: path.read_bytes() for path in Path("OUT").iterdir()} == before
    given.save("OUT/lock.safetensors")
    assert "--lock is the file that would be written" in command(
        "--lock", "OUT/lock.safetensors", "--out", "./OUT", code=2
    )
    assert fastlock.Lock.load("OUT/lock.safetensors") == given


def test_the_picture_shows_every_trial_where_it_is() -> None:
    trials = (trial(1.0, 0.0, 1.0), trial(0.0, 1.0, 3.0))
    nothing: Any = None
    svg = picture(Calibration(nothing, trials[0], trials, nothing, nothing))
    assert 'cx="74.0" cy="20.0" r="4.5" fill="rgb(61,143,209)" fill-opacity=".8"' in svg
    assert 'cx="700.0" cy="356.0" r="4.5" fill="rgb(211,43,44)" fill-opacity="0"' in svg  # costs more than it may


def test_the_table_of_trials() -> None:
    made, given = trial(1.0, 0.0, 1.0), at(0.0)
    assert dict(zip(trial_columns(made), trial_cells(made), strict=True))["recipe"] == "prompt-end"
    assert dict(zip(trial_columns(given), trial_cells(given), strict=True))["strength"] == "0 (baseline)"
