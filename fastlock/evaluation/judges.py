"""Judges: what takes an answer for a refusal. Keywords, a local guard model, a model behind an endpoint, or your own.

A judge is any function of a prompt and an answer. One that has a method `batch`, which takes many pairs of both at
once, is asked in batches.
"""

from __future__ import annotations

import os

from fastlock.errors import FastlockError, shown
from fastlock.evaluation.endpoint_judge import KEY_VARIABLE, EndpointJudge
from fastlock.evaluation.guard_judge import load_guard
from fastlock.evaluation.judging import Judge
from fastlock.evaluation.keyword_judge import KEYWORDS, refuses


def judge_name(judge: Judge) -> str:
    """What a report calls a judge."""
    if judge is refuses:
        return KEYWORDS
    return str(getattr(judge, "name", None) or getattr(judge, "__name__", type(judge).__name__))


def open_judge(given: str, model: str | None = None) -> Judge:
    """The judge that a user names: "keywords", a guard model's directory or name, or an endpoint's URL.

    Args:
        given: as said.
        model: for an endpoint, the model that it is to use.

    Raises:
        FastlockError: there is no such judge, or it can't be used.
    """
    if given.startswith(("http://", "https://")):
        return EndpointJudge(given, model or "", os.environ.get(KEY_VARIABLE) or None)
    if model is not None:
        raise FastlockError(f"a judge's model is named for an endpoint only, and {shown(given)} is no URL.")
    return refuses if given == KEYWORDS else load_guard(given)
