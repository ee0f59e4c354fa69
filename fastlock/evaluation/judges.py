"""The table of judges: which kind of judge a user names, and what a report calls a judge."""

from __future__ import annotations

from fastlock.errors import FastlockError, shown
from fastlock.evaluation import endpoint_judge, guard_judge, keyword_judge
from fastlock.evaluation.judging import Judge, JudgeKind

# The first kind that matches a name is its kind; the last one matches any name.
_KINDS: tuple[JudgeKind, ...] = (keyword_judge.KIND, endpoint_judge.KIND, guard_judge.KIND)


def judge_name(judge: Judge) -> str:
    """What a report calls a judge."""
    if judge is keyword_judge.refuses:
        return keyword_judge.KEYWORDS
    return str(getattr(judge, "name", None) or getattr(judge, "__name__", type(judge).__name__))


def open_judge(name: str, model: str | None = None) -> Judge:
    """The judge that a user names.

    Args:
        name: "keywords", the directory or the name of a guard model, or the URL of an endpoint.
        model: for an endpoint, the model that is to judge.

    Raises:
        FastlockError: there is no such judge, it cannot be used, or a model is named for another judge than an
            endpoint.
    """
    kind = next(kind for kind in _KINDS if kind.matches(name))
    if model is not None and not kind.takes_model:
        raise FastlockError(
            f"a judge's model can be named only for an endpoint, and {shown(name)} is not a URL. Leave the model out "
            "(--judge-model), or give the endpoint's URL."
        )
    return kind.open(name, model)
