"""One checkpoint on disk: relocked or unlocked into a new directory."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch

from fastlock.carrier import CONFIG_KEY, in_class
from fastlock.errors import FastlockError
from fastlock.files import as_path, read_bounded
from fastlock.lock import Lock
from fastlock.receipt import Receipt
from fastlock.relock import relock, unlock

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_CONFIG_BYTES = 64 * 1024 * 1024
# Weights are written anew, and in other formats would be without the lock; so are the configs beside them. Every other
# file of a checkpoint is carried along.
_WEIGHTS = shutil.ignore_patterns(
    *"*.safetensors *.safetensors.index.json *.bin *.bin.index.json *.pt *.pth *.gguf *.h5 *.msgpack *.onnx".split()
)
_CONFIGS = {"config.json", "generation_config.json"}


def load_model(directory: str | os.PathLike[str], exact: bool = True) -> PreTrainedModel:
    """The causal language model in a directory, every tensor as it is there: safetensors only, no remote code.

    Args:
        directory: the checkpoint.
        exact: refuse what saving the model again would change. Without it, missing biases (which transformers fills
            with zeros) and tensors loaded in a wider dtype are let through: `verify` only looks.

    Raises:
        FastlockError: there is none, or loading it would add, drop or change a tensor.
    """
    from transformers import AutoModelForCausalLM

    if not as_path(directory).is_dir():
        raise FastlockError(
            f"{directory}: no such directory. Give a checkpoint's directory (config.json, *.safetensors)."
        )
    dtypes = _stored_dtypes(Path(directory))
    common = Counter(dtypes.values()).most_common(1)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=common[0][0] if common else "auto",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises whatever its parts raise
        raise FastlockError(
            f"{directory}: can't be loaded ({type(error).__name__}: {error}). It should hold config.json and "
            "*.safetensors; convert older .bin files with transformers' save_pretrained."
        ) from error
    if not exact:
        report["missing_keys"] = [name for name in report["missing_keys"] if not name.endswith(".bias")]
    _check_nothing_lost(directory, model, report, dtypes, exact)
    loaded: PreTrainedModel = model
    return loaded


def _stored_dtypes(directory: Path) -> dict[str, torch.dtype]:
    """The dtype of every floating-point tensor in a checkpoint's files, by name; of a damaged file, nothing."""
    found: dict[str, torch.dtype] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with contextlib.suppress(safetensors.SafetensorError, OSError), safetensors.safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dictionary)
                dtype = _DTYPES.get(file.get_slice(name).get_dtype())
                if dtype is not None:
                    found[name] = dtype
    return found


def _check_nothing_lost(
    directory: str | os.PathLike[str], model: PreTrainedModel, report: Any, dtypes: dict[str, torch.dtype], exact: bool
) -> None:
    named = (getattr(model.config, "architectures", None) or [type(model).__name__])[0]
    if named != type(model).__name__:
        raise FastlockError(
            f"{directory}: a {named}, which would be loaded as a {type(model).__name__}. fastlock reads causal "
            "language models from disk; load others yourself and relock them in memory."
        )
    wrong = {"missing_keys": "lacks", "unexpected_keys": "has no place for", "mismatched_keys": "has another shape of"}
    for key, what in wrong.items():
        if names := sorted(map(str, report[key])):
            raise FastlockError(
                f"{directory}: {type(model).__name__} {what} {names[0]} ({len(names)} in all), so that loading it "
                "would change the checkpoint. Get it again, or load it yourself and relock it in memory."
            )
    for name, tensor in model.state_dict().items():
        stored = dtypes.get(name, tensor.dtype)
        wider = not exact and torch.promote_types(stored, tensor.dtype) == tensor.dtype
        if stored != tensor.dtype and not wider:
            raise FastlockError(
                f"{directory}: {name} is {stored}, and would be loaded as {tensor.dtype}. Convert the checkpoint "
                "to one dtype, or load it yourself and relock it in memory."
            )


def load_tokenizer(directory: str | os.PathLike[str]) -> Any:
    """The tokenizer in a directory, without remote code.

    Raises:
        FastlockError: there is none, or it can't be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
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
    _check_absent(source, out)
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
    _check_absent(source, out)
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


def _check_absent(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    path = as_path(out)
    try:
        there = path.exists() or path.is_symlink()
        inside = as_path(source).resolve() in path.resolve().parents
    except (OSError, ValueError) as error:
        raise FastlockError(f"{out}: is no usable path ({error}).") from None
    if there:
        raise FastlockError(f"{path}: exists already. Give a directory that does not, or remove it first.")
    if inside:
        raise FastlockError(f"{path}: is inside the checkpoint itself. Give a directory outside it.")


def _write(model: PreTrainedModel, source: Path, out: Path) -> None:
    """Save beside `out` and rename: the directory appears whole, or not at all."""

    def not_carried(folder: str, names: list[str]) -> set[str]:
        return _WEIGHTS(folder, names) | (_CONFIGS if Path(folder) == source else set())

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except (OSError, ValueError) as error:
        raise FastlockError(f"{out}: can't be made ({error}). Choose another place.") from None
    try:
        shutil.copytree(
            source,
            temporary,
            ignore=not_carried,
            dirs_exist_ok=True,
            ignore_dangling_symlinks=True,
        )
        model.save_pretrained(temporary)
        temporary.chmod(source.stat().st_mode & 0o777)
        temporary.rename(out)
    except (OSError, shutil.Error, safetensors.SafetensorError) as error:
        raise FastlockError(f"{out}: can't be written ({error}); nothing is left of it.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
