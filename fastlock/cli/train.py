"""`fastlock train`: a lock learned from fine-tunes of an aligned base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastlock.cli.commands import Command, option
from fastlock.cli.options import BASE, JSON, LOCK_OUT, check_lock_file, path
from fastlock.cli.output import print_json, progress_bar, say, spinner

if TYPE_CHECKING:
    from pathlib import Path


def _train(
    base: Path, fine_tunes: list[Path], out: Path, heads: int | None, steps: int, seed: int, as_json: bool
) -> None:
    from fastlock.models.loading import load_model, load_tokenizer
    from fastlock.recipes.training import train_lock

    check_lock_file(out)
    with spinner(f"loading {base} and {len(fine_tunes)} fine-tunes", as_json):
        aligned, tokenizer = load_model(base, to_run=True), load_tokenizer(base)
        models = [load_model(fine_tune, to_run=True) for fine_tune in fine_tunes]
    with progress_bar(as_json) as progress:
        lock = train_lock(aligned, models, tokenizer, heads=heads, steps=steps, seed=seed, progress=progress)
    lock.save(out)
    if as_json:
        print_json({"lock": str(out), "digest": lock.digest, "heads": len(lock)})
    else:
        say(f"{out}: {lock!r}, trained on {len(models)} fine-tunes")


COMMAND = Command(
    "train",
    "Train a lock on fine-tunes of an aligned base, to be applied to other fine-tunes of it.",
    (
        BASE,
        option(
            "fine_tunes",
            type=path,
            nargs="+",
            metavar="FINE_TUNE",
            help="A fine-tune of the base that refuses less: its directory.",
        ),
        LOCK_OUT,
        option("--heads", type=int, metavar="N", help="How many heads to lock. Default: all."),
        option("--steps", type=int, metavar="N", default=100, help="How many steps to train."),
        option("--seed", type=int, metavar="N", default=42, help="Decides the order of the examples."),
        JSON,
    ),
    _train,
)
