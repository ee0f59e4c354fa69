"""The search for the best lock: on measured stand-ins, on tiny models, and as a command."""

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny_model, word_tokenizer

import fastlock
from fastlock import cli
from fastlock.calibrate import Calibration, Trial, best, calibrate, frontier
from fastlock.calibrate_report import picture
from fastlock.errors import FastlockError
from fastlock.prompts import Prompts

module = importlib.import_module("fastlock.calibrate")  # the package's name `calibrate` is the function
PAIRS = fastlock.shipped_pairs()[:6]
PROMPTS = Prompts(
    harmful=tuple(f"harm {i} it" for i in range(8)),
    harmless=tuple(f"good {i} day" for i in range(6)),
    texts=("the quick brown fox jumps", "over the lazy dog again", "and once more"),
)


def trial(refusals: float, over_refusals: float, cost: float, heads: int = 4) -> Trial:
    return Trial("prompt-end", 1, heads, 1.0, refusals, over_refusals, cost)


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


def test_without_one_that_fits_the_best_compromise_is() -> None:
    compromise = trial(0.9, 0.1, 1.1)
    assert best([trial(1.0, 0.9, 1.0), compromise, trial(0.95, 0.1, math.e)]) == compromise


def test_calibration_finds_what_is_planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-in measurements with one good corner: many refusals only from prompt-end, at a strength about 2."""
    model, tokenizer = small()

    def measure(_self: Any, lock: Any, strength: float) -> dict[str, float]:
        right = lock.recipe.startswith("prompt-end")
        return {"refusals": math.exp(-(math.log(strength / 2) ** 2)) if right else 0.1, "over_refusals": 0.0, "cost": 1}

    monkeypatch.setattr(module._Asking, "measure", measure)
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
        lock = fastlock.extract(model, tokenizer, PAIRS, tried.heads, tried.last_tokens, recipe=tried.recipe)
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
        fastlock.extract(network, tokenizer, PAIRS, chosen.heads, chosen.last_tokens, recipe=chosen.recipe)
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
    with pytest.raises(FastlockError, match=r"journal.jsonl: is of another search \(another length of answers\)"):
        calibrate(model, tokenizer, PAIRS, trials=5, **(options | {"new_tokens": 2}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trials": 0}, "trials is 0; it must be a whole number from 1"),
        ({"trials": True}, "trials is True"),
        ({"seed": -1}, "seed is -1"),
        ({"prompts": Prompts(harmful=("a", "b"))}, "prompts: harmful and harmless prompts are both needed"),
        ({"held_out": Prompts(harmless=("a", "b"))}, "held_out: harmful and harmless prompts are both needed"),
        ({"prompts": Prompts(("a",), ("b", "c"))}, "harmful: one alone can't both decide and be held out"),
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


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = small()
    model.save_pretrained(tmp_path / "CHECKPOINT")
    tokenizer.save_pretrained(tmp_path / "CHECKPOINT")
    for kind, texts in vars(PROMPTS).items():
        (tmp_path / f"{kind}.txt").write_text("\n".join(texts))
    monkeypatch.chdir(tmp_path)
    files = [part for kind in vars(PROMPTS) for part in (f"--{kind}", f"{kind}.txt")]
    command = ["fastlock", "calibrate", "CHECKPOINT", *files, "--out", "OUT", "--trials", "4", "--new-tokens", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--json"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(Path("OUT/calibration.json").read_text())
    assert len(printed["trials"]) == 4
    assert printed["chosen"] in printed["frontier"]
    lock = fastlock.Lock.load("OUT/lock.safetensors")
    assert (lock.digest, lock.strength) == (printed["lock"], printed["chosen"]["strength"])
    assert "<svg" in Path("OUT/calibration.html").read_text()
    assert Path("OUT/frontier.svg").read_text().count("<circle") == 5  # the trials, and the ring


def test_the_picture_shows_every_trial_where_it_is() -> None:
    trials = (trial(1.0, 0.0, 1.0), trial(0.0, 1.0, 3.0))
    nothing: Any = None
    svg = picture(Calibration(nothing, trials[0], trials, nothing, nothing))
    assert 'cx="60.0" cy="20.0" r="4.5" fill="rgb(61,143,209)"' in svg
    assert 'cx="700.0" cy="370.0" r="4.5" fill="rgb(211,43,44)"' in svg
