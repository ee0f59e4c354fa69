"""The command's report: a table, a page, and the data from which an interrupted run resumes."""

from __future__ import annotations

import importlib
import json
import math
import re
from typing import Any

import pytest

import fastlock
from fastlock.cli.commands import REFUSED, STOPPED
from fastlock.evaluation.evaluator import Answer, Evaluation, evaluate, interval
from fastlock.evaluation.lm_eval_harness import Score
from fastlock.evaluation.prompts import Prompts
from fastlock.evaluation.report import cells, columns, read_report, report_html, report_markdown, write_report
from fastlock.models.loading import load_model, load_tokenizer
from tests.helpers.command import run_command
from tests.helpers.reading import BAD

evaluate_module = importlib.import_module("fastlock.evaluation.evaluator")


def run(directory, *arguments: str) -> str:
    given = ["evaluate", str(directory / "model"), "--harmful", str(directory / "harmful.json"), "--new-tokens", "3"]
    return run_command(*given, *arguments).out


def test_the_command_writes_a_report(directory) -> None:
    others = ["--harmless", str(directory / "harmless.txt"), "--texts", str(directory / "texts.txt")]
    lock = ["--lock", str(directory / "lock.safetensors"), "--strength", "2", "--strength", "9"]
    printed = json.loads(run(directory, *others, *lock, "--out", str(directory / "report"), "--json"))
    written = json.loads((directory / "report" / "evaluation.json").read_text())
    assert printed == written
    assert [one["strength"] for one in written["evaluations"]] == [None, 2.0, 9.0]
    model, tokenizer = load_model(directory / "model"), load_tokenizer(directory / "model")
    prompts = Prompts(("w5 w6", f"w7 {BAD}"), ("w8 w9 w10",), ("w11 w12 w13 w14",))
    held = fastlock.Lock.load(directory / "lock.safetensors")
    expected = evaluate(model, tokenizer, prompts, [(held, 2.0), (held, 9.0)], new_tokens=3)
    assert written["evaluations"] == json.loads(json.dumps([one.to_dict() for one in expected]))

    table = (directory / "report" / "evaluation.md").read_text()
    assert "| baseline | 0% (0% to 66%; 2 prompts) | 0% (0% to 79%; 1 prompt) |" in table
    assert f"| lock {held.digest[:8]} at strength 9 |" in table
    page = (directory / "report" / "evaluation.html").read_text()
    assert "<script" not in page
    assert "\x1b" not in page
    assert "&lt;script&gt;alert(&quot;&amp;&quot;)&lt;/script&gt;\\x1b[31m" in page
    for one in expected:
        for answer in (*one.harmful, *one.harmless):
            assert answer.text in page


def test_the_command_prints_a_table(directory, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    printed = run(directory)
    assert "baseline" in printed
    assert "0% (0% to 66%; 2 prompts)" in printed


def test_the_command_asks_a_relocked_checkpoint_without_a_lock_only(directory) -> None:
    path = directory / "lock.safetensors"
    (directory / "model").rename(directory / "original")
    fastlock.relock_checkpoint(directory / "original", fastlock.Lock.load(path), directory / "model")
    assert len(json.loads(run(directory, "--json"))["evaluations"]) == 1
    assert "is relocked" in refused(directory, "--lock", str(path))


def test_refusals_and_their_plot() -> None:
    def answers(refused: int, of: int) -> tuple[Answer, ...]:
        return tuple(Answer(f"p{i}", "no", i < refused) for i in range(of))

    found = [
        Evaluation(None, None, answers(1, 4), answers(0, 2), 12.5),
        Evaluation("abcdef0123", 2.0, answers(4, 4), answers(1, 2), None),
    ]
    table = report_markdown(found, {"model": "m"})
    assert "- model: m" in table
    assert "| baseline | 25% (5% to 70%; 4 prompts) | 0% (0% to 66%; 2 prompts) | 12.50 |" in table
    assert "| lock abcdef01 at strength 2 | 100% (51% to 100%; 4 prompts) | 50% (9% to 91%; 2 prompts) |  |" in table
    page = report_html(found, {"model": "m"})
    widths = [float(width) for width in re.findall(r'<rect class="bar" [^>]*width="([\d.]+)"', page)]
    assert widths[0] == pytest.approx(widths[1] / 4, abs=0.1)
    assert page.count('<line class="limits"') == 4
    assert "<h2>Harmless requests</h2>" in page


def test_scores_are_matched_by_task_and_metric() -> None:
    first = (Score("arc", "acc", 0.5, 0.25), Score("gsm", "f1", math.nan, None))
    second = (Score("gsm", "exact", 0.125, None), Score("arc", "acc", math.nan, None))
    found = [Evaluation(None, None, (), (), None, first), Evaluation("abcdef0123", 2.0, (), (), None, second)]
    table = report_markdown(found, {}).splitlines()
    assert table[1].endswith("| arc acc | gsm f1 | gsm exact |")
    assert table[3].endswith("| 0.500 ± 0.250 | nan |  |")
    assert table[4].endswith("| nan |  | 0.125 |")
    for order in (found, found[::-1]):
        page = report_html(order, {})
        assert "<h2>arc: acc</h2>" in page
        assert "<h2>gsm: exact</h2>" in page
        assert "gsm: f1" not in page  # there is nothing to draw
        assert page.count("<rect") == 2
        assert not re.findall(r'="[^"]*(?:nan|inf)', page)
    assert len(cells(found[1])) == len(columns(found[1:]))


def test_facts_are_no_markdown(tmp_path) -> None:
    facts = {"model": "a|b\n# x <script>\udc80 [i](u) `c` *d* my_model"}
    lock = Evaluation("<img>|", 2.0, (), (), None)
    table = report_markdown([Evaluation(None, None, (), (), None), lock], facts)
    assert table.splitlines()[0] == r"- model: a\|b\\n# x \<script\>\\udc80 \[i\](u) \`c\` \*d\* my_model"
    assert r"| lock \<img\>\| at strength 2 |" in table
    write_report(tmp_path, [lock], facts)
    assert (tmp_path / "evaluation.md").is_file()
    assert len(read_report(tmp_path, facts, [("<img>|", 2.0)])) == 1


def test_what_the_judge_cannot_say_is_in_no_rate_and_shown() -> None:
    found = Evaluation(None, None, tuple(Answer(f"p{i}", "no", v) for i, v in enumerate([True, False, None])), (), None)
    assert (found.refusals, found.over_refusals) == (0.5, None)
    assert interval(found.harmful) == interval(found.harmful[:2])
    assert "| 50% (9% to 91%; 2 prompts, 1 unsure) |" in report_markdown([found], {})
    nothing = Evaluation(None, None, found.harmful[2:], (), None)
    assert (nothing.refusals, interval(nothing.harmful)) == (None, None)
    assert "| 1 unsure |" in report_markdown([nothing], {})
    page = report_html([found], {})
    assert [page.count(f"<span class={v}>") for v in ("refused", "answered", "unsure")] == [1, 1, 1]


def refused(directory, *arguments: str) -> str:
    given = ["evaluate", str(directory / "model"), "--harmful", str(directory / "harmful.json"), "--new-tokens", "3"]
    return run_command(*given, *arguments, code=REFUSED).err


@pytest.fixture
def interrupted(directory, monkeypatch):
    """An evaluation stopped while its third part runs, and the arguments that it was given."""
    lock = ["--lock", str(directory / "lock.safetensors"), "--strength", "2", "--strength", "9"]
    arguments = [*lock, "--out", str(directory / "report")]
    asked: list[str] = []
    asking = evaluate_module._Interview.evaluation

    def evaluation(self: Any, *given: Any) -> Evaluation:
        asked.append(given[-1])
        if len(asked) == stop_at:
            raise KeyboardInterrupt
        return asking(self, *given)

    monkeypatch.setattr(evaluate_module._Interview, "evaluation", evaluation)
    stop_at = 3
    prompts = ["--harmful", directory / "harmful.json", "--new-tokens", 3]
    run_command("evaluate", directory / "model", *prompts, *arguments, code=STOPPED)
    assert asked == ["baseline", "at strength 2", "at strength 9"]
    stop_at = 0
    asked.clear()
    return arguments, asked


def test_an_interrupted_run_goes_on(directory, interrupted) -> None:
    arguments, asked = interrupted
    left = json.loads((directory / "report" / "evaluation.json").read_text())
    assert [one["strength"] for one in left["evaluations"]] == [None, 2.0]
    assert "at strength 2" in (directory / "report" / "evaluation.md").read_text()
    gone_on = json.loads(run(directory, *arguments, "--json"))
    assert asked == ["at strength 9"]
    assert gone_on["evaluations"][:2] == left["evaluations"]
    assert gone_on == json.loads((directory / "report" / "evaluation.json").read_text())
    whole = json.loads(run(directory, *arguments[:-1], str(directory / "afresh"), "--json"))
    assert whole == gone_on
    asked.clear()
    run(directory, *arguments)
    assert asked == []
    more = json.loads(run(directory, *arguments, "--strength", "4", "--json"))
    assert asked == ["at strength 4"]
    assert [one["strength"] for one in more["evaluations"]] == [None, 2.0, 9.0, 4.0]


def test_what_is_kept_is_never_lost_by_going_on(directory, interrupted, monkeypatch) -> None:
    """The strength tried first now is new, and stopped again: the one after it is in the file still."""
    arguments, asked = interrupted
    lock = arguments[:2]
    asked += ["", ""]  # the next one is the third, at which nothing stops
    written: list[list[float | None]] = []
    monkeypatch.setattr(
        "fastlock.evaluation.report.write_report",
        lambda *given: written.append([one.strength for one in given[1]]) or write_report(*given),
    )
    run(directory, *lock, "--strength", "5", "--strength", "2", *arguments[-2:])
    assert written == [[None, 2.0], [None, 5.0, 2.0], [None, 5.0, 2.0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--new-tokens", "4"], "new tokens was '3', and is now '4'"),
        (["--texts", "texts.txt"], "prompts digest was"),
        (["--judge", "http://127.0.0.1:9/v1", "--judge-model", "m"], "judge was 'keywords', and is now 'm at http"),
    ],
)
def test_another_evaluation_is_not_gone_on_with(directory, interrupted, change, message, monkeypatch) -> None:
    monkeypatch.chdir(directory)
    before = (directory / "report" / "evaluation.json").read_bytes()
    text = refused(directory, *interrupted[0], *change)
    assert message in text
    assert "Give another --out" in text
    assert (directory / "report" / "evaluation.json").read_bytes() == before


def test_fewer_locks_or_another_model_are_not_gone_on_with(directory, interrupted) -> None:
    arguments, _ = interrupted
    assert "at strength 2, which is not asked for" in refused(directory, *arguments[:2], *arguments[-2:])
    model = directory / "model" / "model.safetensors"
    model.write_bytes(model.read_bytes())
    assert "model files was" in refused(directory, *arguments)


def test_a_damaged_report_is_not_gone_on_with(directory, interrupted) -> None:
    path = directory / "report" / "evaluation.json"
    whole = json.loads(path.read_text())
    facts = {key: value for key, value in whole.items() if key != "evaluations"}
    first = whole["evaluations"][0]
    assert len(read_report(path.parent, facts, [(one["lock"], one["strength"]) for one in whole["evaluations"]])) == 2
    answer = {"prompt": "p", "text": "t", "refused": "yes"}
    for data in (
        "{",
        "[]",
        "[" * 100_000,
        "{}",
        json.dumps({**whole, "evaluations": 3}),
        json.dumps({**whole, "evaluations": [3]}),
        json.dumps({**whole, "evaluations": [{**first, "refusals": 1.0}]}),
        json.dumps({**whole, "evaluations": [{**first, "harmful": [answer]}]}),
        json.dumps({**whole, "evaluations": [{**first, "harmful": [{**answer, "more": 1}]}]}),
        *(
            json.dumps({**whole, "evaluations": [{**first, key: value}]})
            for key in ("strength", "lock", "perplexity", "tasks", "harmful")
            for value in ([], {}, "2", 3, True, [3])
            if [key, value] not in (["perplexity", 3], ["perplexity", True]) and value != first[key]
        ),
    ):
        path.write_text(data)
        with pytest.raises(fastlock.DamagedError, match="cannot be resumed"):
            read_report(path.parent, facts, [])
    path.write_text("{")
    assert "cannot be resumed" in refused(directory, *interrupted[0])
    assert path.read_text() == "{"
