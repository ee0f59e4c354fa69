"""The `fastlock` command.

Exit codes: 0 done (for `verify`: locked; for `doctor`: it acts); 1 `verify` found the lock missing or altered, or
`doctor` that it does not act; 2 wrong arguments;
3 refused or failed, with the reason on standard error; 4 a fault of fastlock's own; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table
from rich.text import Text

from fastlock.architectures.serving_stacks import STACKS
from fastlock.checkpoints.diagnosis import doctor
from fastlock.checkpoints.relocked import read_receipt
from fastlock.checkpoints.relocking import DEFAULT_STACKS, relock_checkpoint
from fastlock.checkpoints.unlocking import unlock_checkpoint
from fastlock.cli import zoo as zoo_cli
from fastlock.cli.zoo import LockFile, Strength
from fastlock.errors import FastlockError
from fastlock.evaluation.evaluator import Evaluation, evaluate
from fastlock.evaluation.judges import judge_name, open_judge
from fastlock.evaluation.keyword_judge import KEYWORDS
from fastlock.evaluation.lm_eval_harness import check_tasks
from fastlock.evaluation.prompts import Prompts, load_prompts, prompts_digest, shipped_prompts
from fastlock.evaluation.report import cells, columns, read_report, table_rows, to_json, write_report
from fastlock.inference.batching import Progress as ShowProgress
from fastlock.kernels.ahead_of_time.launch_paths import launch_paths
from fastlock.locks.lock import Lock, strength_for
from fastlock.locks.receipt import Receipt
from fastlock.models.loading import load_model, load_tokenizer
from fastlock.recipes.activations import work_directory
from fastlock.recipes.calibration import Calibration, calibrate
from fastlock.recipes.calibration_report import LOCK_FILE, trial_cells, trial_columns, write_calibration
from fastlock.recipes.calibration_report import to_json as calibration_json
from fastlock.recipes.extraction import extract as make_lock
from fastlock.recipes.pairs import load_pairs, shipped_pairs
from fastlock.recipes.training import train_lock
from fastlock.storage.places import as_place, files_digest, writable_directory
from fastlock.verification import verify
from fastlock.version import __version__

NOT_LOCKED = 1
REFUSED = 3
BROKEN = 4

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Bring the refusals back in every fine-tune of an aligned language model.",
)
app.add_typer(zoo_cli.app, name="zoo")
_out = Console()
_err = Console(stderr=True)

_Checkpoint = Annotated[
    str, typer.Argument(help="A checkpoint's directory (config.json and *.safetensors), or its URL: s3://bucket/model.")
]
_Out = Annotated[str | None, typer.Option("--out", help="The directory or URL to make; nothing may be there yet.")]
_InPlace = Annotated[
    bool, typer.Option("--in-place", help="Change the checkpoint itself, in one step; asks first. `unlock` undoes it.")
]
_Yes = Annotated[bool, typer.Option("--yes", help="With --in-place: don't ask.")]
_Copy = Annotated[bool, typer.Option("--copy", help="Copy the files that don't change, instead of linking them.")]
_For = Annotated[
    list[str] | None,
    typer.Option("--for", help=f"Stacks in which the lock must act: {', '.join(STACKS)}. Default: transformers, vllm."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def main() -> None:
    """Run the command; a FastlockError ends it with exit code 3 and its message."""
    try:
        app()
    except FastlockError as error:
        _err.print(Text("fastlock: ", "bold red").append(str(error), "default"), soft_wrap=True)
        raise SystemExit(REFUSED) from None
    except (OSError, UnicodeError) as error:
        print(f"fastlock: {error}", file=sys.stderr)
        raise SystemExit(REFUSED) from None
    except Exception:
        traceback.print_exc()
        raise SystemExit(BROKEN) from None


def _version(asked: bool) -> None:
    if asked:
        _out.print(f"fastlock {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the command itself."""


@contextlib.contextmanager
def _bar(as_json: bool) -> Iterator[ShowProgress]:
    """A progress bar for loops over `progress(items, description)`; none where JSON is printed."""
    with Progress(console=_err, disable=as_json, transient=True) as bar:
        yield lambda items, description: bar.track(items, description=description)


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="A lock file, or a relocked checkpoint's directory or URL.")],
    as_json: _Json = False,
) -> None:
    """Show what a lock holds, or what was done to a checkpoint. Loads no weights."""
    place = as_place(path)
    if isinstance(place, str) or place.is_dir():
        _show_receipt(path, read_receipt(place), as_json)
    else:
        _show_lock(path, Lock.load(place), as_json)


@app.command()
def extract(
    base: Annotated[Path, typer.Argument(help="The aligned base model's directory.")],
    out: Annotated[Path, typer.Option("--out", help="The lock to write, a .safetensors file.")],
    pairs: Annotated[
        Path | None, typer.Option("--pairs", help="Preference pairs, JSON or JSON lines; default: the shipped set.")
    ] = None,
    heads: Annotated[int, typer.Option("--heads", help="How many heads to lock.")] = 24,
    tokens: Annotated[
        int | None, typer.Option("--tokens", help="How many tokens of each text to read; default: the recipe's.")
    ] = None,
    recipe: Annotated[
        str, typer.Option("--recipe", help="safetylock (the paper's), answer-start, or prompt-end (docs/recipes.md).")
    ] = "safetylock",
    harmless: Annotated[
        Path | None, typer.Option("--harmless", help="For prompt-end: harmless prompts; default: the shipped ones.")
    ] = None,
    work: Annotated[
        Path | None, typer.Option("--work", help="Directory for what was read: if stopped, the same command goes on.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Make a lock from an aligned base model and preference pairs."""
    chosen = shipped_pairs() if pairs is None else load_pairs(pairs)
    prompts = None if harmless is None else load_prompts(harmless)
    _check_lock_file(out)
    if work is not None:
        work_directory(work)
    with _working(f"loading {base}", as_json):
        model, tokenizer = load_model(base, to_run=True), load_tokenizer(base)
    with _bar(as_json) as progress:
        lock = make_lock(
            model, tokenizer, chosen, heads, tokens, recipe=recipe, harmless=prompts, progress=progress, work=work
        )
    lock.save(out)
    if as_json:
        _print_json({"out": str(out), "digest": lock.digest, "pairs": len(chosen)})
    else:
        _say(f"{out}: {lock!r}, from {len(chosen)} pairs")


def _check_lock_file(out: Path) -> None:
    """A lock can be written there: to be known before the work, not after it."""
    if out.is_dir():
        raise FastlockError(f"{out}: is a directory. Name a file in it for the lock: --out {out / LOCK_FILE}.")
    if out.suffix != ".safetensors":
        named = out.with_suffix(".safetensors")
        raise FastlockError(f"{out}: a fastlock lock is a safetensors file. Name it so: --out {named}.")
    writable_directory(out.parent)


@app.command()
def relock(
    checkpoint: _Checkpoint,
    lock: LockFile,
    out: _Out = None,
    strength: Strength = None,
    stacks: _For = None,
    copy: _Copy = False,
    in_place: _InPlace = False,
    yes: _Yes = False,
    as_json: _Json = False,
) -> None:
    """Relock a checkpoint into a new directory, which links the files that don't change."""
    target = _target(checkpoint, out, in_place, yes)
    loaded = Lock.load(lock)
    start = time.perf_counter()
    with _working(f"relocking {checkpoint}", as_json):
        receipt = relock_checkpoint(
            checkpoint, loaded, target, strength, stacks=_stacks(stacks), copy=copy, in_place=in_place
        )
    if as_json:
        _print_json({"out": target, "receipt": receipt.to_dict()})
    else:
        seconds = time.perf_counter() - start
        _say(f"{target}: {len(receipt.layers)} layers relocked at strength {receipt.strength:g} ({seconds:.1f} s)")


@app.command()
def unlock(
    checkpoint: _Checkpoint,
    out: _Out = None,
    copy: _Copy = False,
    in_place: _InPlace = False,
    yes: _Yes = False,
    as_json: _Json = False,
) -> None:
    """Write a relocked checkpoint as it was before, every file byte for byte, into a new directory."""
    target = _target(checkpoint, out, in_place, yes)
    with _working(f"unlocking {checkpoint}", as_json):
        unlock_checkpoint(checkpoint, target, copy=copy, in_place=in_place)
    if as_json:
        _print_json({"out": target})
    else:
        _say(f"{target}: unlocked")


@app.command(name="evaluate")
def evaluate_command(
    model: Annotated[str, typer.Argument(help="The model's directory: config.json, *.safetensors, tokenizer.")],
    locks: Annotated[
        list[Path] | None, typer.Option("--lock", help="A lock to try; may be given several times.")
    ] = None,
    strengths: Annotated[
        list[float] | None, typer.Option("--strength", help="A strength to try each lock at; several times, too.")
    ] = None,
    harmful: Annotated[
        Path | None, typer.Option("--harmful", help="Requests to refuse: CSV, JSON, JSON lines or text.")
    ] = None,
    harmless: Annotated[Path | None, typer.Option("--harmless", help="Requests to answer.")] = None,
    texts: Annotated[Path | None, typer.Option("--texts", help="Ordinary texts, for the perplexity.")] = None,
    judge: Annotated[
        str,
        typer.Option(
            "--judge",
            help="What takes an answer for a refusal: keywords; a guard model's directory or name (WildGuard, Llama "
            "Guard); or the URL of an OpenAI-compatible endpoint, https://host/v1 (its key in FASTLOCK_JUDGE_API_KEY).",
        ),
    ] = KEYWORDS,
    judge_model: Annotated[
        str | None, typer.Option("--judge-model", help="With an endpoint: the model that it is to use.")
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--task", help="A task of lm-evaluation-harness; several times, too. Needs fastlock\\[lm-eval]."),
    ] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="How long an answer may be.")] = 32,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="How many prompts at once.")] = 16,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="A directory for evaluation.json, .md and .html; an interrupted run goes on there."),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Ask a model harmful and harmless questions, as it is and relocked, and measure its perplexity."""
    if strengths and not locks:
        raise typer.BadParameter("--strength says how hard a lock pulls: give the --lock, too.")
    prompts = _prompts(harmful, harmless, texts)
    loaded = [Lock.load(path) for path in locks or []]
    tried = [(lock, strength) for lock in loaded for strength in strengths or [strength_for(lock, None)]]
    check_tasks(tasks or [])
    if out is not None:
        writable_directory(out)
    with _working(f"loading {model}", as_json):
        network, tokenizer = load_model(model, to_run=True), load_tokenizer(model)
    with _working(f"opening the judge {judge}", as_json):
        opened = open_judge(judge, judge_model)
    facts = {
        "model": model,
        "model files": files_digest(model),
        "prompts": "shipped" if prompts == shipped_prompts() else "the user's own",
        "prompts digest": prompts_digest(prompts),
        "judge": judge_name(opened),
        "new tokens": str(new_tokens),
        **({"tasks": ", ".join(tasks)} if tasks else {}),
        "fastlock": __version__,
    }
    known: list[Evaluation] = []
    if out is not None:
        known = read_report(out, facts, [(lock.digest, strength) for lock, strength in tried])

    def finished(found: list[Evaluation]) -> None:
        if out is not None:  # with what an earlier run found and this one has not come to yet
            write_report(out, [*found, *(one for one in known if one not in found)], facts)

    with _bar(as_json) as progress:
        found = evaluate(
            network,
            tokenizer,
            prompts,
            tried,
            judge=opened,
            new_tokens=new_tokens,
            batch_size=batch_size,
            progress=progress,
            tasks=tasks or [],
            known=known,
            finished=finished,
        )
    if as_json:
        _print_json(to_json(found, facts))
    else:
        table = _table(*columns(found))
        for row in table_rows(found):
            table.add_row(*row)
        _out.print(table)


@app.command()
def train(
    base: Annotated[Path, typer.Argument(help="The aligned base model's directory.")],
    fine_tunes: Annotated[list[Path], typer.Argument(help="Fine-tunes of it that refuse less: their directories.")],
    out: Annotated[Path, typer.Option("--out", help="The lock to write, a .safetensors file.")],
    heads: Annotated[int | None, typer.Option("--heads", help="How many heads to lock; default: all.")] = None,
    steps: Annotated[int, typer.Option("--steps", help="How many steps of training.")] = 100,
    seed: Annotated[int, typer.Option("--seed", help="Decides the order.")] = 42,
    as_json: _Json = False,
) -> None:
    """Train a lock on fine-tunes of an aligned base, to be applied to others of its fine-tunes."""
    _check_lock_file(out)
    with _working(f"loading {base} and {len(fine_tunes)} fine-tunes", as_json):
        aligned, tokenizer = load_model(base, to_run=True), load_tokenizer(base)
        models = [load_model(path, to_run=True) for path in fine_tunes]
    with _bar(as_json) as progress:
        lock = train_lock(aligned, models, tokenizer, heads=heads, steps=steps, seed=seed, progress=progress)
    lock.save(out)
    if as_json:
        _print_json({"lock": str(out), "digest": lock.digest, "heads": len(lock)})
    else:
        _say(f"{out}: {lock!r}, trained on {len(models)} fine-tunes")


@app.command(name="calibrate")
def calibrate_command(
    checkpoint: Annotated[Path, typer.Argument(help="The model whose refusals are to come back: its directory.")],
    out: Annotated[
        Path, typer.Option("--out", help="A directory for the lock, the trials and the picture; a stopped run goes on.")
    ],
    base: Annotated[
        Path | None, typer.Option("--base", help="The aligned base that locks come from; default: the checkpoint.")
    ] = None,
    lock: Annotated[
        Path | None, typer.Option("--lock", help="Instead: a lock, of which only the strength is searched.")
    ] = None,
    pairs: Annotated[
        Path | None, typer.Option("--pairs", help="What locks are extracted from; default: the shipped pairs.")
    ] = None,
    harmful: Annotated[
        Path | None, typer.Option("--harmful", help="Requests to refuse: one half decides, the other is reported.")
    ] = None,
    harmless: Annotated[Path | None, typer.Option("--harmless", help="Requests to answer, halved too.")] = None,
    texts: Annotated[
        Path | None, typer.Option("--texts", help="Ordinary texts, for the perplexity; default: the shipped ones.")
    ] = None,
    trials: Annotated[
        int | None, typer.Option("--trials", min=1, help="How many to try; default: 60 locks, or 20 strengths.")
    ] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="How long an answer may be.")] = 16,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="How many prompts at once.")] = 32,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Decides the halves and the search.")] = 42,
    as_json: _Json = False,
) -> None:
    """Find the lock, or the strength of one, that brings refusals back at least cost. Needs the extra `calibrate`."""
    if lock is not None and (base or pairs):
        raise typer.BadParameter("give either --lock, or --base and --pairs, from which locks are made.")
    if lock is not None and lock.resolve() == (out / LOCK_FILE).resolve():
        raise typer.BadParameter(f"--lock is what would be written: {LOCK_FILE} in --out. Give another --out.")
    prompts = _prompts(harmful, harmless, texts)
    chosen = None if pairs is None else load_pairs(pairs)
    given = None if lock is None else Lock.load(lock)
    writable_directory(out)
    with _working(f"loading {checkpoint}", as_json):
        network, tokenizer = load_model(checkpoint, to_run=True), load_tokenizer(checkpoint)
        aligned = None if base is None else load_model(base, to_run=True)
    try:
        with _bar(as_json) as progress:
            found = calibrate(
                network,
                tokenizer,
                chosen,
                base=aligned,
                lock=given,
                prompts=prompts,
                trials=trials,
                new_tokens=new_tokens,
                batch_size=batch_size,
                seed=seed,
                journal=out / "journal.jsonl",
                progress=progress,
            )
    except KeyboardInterrupt:
        _err.print("stopped; run the same command again to go on", style="yellow")
        raise typer.Exit(zoo_cli.STOPPED) from None
    source = ("base", str(base or checkpoint)) if given is None else ("given lock", f"{lock} (sha256 {given.digest})")
    facts = {"model": str(checkpoint), source[0]: source[1], "trials": str(len(found.trials))}
    write_calibration(out, found, facts)
    if as_json:
        _print_json(calibration_json(found, facts))
    else:
        _show_calibration(found, out / LOCK_FILE)


def _show_calibration(found: Calibration, lock_file: Path) -> None:
    table = _table(*trial_columns(found.chosen), title="chosen")
    table.add_row(*trial_cells(found.chosen))
    _out.print(table)
    table = _table(*columns(found.held_out), title="requests that decided nothing")
    for evaluation in found.held_out:
        table.add_row(*cells(evaluation))
    _out.print(table)
    if found.lock is None:
        _say(f"{found.why_no_lock} No lock was written.")
    else:
        _say(f"{lock_file}: {found.lock!r} at strength {found.lock.strength:.3g}")


def _prompts(harmful: Path | None, harmless: Path | None, texts: Path | None) -> Prompts:
    """The user's own where any are given, else the shipped ones."""
    given = {"harmful": harmful, "harmless": harmless, "texts": texts}
    if not any(given.values()):
        return shipped_prompts()
    return Prompts(**{name: load_prompts(path) for name, path in given.items() if path is not None})


def _target(checkpoint: str, out: str | None, in_place: bool, yes: bool) -> str:
    """Where the result goes: `--out`, or the checkpoint itself once the user has said so twice."""
    if in_place == (out is not None):
        raise typer.BadParameter("give either --out DIR or --in-place.")
    if out is not None:
        return out
    if not yes and not (sys.stdin.isatty() and typer.confirm(f"Change {checkpoint} itself?", err=True)):
        raise typer.BadParameter("--in-place was not confirmed; nothing was changed. --yes confirms without asking.")
    return checkpoint


def _stacks(given: list[str] | None) -> tuple[str, ...]:
    return tuple(name for part in given or [",".join(DEFAULT_STACKS)] for name in part.split(","))


@app.command(name="doctor")
def doctor_command(
    checkpoint: Annotated[
        str | None, typer.Argument(help="A checkpoint's directory or URL; none: this machine.")
    ] = None,
    stacks: _For = None,
    as_json: _Json = False,
) -> None:
    """Say whether a checkpoint's lock really acts in each stack. Exit code 0 if it acts in all of them, 1 if not.

    Without a checkpoint: what folds on each of this machine's devices, and why.
    """
    if checkpoint is None:
        if stacks:
            raise typer.BadParameter("--for is about a checkpoint; name one.")
        _show_launch_paths(as_json)
        return
    found = doctor(checkpoint, _stacks(stacks))
    if as_json:
        _print_json({"checkpoint": checkpoint, "stacks": [finding.to_dict() for finding in found]})
    else:
        for finding in found:
            _say(f"{finding.stack}: {finding.reason}", "green" if finding.acts else "red")
    if not all(finding.acts for finding in found):
        raise typer.Exit(NOT_LOCKED)


def _show_launch_paths(as_json: bool) -> None:
    paths = launch_paths()
    if as_json:
        _print_json({"devices": [path.to_dict() for path in paths]})
        return
    for path in paths:
        _say(f"{path.device}: {path.path} ({path.reason})", "red" if path.path == "none" else "")


@app.command(name="verify")
def verify_command(checkpoint: _Checkpoint, lock: LockFile, as_json: _Json = False) -> None:
    """Check that the lock is in place, whole and unaltered. Exit code 0 if so, 1 if not."""
    loaded = Lock.load(lock)
    with _working(f"verifying {checkpoint}", as_json):
        found = verify(checkpoint, loaded)
    if as_json:
        _print_json(found.to_dict())
    else:
        at = f" at strength {found.strength:g}" if found.strength is not None else ""
        layers = f"; altered layers: {', '.join(map(str, found.altered))}" if found.altered else ""
        _say(f"{checkpoint}: {found.state}{at} ({found.reason}{layers})", "green" if found else "red")
    if not found:
        raise typer.Exit(NOT_LOCKED)


def _show_lock(path: str, lock: Lock, as_json: bool) -> None:
    rows = [
        {"layer": int(layer), "head": int(head), "scale": float(scale)}
        for layer, head, scale in zip(lock.layers, lock.heads, lock.scales, strict=True)
    ]
    known = (
        "base_model",
        "num_layers",
        "num_heads",
        "head_dim",
        "hidden_size",
        "recipe",
        "extraction_digest",
        "strength",
    )
    facts = {"digest": lock.digest} | {key: getattr(lock, key) for key in known}
    if as_json:
        _print_json({"path": path, **facts, "rows": rows})
        return
    _facts(path, {key: value for key, value in facts.items() if value is not None})
    table = _table("layer", "heads", "scales")
    for layer in sorted({row["layer"] for row in rows}):
        of_layer = sorted((row for row in rows if row["layer"] == layer), key=lambda row: row["head"])
        heads = ", ".join(str(row["head"]) for row in of_layer)
        table.add_row(str(layer), heads, ", ".join(f"{row['scale']:.3f}" for row in of_layer))
    _out.print(table)


def _show_receipt(path: str, receipt: Receipt | None, as_json: bool) -> None:
    if as_json:
        _print_json({"path": path, "receipt": receipt.to_dict() if receipt else None})
        return
    if receipt is None:
        _say(f"{path}: not relocked by fastlock (config.json holds no receipt)")
        return
    data = receipt.to_dict()
    sites = data.pop("sites")
    _facts(path, data)
    table = _table("layer", "heads", "output projection", "had a bias")
    for site in sites:
        heads = ", ".join(map(str, site["heads"]))
        table.add_row(str(site["layer"]), heads, Text(site["name"]), "yes" if site["had_bias"] else "no")
    _out.print(table)


def _table(*headers: str, **options: Any) -> Table:
    """A table in which what is longer than its column goes on in the next line, instead of being cut off."""
    return Table(*(Column(header, overflow="fold") for header in headers), **options)


def _facts(title: str, facts: dict[str, Any]) -> None:
    table = _table("", "", title=Text(title), show_header=False, title_justify="left")
    for key, value in facts.items():
        table.add_row(key, Text(str(value)))
    _out.print(table)


def _working(what: str, as_json: bool) -> Any:
    """A spinner while something runs, on standard error; transformers keeps its own bars to itself."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    return contextlib.nullcontext() if as_json else _err.status(Text(what))


def _say(text: str, style: str = "") -> None:
    _out.print(Text(text, style), soft_wrap=True)  # a Text: nothing of files and users is taken for markup


def _print_json(data: dict[str, Any]) -> None:
    print(json.dumps(data, indent=2, allow_nan=False))
