"""The options and arguments that commands share: their texts, the types of their values, and how they are checked."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fastlock.architectures.serving_stacks import DEFAULT_STACKS, STACKS, check_stacks
from fastlock.cli.commands import ArgumentsError, Option, option
from fastlock.cli.output import confirmed
from fastlock.errors import FastlockError

if TYPE_CHECKING:
    from pathlib import Path

    from fastlock.evaluation.prompts import Prompts


def path(text: str) -> Path:
    """A path of this machine."""
    from pathlib import Path

    return Path(text)


def at_least(low: int) -> Callable[[str], int]:
    """The type of an option that is an integer of at least `low`."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise ArgumentTypeError(f"{text} was given; it must be an integer of at least {low}.")
        return value

    return number


def layer_range(text: str) -> range:
    """The type of an option that names layers, "14-29" or "14"."""
    first, dash, last = text.partition("-")
    last = last if dash else first
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise ArgumentTypeError(f"{text} was given; name the first layer and the last, such as 14-29.")
    return range(int(first), int(last) + 1)


def stacks_in(text: str) -> tuple[str, ...]:
    """The type of an option that names serving stacks, with commas between them."""
    try:
        return check_stacks([name.strip() for name in text.split(",")])
    except FastlockError as error:
        raise ArgumentTypeError(str(error)) from None


CHECKPOINT = option(
    "checkpoint",
    metavar="CHECKPOINT",
    help="A checkpoint's directory (config.json and *.safetensors) or its URL (s3://bucket/model), an adapter's, or a "
    "GGUF file.",
)
BASE = option("base", type=path, metavar="BASE", help="The aligned base model's directory.")
LOCK_OUT = option("--out", type=path, metavar="FILE", required=True, help="The lock to write, a .safetensors file.")
LOCK = option(
    "--lock",
    type=path,
    metavar="FILE",
    required=True,
    help="The lock: a fastlock .safetensors, or a released .safelock.",
)
STRENGTH = option(
    "--strength",
    type=float,
    help="How hard the lock pulls (the paper's α). Default: the lock's own; without one, 1 for a gate, otherwise 6.",
)
FOR = option(
    "--for",
    dest="stacks",
    type=stacks_in,
    metavar="STACK",
    action="append",
    help=f"A serving stack in which the lock must act: {', '.join(STACKS)}. May be repeated, or name several, with "
    f"commas between them. Default: {', '.join(DEFAULT_STACKS)}.",
)
OUT = option(
    "--out", metavar="DIR", help="The directory or URL to create, or the file for a GGUF; nothing may be there yet."
)
COPY = option("--copy", action="store_true", help="Copy the weights, too, instead of linking them.")
IN_PLACE = option(
    "--in-place",
    action="store_true",
    help="Change the checkpoint itself, in one step, after asking. `fastlock unlock --in-place` undoes a relock.",
)
YES = option("--yes", action="store_true", help="With --in-place: do not ask.")
JSON = option("--json", dest="as_json", action="store_true", help="Print the result as JSON, and no progress.")


def stack_names(values: Sequence[tuple[str, ...]] | None) -> tuple[str, ...]:
    """The stacks that were asked for, in one option or several; by default `DEFAULT_STACKS`."""
    if not values:
        return DEFAULT_STACKS
    return tuple(name for names in values for name in names)


def new_tokens(default: int) -> Option:
    """How long the answers of a model may be."""
    return option(
        "--new-tokens", type=at_least(1), metavar="N", default=default, help="How many tokens an answer may have."
    )


def batch_size(default: int) -> Option:
    """How many prompts a model reads at once."""
    return option(
        "--batch-size", type=at_least(1), metavar="N", default=default, help="How many prompts to read at once."
    )


def target(checkpoint: str, out: str | None, in_place: bool, yes: bool) -> str:
    """Where the result goes: `--out`, or the checkpoint itself once the user has confirmed it."""
    if in_place == (out is not None):
        raise ArgumentsError("give either --out DIR or --in-place.")
    if out is not None:
        return out
    if not yes and not confirmed(f"Change {checkpoint} itself?"):
        raise ArgumentsError("--in-place was not confirmed; nothing was changed. --yes confirms without asking.")
    return checkpoint


def check_gguf_options(checkpoint: str, in_place: bool, stacks: Sequence[tuple[str, ...]] | None = None) -> None:
    """Refuse what cannot be done with a GGUF: another stack than llama.cpp, and changing the file itself."""
    from fastlock.checkpoints.gguf import check_gguf_stacks

    if stacks:
        check_gguf_stacks(stack_names(stacks), checkpoint)
    if in_place:
        raise FastlockError(f"{checkpoint}: a GGUF is not changed in place. Give --out FILE, a new file.")


def check_lock_file(out: Path) -> None:
    """Refuse a file that no lock can be written to, before the work of making one, in the words of `Lock.save`."""
    from fastlock.recipes.calibration_report import LOCK_FILE
    from fastlock.storage.places import writable_directory

    if out.is_dir():
        raise FastlockError(f"{out}: is a directory. Name a file in it for the lock: --out {out / LOCK_FILE}.")
    if out.suffix != ".safetensors":
        raise FastlockError(f"{out}: a fastlock lock is a safetensors file; name it {out.stem}.safetensors.")
    writable_directory(out.parent)


def prompts_in(harmful: Path | None, harmless: Path | None, texts: Path | None) -> Prompts:
    """The prompts of the files that were given; the shipped ones if there are none."""
    from fastlock.evaluation.prompts import Prompts, load_prompts, shipped_prompts

    files = {"harmful": harmful, "harmless": harmless, "texts": texts}
    if not any(files.values()):
        return shipped_prompts()
    return Prompts(**{kind: load_prompts(file) for kind, file in files.items() if file is not None})
