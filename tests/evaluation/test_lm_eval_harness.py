"""Tasks of lm-evaluation-harness: a stand-in with its interface, and the real one."""

from __future__ import annotations

import contextlib
import json
import random
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch

import fastlock
from fastlock.evaluation import lm_eval_harness as tasks
from fastlock.evaluation.evaluator import Evaluation, evaluate
from fastlock.evaluation.lm_eval_harness import Score
from fastlock.evaluation.prompts import Prompts
from fastlock.evaluation.report import report_html, report_markdown
from fastlock.models.loading import load_model, load_tokenizer
from fastlock.models.unfolded import unfolded
from tests.helpers.command import run_command
from tests.helpers.families import random_lock, same_state, state
from tests.helpers.reading import Numbers, exact_model

TEXTS = Prompts(texts=("8 13 18", "6", "14 23 32 41 50"))


@pytest.fixture
def harness(monkeypatch):
    """What stands in for lm-evaluation-harness; a dictionary of what it is to do, and what it was asked."""
    seen: dict[str, Any] = {"asked": [], "room": 99, "error": None}

    def simple_evaluate(model: Any, tasks: list[str], task_manager: Any, log_samples: bool) -> Any:
        seen["asked"].append((tasks, model.batch_size))
        random.seed(0)
        np.random.seed(1234)
        torch.manual_seed(1234)
        if model.batch_size > seen["room"]:
            raise torch.OutOfMemoryError("too much")
        if seen["error"]:
            raise seen["error"]
        assert not model.pretrained.training
        assert not torch.is_grad_enabled()
        value = float(sum(model.pretrained(torch.tensor([[5, 6]])).logits.sum() for _ in range(1)))
        return {
            "results": {
                "arc": {"alias": "arc", "sample_len": 7, "acc,none": value, "acc_stderr,none": 0.25},
                "gsm": {"alias": "gsm", "exact,strict": 0.5, "exact_stderr,strict": "N/A", "bypass,none": "N/A"},
            }
        }

    class HFLM:
        def __init__(self, pretrained: Any, tokenizer: Any, batch_size: int) -> None:
            self.pretrained, self.batch_size = pretrained, batch_size
            tokenizer.pad_token_id = 77

    fake = types.ModuleType("lm_eval")
    fake.simple_evaluate = simple_evaluate
    fake.tasks = types.ModuleType("lm_eval.tasks")
    fake.tasks.TaskManager = lambda: types.SimpleNamespace(all_tasks=["arc", "gsm"])
    models = types.ModuleType("lm_eval.models.huggingface")
    models.HFLM = HFLM
    for name, module in {"": fake, ".tasks": fake.tasks, ".models": models, ".models.huggingface": models}.items():
        monkeypatch.setitem(sys.modules, "lm_eval" + name, module)
    tasks._manager.cache_clear()
    yield seen
    tasks._manager.cache_clear()


def test_tasks_before_and_after(harness) -> None:
    model = exact_model("llama").train()
    lock = random_lock(model)
    found = evaluate(model, Numbers(True), TEXTS, [(lock, 9.0)], tasks=["arc", "gsm"], batch_size=8)
    assert harness["asked"] == [(["arc", "gsm"], 8)] * 2
    for one, strength in zip(found, (0.0, 9.0), strict=True):
        with unfolded(model, lock, strength), torch.no_grad():
            value = float(model(torch.tensor([[5, 6]])).logits.sum())
        assert one.tasks[0] == Score("arc", "acc", pytest.approx(value, rel=1e-6), 0.25)
        assert one.tasks[1:] == (Score("gsm", "exact (strict)", 0.5, None),)
        assert Evaluation.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    table = report_markdown(found, {})
    assert "| perplexity | arc acc | gsm exact (strict) |" in table
    assert f"| {found[1].tasks[0].value:.3f} ± 0.250 | 0.500 |" in table
    assert "<h2>arc: acc</h2>" in report_html(found, {})


@pytest.mark.parametrize("error", [None, ValueError("no")])
def test_tasks_leave_random_numbers_and_the_tokenizer_as_they_were(harness, error: Exception | None) -> None:
    model, tokenizer = exact_model("llama"), Numbers(True)
    harness["error"] = error
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with contextlib.suppress(fastlock.FastlockError):
        evaluate(model, tokenizer, TEXTS, tasks=["arc"])
    assert harness["asked"]
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert tokenizer.pad_token_id is None


def test_tasks_that_fail(harness) -> None:
    model = exact_model("llama")
    with pytest.raises(fastlock.FastlockError, match="no task 'nope'"):
        evaluate(model, Numbers(True), TEXTS, tasks=["arc", "nope"])
    assert not harness["asked"]
    harness["room"] = 3
    evaluate(model, Numbers(True), TEXTS, tasks=["arc"], batch_size=16)
    assert [size for _, size in harness["asked"]] == [16, 8, 4, 2]
    harness["room"] = 0
    with pytest.raises(fastlock.FastlockError, match="memory runs out in arc"):
        evaluate(model, Numbers(True), TEXTS, tasks=["arc"])
    harness |= {"room": 99, "error": ConnectionError("no hub")}
    with pytest.raises(fastlock.FastlockError, match=r"cannot run arc \(ConnectionError: no hub\)"):
        evaluate(model, Numbers(True), TEXTS, tasks=["arc"])


def test_tasks_without_the_harness(monkeypatch) -> None:
    tasks._manager.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(fastlock.FastlockError, match=r"pip install 'fastlock\[lm-eval\]'"):
        evaluate(exact_model("llama"), Numbers(True), TEXTS, tasks=["arc"])


def test_the_real_harness(directory, monkeypatch) -> None:
    manager = pytest.importorskip("lm_eval.tasks").TaskManager
    entries = [{"q": f"w{i} w{i + 1}", "choices": [f"w{i + 2}", f"w{i + 9}"], "gold": i % 2} for i in range(10, 40)]
    (directory / "words.jsonl").write_text("\n".join(map(json.dumps, entries)))
    task = {
        "task": "words",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(directory / "words.jsonl")},
            "cache_dir": str(directory / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (directory / "words.yaml").write_text(json.dumps(task))  # JSON is YAML, too
    known = manager(include_path=str(directory), include_defaults=False)
    monkeypatch.setattr(tasks, "_manager", lambda: known)
    model, tokenizer = load_model(directory / "model"), load_tokenizer(directory / "model")
    tokenizer.pad_token = tokenizer.eos_token = "<unk>"  # it wants them
    lock, before = random_lock(model), state(model)
    found = evaluate(model, tokenizer, Prompts(texts=("w5 w6",)), [(lock, 9.0)], tasks=["words"])
    for one, strength in zip(found, (0.0, 9.0), strict=True):
        right = 0
        for entry in entries:
            ids = tokenizer(entry["q"])["input_ids"]
            with unfolded(model, lock, strength), torch.no_grad():
                ranks = model(torch.tensor([ids])).logits[0, -1]
            first, second = (ranks[int(choice[1:])] for choice in entry["choices"])
            right += int(second > first) == entry["gold"]
        assert [(score.metric, score.value) for score in one.tasks] == [("acc", right / len(entries))]
    assert same_state(state(model), before)
    # And by the command.
    tokenizer.save_pretrained(directory / "model")
    lock.save(directory / "lock.safetensors")
    options = ["--lock", directory / "lock.safetensors", "--strength", 9, "--texts", directory / "texts.txt", "--json"]
    printed = run_command("evaluate", directory / "model", *options, "--task", "words")
    assert [one["tasks"] for one in json.loads(printed.out)["evaluations"]] == [[vars(one.tasks[0])] for one in found]
