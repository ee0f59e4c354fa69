"""`fastlock evaluate`: what a model refuses, without and with locks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastlock.cli.commands import ArgumentsError, Command, option
from fastlock.cli.options import JSON, batch_size, new_tokens, path, prompts_in
from fastlock.cli.output import print_json, print_table, progress_bar, spinner

if TYPE_CHECKING:
    from pathlib import Path

    from fastlock.evaluation.evaluator import Evaluation
    from fastlock.evaluation.judging import Judge
    from fastlock.evaluation.prompts import Prompts


def _evaluate(
    model: str,
    locks: list[Path] | None,
    strengths: list[float] | None,
    harmful: Path | None,
    harmless: Path | None,
    texts: Path | None,
    judge: str,
    judge_model: str | None,
    tasks: list[str] | None,
    new_tokens: int,
    batch_size: int,
    out: Path | None,
    as_json: bool,
) -> None:
    if strengths and not locks:
        raise ArgumentsError("--strength is how hard a lock pulls. Give the lock as well: --lock.")
    from fastlock.evaluation.evaluator import evaluate
    from fastlock.evaluation.judges import open_judge
    from fastlock.evaluation.lm_eval_harness import check_tasks
    from fastlock.evaluation.report import columns, table_rows, to_json
    from fastlock.locks.lock import Lock, strength_for
    from fastlock.models.loading import load_model, load_tokenizer
    from fastlock.storage.places import writable_directory

    prompts = prompts_in(harmful, harmless, texts)
    loaded = [Lock.load(file) for file in locks or []]
    tried = [(lock, strength) for lock in loaded for strength in strengths or [strength_for(lock, None)]]
    check_tasks(tasks or [])
    if out is not None:
        writable_directory(out)
    with spinner(f"loading {model}", as_json):
        network, tokenizer = load_model(model, to_run=True), load_tokenizer(model)
    with spinner(f"opening the judge {judge}", as_json):
        opened = open_judge(judge, judge_model)
    facts = _facts(model, prompts, opened, new_tokens, tasks or [])
    report = _Report(out, facts, [(lock.digest, strength) for lock, strength in tried])
    with progress_bar(as_json) as progress:
        evaluations = evaluate(
            network,
            tokenizer,
            prompts,
            tried,
            judge=opened,
            new_tokens=new_tokens,
            batch_size=batch_size,
            progress=progress,
            tasks=tasks or [],
            known=report.known,
            finished=report.write,
        )
    if as_json:
        print_json(to_json(evaluations, facts))
    else:
        print_table(columns(evaluations), table_rows(evaluations))


def _facts(model: str, prompts: Prompts, judge: Judge, new_tokens: int, tasks: list[str]) -> dict[str, str]:
    """What an evaluation depends on: another run resumes it only if all of this is the same."""
    from fastlock.evaluation.judges import judge_name
    from fastlock.evaluation.prompts import prompts_digest, shipped_prompts
    from fastlock.storage.places import files_digest
    from fastlock.version import __version__

    return {
        "model": model,
        "model files": files_digest(model),
        "prompts": "shipped" if prompts == shipped_prompts() else "the user's own",
        "prompts digest": prompts_digest(prompts),
        "judge": judge_name(judge),
        "new tokens": str(new_tokens),
        **({"tasks": ", ".join(tasks)} if tasks else {}),
        "fastlock": __version__,
    }


class _Report:
    """The report of a run, with what an earlier run left there; none without a directory."""

    def __init__(self, out: Path | None, facts: dict[str, str], tried: list[tuple[str, float]]) -> None:
        from fastlock.evaluation.report import read_report

        self.known: list[Evaluation] = [] if out is None else read_report(out, facts, tried)
        self._out = out
        self._facts = facts

    def write(self, evaluations: list[Evaluation]) -> None:
        """Write what was evaluated, and what an earlier run did that this one has not come to yet."""
        from fastlock.evaluation.report import write_report

        if self._out is not None:
            others = [evaluation for evaluation in self.known if evaluation not in evaluations]
            write_report(self._out, [*evaluations, *others], self._facts)


COMMAND = Command(
    "evaluate",
    "Ask a model harmful and harmless questions, without a lock and relocked, and measure its perplexity.",
    (
        option(
            "model",
            metavar="CHECKPOINT",
            help="The directory of the model: config.json, *.safetensors, tokenizer.",
        ),
        option(
            "--lock", dest="locks", metavar="FILE", action="append", type=path, help="A lock to try. May be repeated."
        ),
        option(
            "--strength",
            dest="strengths",
            metavar="STRENGTH",
            action="append",
            type=float,
            help="A strength to try each lock at. May be repeated. Default: the lock's own.",
        ),
        option(
            "--harmful",
            type=path,
            metavar="FILE",
            help="Requests to refuse: CSV, JSON, JSON lines or text. Default: the shipped ones, unless --harmless or "
            "--texts is given.",
        ),
        option("--harmless", type=path, metavar="FILE", help="Requests to answer. Default: likewise."),
        option("--texts", type=path, metavar="FILE", help="Ordinary texts, for the perplexity. Default: likewise."),
        option(
            "--judge",
            default="keywords",
            help="What decides whether an answer is a refusal: keywords; a guard model's directory or name (WildGuard, "
            "Llama Guard); or the URL of an OpenAI-compatible endpoint, https://host/v1 (its key in "
            "FASTLOCK_JUDGE_API_KEY).",
        ),
        option("--judge-model", metavar="NAME", help="With an endpoint: the model to ask for."),
        option(
            "--task",
            dest="tasks",
            metavar="TASK",
            action="append",
            help="A task of lm-evaluation-harness. May be repeated. Needs fastlock[lm-eval].",
        ),
        new_tokens(32),
        batch_size(16),
        option(
            "--out",
            type=path,
            metavar="DIR",
            help="A directory for evaluation.json, .md and .html; if stopped, the same command resumes from it.",
        ),
        JSON,
    ),
    _evaluate,
)
