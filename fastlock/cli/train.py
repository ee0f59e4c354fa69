"""`fastlock train`: a lock learned from an aligned base and fine-tunes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastlock.cli.commands import Command, option
from fastlock.cli.options import BASE, JSON, LOCK_OUT, check_lock_file, layer_range, path
from fastlock.cli.output import print_json, progress_bar, say, spinner

if TYPE_CHECKING:
    from pathlib import Path


def _train(
    base: Path,
    fine_tunes: list[Path],
    out: Path,
    rank: int,
    constant: bool,
    layers: range | None,
    heads: int | None,
    pairs: Path | None,
    harmless: Path | None,
    scary: Path | None,
    steps: int | None,
    seed: int,
    as_json: bool,
) -> None:
    from fastlock.evaluation.prompts import load_prompts
    from fastlock.models.loading import load_model, load_tokenizer
    from fastlock.recipes.pairs import load_pairs
    from fastlock.recipes.training import train_lock

    learned = None if pairs is None else load_pairs(pairs)
    answered, sounding = (None if file is None else load_prompts(file) for file in (harmless, scary))
    check_lock_file(out)
    with spinner(f"loading {base} and {len(fine_tunes)} fine-tunes", as_json):
        aligned, tokenizer = load_model(base, to_run=True), load_tokenizer(base)
        models = [load_model(fine_tune, to_run=True) for fine_tune in fine_tunes]
    with progress_bar(as_json) as progress:
        lock = train_lock(
            aligned,
            models,
            tokenizer,
            learned,
            harmless=answered,
            scary=sounding,
            rank=rank,
            constant=constant,
            layers=layers,
            heads=heads,
            steps=steps,
            seed=seed,
            progress=progress,
        )
    lock.save(out)
    if as_json:
        print_json({"lock": str(out), "digest": lock.digest, "heads": len(lock), "rank": lock.rank})
    else:
        say(f"{out}: {lock!r}, trained on {len(models)} fine-tunes")


COMMAND = Command(
    "train",
    "Train a lock on an aligned base and fine-tunes of it, to be applied to other fine-tunes of it.",
    (
        BASE,
        option(
            "fine_tunes",
            type=path,
            nargs="+",
            metavar="FINE_TUNE",
            help="A fine-tune of the base, its directory: some that refuse less, and some that do not.",
        ),
        LOCK_OUT,
        option("--rank", type=int, metavar="N", default=1, help="The rank of the gate; 0 for a constant alone."),
        option("--constant", action="store_true", help="Learn a constant beside the gate, which takes a bias."),
        option(
            "--layers",
            type=layer_range,
            metavar="FIRST-LAST",
            help="The layers with a gate. Default: those in which the base tells harmful requests from harmless ones.",
        ),
        option("--heads", type=int, metavar="N", help="How many heads to lock. Default: all (in a gate's layers)."),
        option("--pairs", type=path, metavar="FILE", help="Harmful requests with answers. Default: the shipped ones."),
        option("--harmless", type=path, metavar="FILE", help="Requests to answer. Default: the shipped ones."),
        option(
            "--scary",
            type=path,
            metavar="FILE",
            help="Requests to answer that only sound harmful, for a gate. Default: the shipped ones.",
        ),
        option("--steps", type=int, metavar="N", help="How many steps to train. Default: 270; 100 with --rank 0."),
        option("--seed", type=int, metavar="N", default=42, help="Decides the order of the examples."),
        JSON,
    ),
    _train,
)
