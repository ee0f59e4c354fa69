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
    """What a model reached in a task.

    Attributes:
        task: its name.
        metric: the metric, with its filter's name where it has one.
        value: of the metric.
        error: its standard error; None where the task gives none.
    """

    task: str
    metric: str
    value: float
    error: float | None


def check_tasks(tasks: Sequence[str]) -> None:
    """Raise a FastlockError if lm-evaluation-harness is not there, or has no such task."""
    if not tasks:
        return
    known = set(_manager().all_tasks)
    if unknown := [task for task in tasks if task not in known]:
        raise FastlockError(f"lm-evaluation-harness has no task {unknown[0]!r}. `lm-eval ls tasks` lists what it has.")


def scores(model: nn.Module, tokenizer: Any, tasks: Sequence[str], batch_size: int) -> tuple[Score, ...]:
    """What a model reaches in tasks, in batches that are halved as often as memory runs out.

    Raises:
        FastlockError: lm-evaluation-harness is not there, or can't run them.
    """
    if not tasks:
        return ()
    harness = _harness()
    manager = _manager()
    from lm_eval.models.huggingface import HFLM

    try:
        with _same_random_numbers():
            # It gives a tokenizer another padding: let it be a copy's.
            wrapped = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
            found = harness.simple_evaluate(model=wrapped, tasks=list(tasks), task_manager=manager, log_samples=False)
    except torch.OutOfMemoryError:
        found = None
    except Exception as error:  # it raises whatever its parts raise
        raise FastlockError(
            f"lm-evaluation-harness can't run {', '.join(tasks)} ({type(error).__name__}: {str(error)[:300]}). Its "
            "data sets come from the Hugging Face Hub: is it in reach, or are they in its cache?"
        ) from error
    if found is not None:
        return _scores(found["results"])
    if batch_size == 1:
        raise FastlockError(
            f"memory runs out in {', '.join(tasks)} with one prompt at once. Load the model in fewer bits, or on a "
            "larger device."
        )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return scores(model, tokenizer, tasks, batch_size // 2)


def _scores(results: dict[str, dict[str, Any]]) -> tuple[Score, ...]:
    """Its results hold "acc,none": value and "acc_stderr,none": its standard error, or "N/A", beside names."""
    found = []
    for task, of_task in results.items():
        for key, value in of_task.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            error = of_task.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else f"{metric} ({kind})"
            held = isinstance(error, int | float) and math.isfinite(error)
            found.append(Score(task, name, float(value), float(error) if held else None))  # type: ignore[arg-type]
    return tuple(found)


@contextlib.contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Afterwards random numbers go on as if nothing had been: the harness seeds all of them anew."""
    states, on_gpus = (random.getstate(), np.random.get_state(), torch.get_rng_state()), torch.cuda.is_available()
    of_gpus = torch.cuda.get_rng_state_all() if on_gpus else []
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_gpus:
            torch.cuda.set_rng_state_all(of_gpus)


@functools.cache
def _manager() -> Any:
    """What knows the tasks; it reads thousands of files."""
    return _harness().tasks.TaskManager()


def _harness() -> Any:
    try:
        import lm_eval
        import lm_eval.tasks
    except ImportError as error:
        raise FastlockError(
            f"tasks need lm-evaluation-harness, which can't be imported ({error}): pip install 'fastlock[lm-eval]'"
        ) from None
    return lm_eval
