"""Loading models and tokenizers from a directory through transformers, with nothing lost or changed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import safetensors
import torch

from fastlock.dtypes import BY_SAFETENSORS_NAME
from fastlock.errors import DamagedError, FastlockError, UnsupportedError, shown
from fastlock.storage.places import as_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What transformers reports of a load that was not exact: what it means, and the error that it is.
_LOSSES = {
    "missing_keys": ("it lacks {tensor}, which {cls} needs", DamagedError),
    "unexpected_keys": ("{cls} has no place for its {tensor}", UnsupportedError),
    "mismatched_keys": ("its {tensor} has another shape than in {cls}", DamagedError),
}


def load_model(directory: str | os.PathLike[str], *, to_run: bool = False) -> PreTrainedModel:
    """The language model in a directory, with every tensor as stored: safetensors only, no remote code.

    Args:
        directory: a checkpoint's.
        to_run: spread the model over the GPUs, if there are any, with accelerate; without accelerate, put all of it
            on the first one. By default it is on the CPU.

    Raises:
        UnsupportedError: it is not a causal language model, or the class that loads it has no place for a tensor, or
            would change its dtype.
        DamagedError: a tensor is missing, or is of another shape than its config says.
        FastlockError: there is no such directory, or transformers cannot load what it holds.
    """
    if not as_path(directory).is_dir():
        raise FastlockError(
            f"{directory}: no such directory. Give a checkpoint's directory (config.json, *.safetensors)."
        )
    dtypes = _stored_dtypes(Path(directory))
    device_map = _device_map() if to_run and torch.cuda.is_available() else None
    try:
        model, report = _from_pretrained(directory, dtypes, device_map)
    except Exception as error:  # transformers raises whatever its parts raise
        raise FastlockError(
            f"{directory}: cannot be loaded ({type(error).__name__}: {str(error)[:500]}). It should hold config.json "
            "and *.safetensors; convert older .bin files with transformers' save_pretrained."
        ) from error
    _check_nothing_lost(directory, model, report, dtypes)
    if to_run and torch.cuda.is_available() and device_map is None:
        model.to("cuda")
    return cast("PreTrainedModel", model)


def _from_pretrained(
    directory: str | os.PathLike[str], dtypes: dict[str, torch.dtype], device_map: str | None
) -> tuple[Any, Any]:
    """The PreTrainedModel, in the dtype that most of its tensors have, and transformers' report of what it lost."""
    common = Counter(dtypes.values()).most_common(1)
    # transformers' types say nothing of the report that output_loading_info adds.
    loaded: Any = _loader(directory).from_pretrained(
        directory,
        dtype=common[0][0] if common else "auto",
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # which are then in the report, by name
        **({} if device_map is None else {"device_map": device_map}),
    )
    model, report = loaded
    return model, report


def _loader(directory: str | os.PathLike[str]) -> Any:
    """The transformers class that loads a directory's model with its head: of language, or of images and text."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    multi_modal = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if type(config) in multi_modal and type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def _device_map() -> str | None:
    return "auto" if importlib.util.find_spec("accelerate") else None


def _stored_dtypes(directory: Path) -> dict[str, torch.dtype]:
    """The dtype of every floating-point tensor in a checkpoint's files, by name; of a damaged file, nothing."""
    dtypes: dict[str, torch.dtype] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with contextlib.suppress(safetensors.SafetensorError, OSError), safetensors.safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is not a dictionary)
                dtype = BY_SAFETENSORS_NAME.get(file.get_slice(name).get_dtype())
                if dtype is not None:
                    dtypes[name] = dtype
    return dtypes


def _check_nothing_lost(
    directory: str | os.PathLike[str], model: PreTrainedModel, report: Any, dtypes: dict[str, torch.dtype]
) -> None:
    named = (getattr(model.config, "architectures", None) or [type(model).__name__])[0]
    if named != type(model).__name__:
        raise UnsupportedError(
            f"{directory}: a {shown(str(named))}, which would be loaded as a {type(model).__name__}. fastlock reads "
            "causal language models from disk. Load others yourself, and relock them in memory."
        )
    for key, (loss, kind) in _LOSSES.items():
        if names := sorted(entry[0] if isinstance(entry, tuple) else entry for entry in report[key]):
            what = loss.format(tensor=shown(names[0]), cls=type(model).__name__)
            raise kind(
                f"{directory}: {what} ({len(names)} in all), and loading it would change the checkpoint. Download it "
                "again, or load it yourself and relock it in memory."
            )
    for name, tensor in model.state_dict().items():
        stored = dtypes.get(name, tensor.dtype)
        if stored != tensor.dtype:
            raise UnsupportedError(
                f"{directory}: {name} is {stored}, and would be loaded as {tensor.dtype}. Convert the checkpoint "
                "to one dtype, or load it yourself and relock it in memory."
            )


def load_tokenizer(directory: str | os.PathLike[str]) -> Any:
    """The tokenizer in a directory, without remote code.

    Raises:
        FastlockError: there is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its parts raise
        raise FastlockError(
            f"{directory}: its tokenizer cannot be loaded ({type(error).__name__}: {error}). "
            "Copy the tokenizer's files beside the weights."
        ) from error
