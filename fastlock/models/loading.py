"""Models and tokenizers loaded from a directory through transformers, so that nothing is lost or changed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch

from fastlock.errors import FastlockError
from fastlock.storage.places import as_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_model(directory: str | os.PathLike[str], *, to_run: bool = False) -> PreTrainedModel:
    """The causal language model in a directory, every tensor as it is there: safetensors only, no remote code.

    Args:
        to_run: spread it over the GPUs, if there are any, as accelerate does where it is installed; else all of it on
            the first one. Otherwise it is on the CPU.

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
            **({"device_map": _device_map()} if to_run and torch.cuda.is_available() else {}),
        )
    except Exception as error:  # transformers raises whatever its parts raise
        raise FastlockError(
            f"{directory}: can't be loaded ({type(error).__name__}: {error}). It should hold config.json and "
            "*.safetensors; convert older .bin files with transformers' save_pretrained."
        ) from error
    _check_nothing_lost(directory, model, report, dtypes)
    loaded: PreTrainedModel = model
    if to_run and torch.cuda.is_available() and _device_map() is None:
        loaded.to("cuda")
    return loaded


def _device_map() -> str | None:
    return "auto" if importlib.util.find_spec("accelerate") else None


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
    directory: str | os.PathLike[str], model: PreTrainedModel, report: Any, dtypes: dict[str, torch.dtype]
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
        if stored != tensor.dtype:
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
