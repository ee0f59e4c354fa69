"""One checkpoint on disk: relocked or unlocked into a new directory."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlock.carrier import CONFIG_KEY, in_class
from fastlock.errors import FastlockError
from fastlock.files import read_bounded
from fastlock.lock import Lock
from fastlock.receipt import Receipt
from fastlock.relock import relock, unlock

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_CONFIG_BYTES = 64 * 1024 * 1024
# Weights, and what describes them, are written anew; every other file of a checkpoint is carried along.
_WRITTEN_ANEW = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "fastlock")


def load_model(directory: str | os.PathLike[str]) -> PreTrainedModel:
    """The causal language model in a directory, as transformers loads it: safetensors only, no remote code.

    Raises:
        FastlockError: there is none, or it can't be loaded.
    """
    from transformers import AutoModelForCausalLM

    if not Path(directory).is_dir():
        raise FastlockError(
            f"{directory}: no such directory. Give a checkpoint's directory (config.json, *.safetensors)."
        )
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            directory, dtype="auto", use_safetensors=True, local_files_only=True
        )
    except Exception as error:  # transformers raises whatever its parts raise
        raise FastlockError(
            f"{directory}: can't be loaded ({type(error).__name__}: {error}). It should hold config.json and "
            "*.safetensors; convert older .bin files with transformers' save_pretrained."
        ) from error
    return model


def load_tokenizer(directory: str | os.PathLike[str]) -> Any:
    """The tokenizer in a directory, without remote code.

    Raises:
        FastlockError: there is none, or it can't be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # transformers raises whatever its parts raise
        raise FastlockError(
            f"{directory}: its tokenizer can't be loaded ({type(error).__name__}: {error}). "
            "Copy the tokenizer's files beside the weights."
        ) from error


def read_receipt(directory: str | os.PathLike[str]) -> Receipt | None:
    """The receipt in a checkpoint's config.json, None where it has none; no weights are read.

    Raises:
        FastlockError: there is no config.json, or the receipt in it is damaged.
    """
    path = Path(directory) / "config.json"
    try:
        config = json.loads(read_bounded(path, MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise FastlockError(f"{path}: not JSON ({error}). Get the checkpoint again.") from None
    if not isinstance(config, dict) or CONFIG_KEY not in config:
        return None
    return Receipt.from_dict(config[CONFIG_KEY], str(path))


def relock_checkpoint(
    source: str | os.PathLike[str], lock: Lock, out: str | os.PathLike[str], strength: float = 6.0
) -> Receipt:
    """Relock a checkpoint into a new directory that is complete: tokenizer and all other files come along.

    Args:
        source: the checkpoint's directory, which is only read.
        lock: the lock of its aligned base.
        out: the directory to make; it must not exist yet.
        strength: the paper's α.

    Returns:
        What was done.

    Raises:
        FastlockError: as for `relock` and saving; `out` is then not there.
    """
    _check_absent(Path(out))
    model = load_model(source)
    receipt = relock(model, lock, strength)
    _write(model, Path(source), Path(out))
    receipt.to_dict()  # takes its digests while the model is there
    return receipt


def unlock_checkpoint(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Write the checkpoint as it was before relocking, every tensor bit for bit, into a new directory.

    Raises:
        FastlockError: it is not relocked, or was altered since; `out` is then not there.
    """
    _check_absent(Path(out))
    model = load_model(source)
    receipt = getattr(model.config, CONFIG_KEY, None)
    unlock(model)
    carrier = receipt.get("carrier", {}) if isinstance(receipt, dict) else {}
    if carrier.get("form") == "llama":
        model = _out_of_llama_form(model, carrier.get("original_config"), source)
    _write(model, Path(source), Path(out))


def _out_of_llama_form(model: PreTrainedModel, original: Any, source: str | os.PathLike[str]) -> PreTrainedModel:
    """The model in the class that it had before it was saved as a Llama."""
    from transformers import AutoConfig, MistralForCausalLM, Qwen2ForCausalLM

    classes: dict[str, Callable[[Any], PreTrainedModel]] = {"mistral": MistralForCausalLM, "qwen2": Qwen2ForCausalLM}
    try:
        kind = original["model_type"]
        config = AutoConfig.for_model(**original)
        state = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if not (name.endswith(".self_attn.o_proj.bias") and not tensor.count_nonzero())
        }
        restored = in_class(classes[kind], config, state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise FastlockError(
            f"{source}: the receipt does not say rightly what the model was before ({error}). "
            "Start from the original checkpoint."
        ) from None
    restored.generation_config = model.generation_config
    return restored


def _check_absent(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise FastlockError(f"{out}: exists already. Give a directory that does not, or remove it first.")


def _write(model: PreTrainedModel, source: Path, out: Path) -> None:
    """Save beside `out` and rename: the directory appears whole, or not at all."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise FastlockError(f"{out}: can't be made ({error}).") from None
    try:
        shutil.copytree(source, temporary, ignore=shutil.ignore_patterns(*_WRITTEN_ANEW), dirs_exist_ok=True)
        model.save_pretrained(temporary)
        temporary.chmod(source.stat().st_mode & 0o777)
        temporary.rename(out)
    except OSError as error:
        raise FastlockError(f"{out}: can't be written ({error}); nothing is left of it.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
