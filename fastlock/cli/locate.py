"""`fastlock locate`: the band of layers that tells malicious requests from normal ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastlock.cli.commands import DONE, NOT_LOCKED, Command, option
from fastlock.cli.options import BASE, JSON, batch_size, new_tokens, path
from fastlock.cli.output import print_json, print_table, progress_bar, say, spinner

if TYPE_CHECKING:
    from pathlib import Path

    from fastlock.finetuning.band_prompts import BandPrompts


def _locate(
    base: Path,
    out: Path | None,
    normal: Path | None,
    malicious: Path | None,
    borderline: Path | None,
    scale: float | None,
    first_range: list[int] | None,
    judge: str,
    judge_model: str | None,
    new_tokens: int,
    batch_size: int,
    as_json: bool,
) -> int:
    from fastlock.evaluation.judges import open_judge
    from fastlock.finetuning.locate_report import BAND_FILE, PAGE_FILE, count_rows, write_report
    from fastlock.finetuning.safety_layers import locate
    from fastlock.models.loading import load_model, load_tokenizer
    from fastlock.storage.places import files_digest, writable_directory

    prompts = _prompts(normal, malicious, borderline)
    if out is not None:
        writable_directory(out)
    with spinner(f"loading {base}", as_json):
        model, tokenizer = load_model(base, to_run=True), load_tokenizer(base)
    with spinner(f"opening the judge {judge}", as_json):
        opened = open_judge(judge, judge_model)
    with progress_bar(as_json) as progress:
        found = locate(
            model,
            tokenizer,
            prompts,
            scale=scale,
            first_range=None if first_range is None else (first_range[0], first_range[1]),
            judge=opened,
            new_tokens=new_tokens,
            batch_size=batch_size,
            progress=progress,
        )
    if out is not None:
        write_report(out, found, {"model files": files_digest(base)})
    if as_json:
        print_json(found.to_dict())
    else:
        if found.evidence.counts:
            print_table(("layers scaled", "by", "refused", "95 % interval"), count_rows(found.evidence.counts))
        say(f"{base}: {found.reason}", "green" if found else "yellow")
        if out is not None:
            file, what = (BAND_FILE, "the band") if found else (PAGE_FILE, "the curve and the counts")
            say(f"{out / file} has {what}.")
    return DONE if found else NOT_LOCKED


def _prompts(normal: Path | None, malicious: Path | None, borderline: Path | None) -> BandPrompts:
    """The prompts of the files that were given, and the shipped ones of the other kinds."""
    from dataclasses import replace

    from fastlock.evaluation.prompts import load_prompts
    from fastlock.finetuning.band_prompts import shipped_band_prompts

    files = {"normal": normal, "malicious": malicious, "borderline": borderline}
    given = {kind: load_prompts(file) for kind, file in files.items() if file is not None}
    return replace(shipped_band_prompts(), **given)


COMMAND = Command(
    "locate",
    "Find the band of layers that tells malicious requests from normal ones, to freeze while fine-tuning. Exit code 0 "
    "if there is one, 1 if none stands out.",
    (
        BASE,
        option("--out", type=path, metavar="DIR", help="A directory for band.json, located.json and located.html."),
        option(
            "--normal",
            type=path,
            metavar="FILE",
            help="Ordinary requests: CSV, JSON, JSON lines or text. Default: the shipped ones.",
        ),
        option("--malicious", type=path, metavar="FILE", help="Requests that the model should refuse."),
        option("--borderline", type=path, metavar="FILE", help="Harmless requests that sound harmful."),
        option(
            "--scale",
            type=float,
            help="What the weights of a range are multiplied by (the paper's α). Default: the first of 1.05, 1.10, … "
            "1.50 at which the counts of ranges differ enough.",
        ),
        option(
            "--first-range",
            type=int,
            nargs=2,
            metavar=("FIRST", "LAST"),
            help="The layers to start from, instead of those at which the angles rise.",
        ),
        option(
            "--judge",
            default="keywords",
            help="What decides whether an answer is a refusal: keywords, a guard model's directory, or an endpoint's "
            "URL, as in `fastlock evaluate`.",
        ),
        option("--judge-model", metavar="NAME", help="With an endpoint: the model to ask for."),
        new_tokens(8),
        batch_size(16),
        JSON,
    ),
    _locate,
)
