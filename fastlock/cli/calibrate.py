"""`fastlock calibrate`: the lock, or the strength of one, that brings refusals back at the lowest cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastlock.cli.commands import STOPPED, ArgumentsError, Command, option
from fastlock.cli.options import JSON, at_least, batch_size, new_tokens, path, prompts_in
from fastlock.cli.output import print_json, print_table, progress_bar, say, spinner, warn

if TYPE_CHECKING:
    from pathlib import Path

    from fastlock.recipes.calibration import Calibration


def _calibrate(
    checkpoint: Path,
    out: Path,
    base: Path | None,
    lock: Path | None,
    pairs: Path | None,
    harmful: Path | None,
    harmless: Path | None,
    texts: Path | None,
    trials: int | None,
    new_tokens: int,
    batch_size: int,
    seed: int,
    as_json: bool,
) -> int | None:
    _check(out, lock, {"base": base, "pairs": pairs})
    from fastlock.locks.lock import Lock
    from fastlock.models.loading import load_model, load_tokenizer
    from fastlock.recipes.calibration import calibrate
    from fastlock.recipes.calibration_report import to_json, write_calibration
    from fastlock.recipes.pairs import load_pairs
    from fastlock.storage.places import writable_directory

    prompts, chosen = prompts_in(harmful, harmless, texts), None if pairs is None else load_pairs(pairs)
    loaded = None if lock is None else Lock.load(lock)
    writable_directory(out)
    with spinner(f"loading {checkpoint}", as_json):
        model, tokenizer = load_model(checkpoint, to_run=True), load_tokenizer(checkpoint)
        aligned = None if base is None else load_model(base, to_run=True)
    try:
        with progress_bar(as_json) as progress:
            calibration = calibrate(
                model,
                tokenizer,
                chosen,
                base=aligned,
                lock=loaded,
                prompts=prompts,
                trials=trials,
                new_tokens=new_tokens,
                batch_size=batch_size,
                seed=seed,
                journal=out / "journal.jsonl",
                progress=progress,
            )
    except KeyboardInterrupt:
        warn("stopped; run the same command again to resume")
        return STOPPED
    origin = {"base": str(base or checkpoint)} if loaded is None else {"given lock": f"{lock} (sha256 {loaded.digest})"}
    facts = {"model": str(checkpoint), **origin, "trials": str(len(calibration.trials))}
    write_calibration(out, calibration, facts)
    if as_json:
        print_json(to_json(calibration, facts))
    else:
        _show(calibration, out)
    return None


def _check(out: Path, lock: Path | None, others: dict[str, Path | None]) -> None:
    """Refuse what does not go with a lock, in the words of the library, before anything is loaded."""
    if lock is None:
        return
    if superfluous := [name for name, value in others.items() if value is not None]:
        raise ArgumentsError(
            f"--lock and --{superfluous[0]} are both given: either the strength of this lock is searched, or locks are "
            "made from a base. Leave one of the two out."
        )
    from fastlock.recipes.calibration_report import LOCK_FILE

    if lock.resolve() == (out / LOCK_FILE).resolve():
        raise ArgumentsError(
            f"--lock is the file that would be written: {LOCK_FILE} in --out. Give a separate output directory."
        )


def _show(calibration: Calibration, out: Path) -> None:
    from fastlock.evaluation.report import cells, columns
    from fastlock.recipes.calibration_report import LOCK_FILE, trial_cells, trial_columns

    print_table(trial_columns(calibration.chosen), [trial_cells(calibration.chosen)], title="chosen")
    print_table(columns(calibration.held_out), map(cells, calibration.held_out), title="held-out requests")
    if calibration.lock is None:
        say(f"{calibration.why_no_lock} No lock was written.")
    else:
        say(f"{out / LOCK_FILE}: {calibration.lock!r} at strength {calibration.lock.strength:.3g}")


COMMAND = Command(
    "calibrate",
    "Find the lock, or the strength of one, that brings refusals back at the lowest cost. Needs the extra `calibrate`.",
    (
        option(
            "checkpoint", type=path, metavar="CHECKPOINT", help="The directory of the model that refuses too little."
        ),
        option(
            "--out",
            type=path,
            metavar="DIR",
            required=True,
            help="A directory for the lock, the trials and the picture; if stopped, the same command resumes from it.",
        ),
        option(
            "--base",
            type=path,
            metavar="DIR",
            help="The aligned base that locks are made from. Default: the checkpoint.",
        ),
        option(
            "--lock",
            type=path,
            metavar="FILE",
            help="A lock whose strength alone is searched, instead of making locks.",
        ),
        option("--pairs", type=path, metavar="FILE", help="What locks are extracted from. Default: the shipped pairs."),
        option(
            "--harmful",
            type=path,
            metavar="FILE",
            help="Requests to refuse; one half decides, the other half is held out. Give --harmless, too. Default: "
            "the shipped ones.",
        ),
        option("--harmless", type=path, metavar="FILE", help="Requests to answer, also halved. Give --harmful, too."),
        option(
            "--texts", type=path, metavar="FILE", help="Ordinary texts, for the perplexity. Default: the shipped ones."
        ),
        option("--trials", type=at_least(1), metavar="N", help="How many to try. Default: 60 locks, or 20 strengths."),
        new_tokens(16),
        batch_size(32),
        option("--seed", type=at_least(0), metavar="N", default=42, help="Decides the halves and the search."),
        JSON,
    ),
    _calibrate,
)
