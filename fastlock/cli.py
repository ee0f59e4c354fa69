"""The `fastlock` command.

Exit codes: 0 done (for `verify`: locked); 1 `verify` found the lock missing or altered; 2 wrong arguments;
3 refused or failed, with the reason on standard error; 4 a fault of fastlock's own; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from fastlock.checkpoint import load_model, load_tokenizer, read_receipt, relock_checkpoint, unlock_checkpoint
from fastlock.errors import FastlockError
from fastlock.extract import extract as make_lock
from fastlock.lock import Lock
from fastlock.pairs import load_pairs, shipped_pairs
from fastlock.receipt import Receipt
from fastlock.verify import verify
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
_out = Console()
_err = Console(stderr=True)

_Lock = Annotated[Path, typer.Option("--lock", help="The lock: a fastlock .safetensors, or a released .safelock.")]
_Checkpoint = Annotated[Path, typer.Argument(help="A checkpoint's directory: config.json and *.safetensors.")]
_Out = Annotated[Path, typer.Option("--out", help="The directory to make; it must not exist yet.")]
_Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def main() -> None:
    """Run the command; a FastlockError ends it with exit code 3 and its message."""
    try:
        app()
    except FastlockError as error:
        _err.print(Text("fastlock: ", "bold red").append(str(error), "default"), soft_wrap=True)
        raise SystemExit(REFUSED) from None
    except (OSError, UnicodeError) as error:
        print(f"fastlock: {error!a}", file=sys.stderr)
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


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A lock file, or a relocked checkpoint's directory.")],
    as_json: _Json = False,
) -> None:
    """Show what a lock holds, or what was done to a checkpoint. Loads no weights."""
    if path.is_dir():
        _show_receipt(path, read_receipt(path), as_json)
    else:
        _show_lock(path, Lock.load(path), as_json)


@app.command()
def extract(
    base: Annotated[Path, typer.Argument(help="The aligned base model's directory.")],
    out: Annotated[Path, typer.Option("--out", help="The lock to write, a .safetensors file.")],
    pairs: Annotated[
        Path | None, typer.Option("--pairs", help="Preference pairs, JSON or JSON lines; default: the shipped set.")
    ] = None,
    heads: Annotated[int, typer.Option("--heads", help="How many heads to lock.")] = 24,
    last_tokens: Annotated[int, typer.Option("--last-tokens", help="Answer tokens to read from each answer.")] = 5,
    as_json: _Json = False,
) -> None:
    """Make a lock from an aligned base model and preference pairs."""
    chosen = shipped_pairs() if pairs is None else load_pairs(pairs)
    with _working(f"loading {base}", as_json):
        model, tokenizer = load_model(base), load_tokenizer(base)
    with Progress(console=_err, disable=as_json, transient=True) as bar:

        def progress(items: Sequence[Any], description: str) -> Iterable[Any]:
            return bar.track(items, description=description)

        lock = make_lock(model, tokenizer, chosen, heads, last_tokens, progress=progress)
    lock.save(out)
    if as_json:
        _print_json({"out": str(out), "digest": lock.digest, "pairs": len(chosen)})
    else:
        _say(f"{out}: {lock!r}, from {len(chosen)} pairs")


@app.command()
def relock(
    checkpoint: _Checkpoint,
    lock: _Lock,
    out: _Out,
    strength: Annotated[float, typer.Option("--strength", help="How hard the lock pulls (the paper's α).")] = 6.0,
    as_json: _Json = False,
) -> None:
    """Relock a checkpoint into a new directory. The source is only read."""
    loaded = Lock.load(lock)
    start = time.perf_counter()
    with _working(f"relocking {checkpoint}", as_json):
        receipt = relock_checkpoint(checkpoint, loaded, out, strength)
    if as_json:
        _print_json({"out": str(out), "receipt": receipt.to_dict()})
    else:
        seconds = time.perf_counter() - start
        _say(f"{out}: {len(receipt.layers)} layers relocked at strength {strength:g} ({seconds:.1f} s)")


@app.command()
def unlock(checkpoint: _Checkpoint, out: _Out, as_json: _Json = False) -> None:
    """Write a relocked checkpoint as it was before, every tensor bit for bit, into a new directory."""
    with _working(f"unlocking {checkpoint}", as_json):
        unlock_checkpoint(checkpoint, out)
    if as_json:
        _print_json({"out": str(out)})
    else:
        _say(f"{out}: unlocked")


@app.command(name="verify")
def verify_command(checkpoint: _Checkpoint, lock: _Lock, as_json: _Json = False) -> None:
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


def _show_lock(path: Path, lock: Lock, as_json: bool) -> None:
    rows = [
        {"layer": int(layer), "head": int(head), "scale": float(scale)}
        for layer, head, scale in zip(lock.layers, lock.heads, lock.scales, strict=True)
    ]
    known = ("base_model", "num_layers", "num_heads", "head_dim", "hidden_size", "recipe", "extraction_digest")
    facts = {"digest": lock.digest} | {key: getattr(lock, key) for key in known}
    if as_json:
        _print_json({"path": str(path), **facts, "rows": rows})
        return
    _facts(str(path), {key: value for key, value in facts.items() if value is not None})
    table = Table("layer", "heads", "scales")
    for layer in sorted({row["layer"] for row in rows}):
        of_layer = sorted((row for row in rows if row["layer"] == layer), key=lambda row: row["head"])
        heads = ", ".join(str(row["head"]) for row in of_layer)
        table.add_row(str(layer), heads, ", ".join(f"{row['scale']:.3f}" for row in of_layer))
    _out.print(table)


def _show_receipt(path: Path, receipt: Receipt | None, as_json: bool) -> None:
    if as_json:
        _print_json({"path": str(path), "receipt": receipt.to_dict() if receipt else None})
        return
    if receipt is None:
        _say(f"{path}: not relocked by fastlock (config.json holds no receipt)")
        return
    data = receipt.to_dict()
    sites = data.pop("sites")
    _facts(str(path), data)
    table = Table("layer", "heads", "output projection", "had a bias")
    for site in sites:
        heads = ", ".join(map(str, site["heads"]))
        table.add_row(str(site["layer"]), heads, Text(site["name"]), "yes" if site["had_bias"] else "no")
    _out.print(table)


def _facts(title: str, facts: dict[str, Any]) -> None:
    table = Table(title=Text(title), show_header=False, title_justify="left")
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
