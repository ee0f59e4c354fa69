"""Tasks of lm-evaluation-harness, which comes with `pip install 'fastlock[lm-eval]'`."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fastlock.errors import FastlockError


@dataclass(frozen=True)
class Score:
    """A model's score in a task.

    Attributes:
        task: the task's name.
        metric: the metric's name, with its filter's where it has one.
        value: the score.
        error: its standard error; None where the task gives none.
    """

    task: str
    metric: str
    value: float
    error: float | None


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse tasks that cannot be run.

    Raises:
        FastlockError: lm-evaluation-harness is not installed, or has no such task.
    """
    if not tasks:
        return
    names = set(_manager().all_tasks)
    if unknown := [task for task in tasks if task not in names]:
        raise FastlockError(f"lm-evaluation-harness has no task {unknown[0]!r}. `lm-eval ls tasks` lists its tasks.")


def scores(model: nn.Module, tokenizer: Any, tasks: Sequence[str], batch_size: int) -> tuple[Score, ...]:
    """A model's scores in tasks.

    Args:
        model: a transformers model, in eval mode.
        tokenizer: its tokenizer, which is left as it is.
        tasks: names of tasks.
        batch_size: how many prompts go together; halved as often as memory runs out.

    Raises:
        FastlockError: lm-evaluation-harness is not installed or cannot run them, or memory runs out with one prompt.
    """
    if not tasks:
        return ()
    results = _results(model, tokenizer, tasks, batch_size)
    if results is not None:
        return _scores(results)
    if batch_size == 1:
        raise FastlockError(
            f"memory runs out in {', '.join(tasks)} with one prompt at a time. Load the model in fewer bits, or on a "
            "larger device."
        )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return scores(model, tokenizer, tasks, batch_size // 2)


def _results(model: nn.Module, tokenizer: Any, tasks: Sequence[str], batch_size: int) -> dict[str, Any] | None:
    """What the harness says of each task; None where memory runs out."""
    harness, manager = _harness(), _manager()
    from lm_eval.models.huggingface import HFLM

    try:
        with _same_random_numbers():
            # It changes a tokenizer's padding, so it gets a copy.
            wrapped = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
            output = harness.simple_evaluate(model=wrapped, tasks=list(tasks), task_manager=manager, log_samples=False)
    except torch.OutOfMemoryError:
        return None
    except Exception as error:  # it raises whatever its parts raise
        raise FastlockError(
            f"lm-evaluation-harness cannot run {', '.join(tasks)} ({type(error).__name__}: {str(error)[:300]}). Its "
            "data sets come from the Hugging Face Hub: check that it can be reached, or that they are in its cache."
        ) from error
    results: dict[str, Any] = output["results"]
    return results


def _scores(results: dict[str, dict[str, Any]]) -> tuple[Score, ...]:
    """The scores in the harness's results, which hold "acc,none" and "acc_stderr,none" (or "N/A") beside other keys."""
    scores = []
    for task, entries in results.items():
        for key, value in entries.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            error = entries.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else f"{metric} ({kind})"
            is_number = isinstance(error, int | float) and math.isfinite(error)
            scores.append(Score(task, name, float(value), float(error) if is_number else None))  # type: ignore[arg-type]
    return tuple(scores)


@contextlib.contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Leave the state of random numbers as it was: the harness seeds all generators."""
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    has_gpus = torch.cuda.is_available()
    gpu_states = torch.cuda.get_rng_state_all() if has_gpus else []
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if has_gpus:
            torch.cuda.set_rng_state_all(gpu_states)


@functools.cache
def _manager() -> Any:
    """The harness's index of tasks; making it reads thousands of files."""
    return _harness().tasks.TaskManager()


def _harness() -> Any:
    try:
        import lm_eval
        import lm_eval.tasks
    except ImportError as error:
        raise FastlockError(
            f"tasks need lm-evaluation-harness, which cannot be imported ({error}): pip install 'fastlock[lm-eval]'"
        ) from None
    return lm_eval
