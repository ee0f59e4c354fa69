"""`fastlock finetune`: a fine-tune that keeps the refusals of its base."""

from __future__ import annotations

from argparse import ArgumentTypeError
from typing import TYPE_CHECKING, Any

from fastlock.cli.commands import STOPPED, ArgumentsError, Command, option
from fastlock.cli.options import BASE, JSON, at_least, path
from fastlock.cli.output import print_json, progress_bar, say, spinner, warn

if TYPE_CHECKING:
    from pathlib import Path

    from fastlock.finetuning.finetune_run import BandChoice, Finetuned

_Schedule = tuple[int, int, float, int]


def _schedule(text: str) -> _Schedule:
    """The type of --lisa."""
    parts = text.split(",")
    try:
        alignment_steps, user_steps, free_steps = int(parts[0]), int(parts[1]), int(parts[3] if parts[3:] else 0)
        pull = float(parts[2])
    except (ValueError, IndexError):
        parts = []
    if len(parts) not in (3, 4):
        raise ArgumentTypeError(
            f"{text} was given; it must be alignment steps, user steps, pull, and free steps if any: 100,900,1.0."
        )
    return alignment_steps, user_steps, pull, free_steps


def _finetune(
    base: Path,
    data: Path,
    alignment: Path | None,
    out: Path,
    lisa: _Schedule | None,
    freeze: str | None,
    lora: int | None,
    epochs: float,
    batch_size: int,
    accumulate: int,
    lr: float | None,
    max_length: int,
    save_every: int,
    seed: int,
    as_json: bool,
) -> int | None:
    if alignment is None and lisa is not None:
        raise ArgumentsError("--lisa alternates with alignment data, and there is none: give --alignment FILE.")
    if alignment is None and freeze is None:
        raise ArgumentsError(
            "give --alignment FILE (Lisa), or --freeze BAND (Safety Layers), or both. Fine-tuning without either loses "
            "refusals."
        )
    from fastlock.finetuning.finetune_run import run_finetune
    from fastlock.finetuning.finetune_settings import FinetuneSettings
    from fastlock.finetuning.lisa_schedule import Lisa

    settings = FinetuneSettings(
        lisa=None if lisa is None else Lisa(*lisa),
        lora=lora,
        epochs=epochs,
        batch_size=batch_size,
        accumulation=accumulate,
        lr=lr,
        max_length=max_length,
        save_every=save_every,
        seed=seed,
    )
    try:
        with spinner("", quiet=True), progress_bar(as_json) as progress:  # transformers shows no bars of its own
            band = None if freeze is None else _band_choice(freeze, progress)
            done = run_finetune(base, data, alignment, out, settings, band, freeze, progress)
    except KeyboardInterrupt:
        warn("stopped; run the same command again to resume")
        return STOPPED
    if as_json:
        print_json({"out": str(out), **done.to_dict()})
    else:
        _show(base, out, done)
    return None


def _band_choice(freeze: str, progress: Any) -> BandChoice:
    """What finds the band that was asked for: located, in a file, or "6-12". What is no band is refused at once."""
    from fastlock.errors import FastlockError
    from fastlock.locks.band import Band

    if freeze == "auto":

        def located(model: Any, tokenizer: Any) -> Band:
            from fastlock.finetuning.safety_layers import locate

            found = locate(model, tokenizer, progress=progress)
            if found.band is None:
                raise FastlockError(
                    f"--freeze auto: {found.reason}. Give the band, --freeze FIRST-LAST, or leave --freeze out."
                )
            return found.band

        return located
    first, dash, last = freeze.partition("-")
    band = Band(int(first), int(last)) if dash and first.isdecimal() and last.isdecimal() else Band.load(freeze)
    return lambda _model, _tokenizer: band


def _show(base: Path, out: Path, done: Finetuned) -> None:
    """What was done, and what to do next."""
    import shlex

    from fastlock.finetuning.finetune_directory import BAND_FILE
    from fastlock.recipes.calibration_report import LOCK_FILE

    loss = "" if done.first_loss is None else f", loss {done.first_loss:.3f} to {done.last_loss:.3f}"
    say(f"{out}: fine-tuned in {done.steps} steps{loss}", "green")
    if done.cut:
        warn(f"{done.cut} answers were longer than --max-length, and were cut")
    names = {"base": base, "tuned": out, "lock": f"{out}-lock", "file": f"{out}-lock/{LOCK_FILE}"}
    names |= {"relocked": f"{out}-relocked", "band": out / BAND_FILE}
    quoted = {name: shlex.quote(str(value)) for name, value in names.items()}
    say("Next: see whether a lock brings back refusals that are lost all the same.")
    for line in _NEXT if done.band is None else (*_NEXT, _NEXT_WITH_BAND):
        say(f"  {line.format(**quoted)}")


_NEXT = (
    "fastlock calibrate {tuned} --base {base} --out {lock}",
    "fastlock relock {tuned} --lock {file} --out {relocked}",
    "fastlock verify {relocked} --lock {file}",
)
_NEXT_WITH_BAND = "fastlock verify {tuned} --base {base} --band {band}"

COMMAND = Command(
    "finetune",
    "Fine-tune a model without losing its refusals: Lisa, a frozen band of layers, or both. On one GPU or a CPU; if "
    "stopped, the same command resumes. Needs the extra `finetune`.",
    (
        BASE,
        option(
            "--data",
            type=path,
            metavar="FILE",
            required=True,
            help="What to learn, JSON lines: messages; prompt and completion (or response); question and answer; or "
            "instruction and output.",
        ),
        option(
            "--alignment",
            type=path,
            metavar="FILE",
            help="What to go on refusing, in the same form: harmful requests with refusals.",
        ),
        option("--out", type=path, metavar="DIR", required=True, help="The directory to create."),
        option(
            "--lisa",
            type=_schedule,
            metavar="K1,K2,PULL[,FREE]",
            help="Steps on the alignment data, steps on yours, how hard the weights are pulled back, and how many "
            "steps at the start go without a pull (none, if it is left out). Default: 100,900,1.0, with fewer steps in "
            "a short run.",
        ),
        option(
            "--freeze",
            metavar="BAND",
            help="Layers to leave as they are: FIRST-LAST, counted from 0; a file of `fastlock locate`; or auto, which "
            "locates them.",
        ),
        option("--lora", type=at_least(1), metavar="R", help="Train adapters of this rank, and merge them at the end."),
        option("--epochs", type=float, metavar="N", default=3.0, help="How often to read your data."),
        option("--batch-size", type=at_least(1), metavar="N", default=4, help="How many rows to read at once."),
        option("--accumulate", type=at_least(1), metavar="N", default=1, help="How many batches make a step."),
        option("--lr", type=float, metavar="RATE", help="The learning rate. Default: 1e-5; with --lora 1e-4."),
        option("--max-length", type=at_least(2), metavar="N", default=1024, help="How many tokens a row may have."),
        option("--save-every", type=at_least(1), metavar="N", default=100, help="How many steps a stop may cost."),
        option("--seed", type=at_least(0), metavar="N", default=42, help="Decides the order of the rows."),
        JSON,
    ),
    _finetune,
)
