"""`fastlock extract`: a lock made from an aligned base and pairs of answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastlock.cli.commands import Command, option
from fastlock.cli.options import BASE, JSON, LOCK_OUT, check_lock_file, layer_range, path
from fastlock.cli.output import print_json, progress_bar, say, spinner

if TYPE_CHECKING:
    from pathlib import Path


def _extract(
    base: Path,
    out: Path,
    pairs: Path | None,
    heads: int | None,
    tokens: int | None,
    recipe: str,
    harmless: Path | None,
    scary: Path | None,
    rank: int | None,
    layers: range | None,
    work: Path | None,
    as_json: bool,
) -> None:
    from fastlock.evaluation.prompts import load_prompts
    from fastlock.models.loading import load_model, load_tokenizer
    from fastlock.recipes.activations import work_directory
    from fastlock.recipes.extraction import extract
    from fastlock.recipes.pairs import load_pairs, shipped_pairs

    chosen = shipped_pairs() if pairs is None else load_pairs(pairs)
    prompts, sounding = (None if file is None else load_prompts(file) for file in (harmless, scary))
    for_a_gate = {"scary": sounding, "rank": rank, "layers": layers}
    gate = {name: value for name, value in for_a_gate.items() if value is not None}
    check_lock_file(out)
    if work is not None:
        work_directory(work)
    with spinner(f"loading {base}", as_json):
        model, tokenizer = load_model(base, to_run=True), load_tokenizer(base)
    with progress_bar(as_json) as progress:
        how: dict[str, Any] = {"recipe": recipe, "harmless": prompts, **gate}
        lock = extract(model, tokenizer, chosen, heads, tokens, progress=progress, work=work, **how)
    lock.save(out)
    if as_json:
        print_json({"out": str(out), "digest": lock.digest, "pairs": len(chosen)})
    else:
        say(f"{out}: {lock!r}, from {len(chosen)} pairs")


COMMAND = Command(
    "extract",
    "Make a lock from an aligned base model and pairs of safe and unsafe answers.",
    (
        BASE,
        LOCK_OUT,
        option(
            "--pairs",
            type=path,
            metavar="FILE",
            help="Pairs of safe and unsafe answers, as JSON or JSON lines. Default: the shipped ones.",
        ),
        option(
            "--heads",
            type=int,
            metavar="N",
            help="How many heads to lock. Default: 24; a gate has all heads of its layers.",
        ),
        option(
            "--tokens",
            type=int,
            metavar="N",
            help="How many tokens of each text to read. Default: as many as the recipe does.",
        ),
        option(
            "--recipe",
            default="safetylock",
            help="safetylock (the paper's), answer-start, prompt-end, or null-space, which makes a gate; "
            "docs/recipes.md compares them.",
        ),
        option(
            "--harmless",
            type=path,
            metavar="FILE",
            help="Harmless prompts, for prompt-end and null-space. Default: the shipped ones.",
        ),
        option(
            "--scary",
            type=path,
            metavar="FILE",
            help="Harmless prompts that only sound harmful, for null-space. Default: the shipped ones.",
        ),
        option("--rank", type=int, metavar="N", help="The rank of the gate, for null-space. Default: 1."),
        option(
            "--layers",
            type=layer_range,
            metavar="FIRST-LAST",
            help="The layers with a gate. Default: those in which the base tells harmful requests from harmless ones.",
        ),
        option(
            "--work",
            type=path,
            metavar="DIR",
            help="A directory for what was read; if stopped, the same command resumes from it.",
        ),
        JSON,
    ),
    _extract,
)
