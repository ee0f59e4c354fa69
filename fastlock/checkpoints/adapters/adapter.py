"""A PEFT adapter as it is stored: its config, and which module of the base each of its tensors belongs to.

Nothing is loaded, nothing is unpickled, and PEFT is not imported: the config and one header are all that is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from fastlock.checkpoints.adapters.methods.markers import MARKERS
from fastlock.checkpoints.checkpoint import StoredSite
from fastlock.checkpoints.tensor_index import StoredTensor, read_header
from fastlock.dtypes import FOLDABLE
from fastlock.errors import DamagedError, FastlockError, MismatchError, UnsupportedError, shown
from fastlock.storage.files import MAX_CONFIG_DEPTH, File, parse_object, read_all

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

MAX_CONFIG_BYTES = 8 * 1024 * 1024
# What one parameter of a module may take: as much as a projection of 16,384 by 16,384 in float32.
MAX_TENSOR_BYTES = 2**30
_WHOLE_NUMBERS = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
_PICKLED = "adapter_model.bin"
# Before every key: the attribute in which a PeftModel holds its tuner, and the one in which that holds the model.
_PREFIXES = ("base_model.model.", "base_model.")
# What the classes around a decoder put into the path of its layers, each class and each release in its own way.
_AROUND_DECODERS = frozenset(("model", "language_model", "text_model", "transformer", "gpt_neox"))
ADAPTER_AGAIN = "Download the adapter again."


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter in its files, as PEFT would see it.

    Attributes:
        where: the directory, for messages.
        files: its files by name.
        config: the parsed adapter_config.json.
        method: PEFT's `peft_type`, in upper case ("LORA").
        base: `base_model_name_or_path`, None where it names none.
        tensors: by their keys in the file.
        modules: the tensors of each module that the adapter touches, by what PEFT calls the parameter
            ("lora_A.weight"), and these by the module's path in the base ("model.layers.3.self_attn.o_proj"); what
            belongs to no module ("vera_A") by an empty path.
    """

    where: str
    files: Mapping[str, File]
    config: dict[str, Any]
    method: str
    base: str | None
    tensors: dict[str, StoredTensor]
    modules: dict[str, dict[str, StoredTensor]]

    @cached_property
    def paths(self) -> dict[str, str]:
        """The paths of `modules` by their `plain_path`.

        Raises:
            DamagedError: two of them can be the same module of a base.
        """
        paths: dict[str, str] = {}
        for path in self.modules:
            plain = plain_path(path)
            if plain in paths:
                raise DamagedError(
                    f"{self.where}: {shown(path)[:200]} and {shown(paths[plain])[:200]} are two paths of one module. "
                    f"{ADAPTER_AGAIN}"
                )
            paths[plain] = path
        return paths

    def path_of(self, site: StoredSite) -> str | None:
        """The path by which the adapter calls the projection of a layer of its base; None if it does not touch it."""
        return self.paths.get(plain_path(site.name))

    def parameters_of(self, site: StoredSite) -> dict[str, StoredTensor]:
        """What it stores of the projection of a layer of its base, by what PEFT calls the parameter; mostly empty."""
        path = self.path_of(site)
        return {} if path is None else self.modules[path]

    def read(self, tensor: StoredTensor, whole_numbers: bool = False, most: int | None = None) -> torch.Tensor:
        """A whole tensor, in the dtype of the file, on the CPU.

        Args:
            tensor: of this adapter.
            whole_numbers: whether it may hold integers or truth values: indices and masks.
            most: how many bytes it may take; by default `MAX_TENSOR_BYTES`.

        Raises:
            UnsupportedError: fastlock does not read that dtype.
            DamagedError: it is larger than any module's parameter.
        """
        dtype = tensor.torch_dtype or (_WHOLE_NUMBERS.get(tensor.dtype) if whole_numbers else None)
        if dtype is None:
            raise UnsupportedError(
                f"{self.where}: a parameter of its output projections is {tensor.dtype[:20]!a}. fastlock reads "
                f"{FOLDABLE}: save the adapter in one of them."
            )
        if tensor.length > (MAX_TENSOR_BYTES if most is None else most):
            raise DamagedError(
                f"{self.where}: a parameter of {tensor.length >> 20} MiB, and no module has one. {ADAPTER_AGAIN}"
            )
        if tensor.length == 0:
            return torch.empty(tensor.shape, dtype=dtype, device="cpu")
        data = bytearray(self.files[tensor.file].read(tensor.start, tensor.length))
        return torch.frombuffer(data, dtype=dtype).view(tensor.shape)

    def check_unchanged(self) -> None:
        """Raise a DamagedError if a file was changed since it was first looked at."""
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if name in self.files:
                self.files[name].check_unchanged()


def open_adapter(files: Mapping[str, File], where: str) -> Adapter:
    """Read the config and the header of an adapter that PEFT saved.

    Args:
        files: of its directory, by name (`fastlock.storage.places.files_in`).
        where: the directory, for messages.

    Raises:
        UnsupportedError: its weights are a pickle.
        DamagedError: config or header are damaged or hostile.
        FastlockError: there is no adapter.
    """
    if ADAPTER_CONFIG not in files:
        raise FastlockError(
            f"{where}: holds no {ADAPTER_CONFIG}. Give the directory of an adapter that PEFT saved ({ADAPTER_CONFIG}, "
            f"{ADAPTER_WEIGHTS})."
        )
    if ADAPTER_WEIGHTS not in files:
        raise _no_weights(files, where)
    place = f"{where}/{ADAPTER_CONFIG}"
    data = read_all(files[ADAPTER_CONFIG], place, MAX_CONFIG_BYTES)
    config = parse_object(data, place, ADAPTER_AGAIN, MAX_CONFIG_DEPTH)
    method, base = config.get("peft_type"), config.get("base_model_name_or_path")
    if not isinstance(method, str) or not method:
        raise DamagedError(f"{place}: has no peft_type. {ADAPTER_AGAIN}")
    if not isinstance(base, str | None):
        raise DamagedError(f"{place}: its base_model_name_or_path is not text. {ADAPTER_AGAIN}")
    tensors = read_header(files[ADAPTER_WEIGHTS], ADAPTER_WEIGHTS, where)
    return Adapter(
        where, files, config, method.upper(), base, tensors, _modules(tensors, MARKERS.get(method.upper(), ()), where)
    )


def plain_path(path: str) -> str:
    """A module's path without what only says which class holds the decoder: checkpoint and model differ in that."""
    return ".".join(part for part in path.split(".") if part not in _AROUND_DECODERS)


def _modules(
    tensors: dict[str, StoredTensor], markers: tuple[str, ...], where: str
) -> dict[str, dict[str, StoredTensor]]:
    dotted = [f".{marker}" for marker in markers]
    modules: dict[str, dict[str, StoredTensor]] = {}
    for key, tensor in tensors.items():
        path, parameter = _split(key, dotted, where)
        modules.setdefault(path, {})[parameter] = tensor
    return modules


def _split(key: str, markers: list[str], where: str) -> tuple[str, str]:
    """The path of a module of the base, and the name of the adapter's parameter there, of a tensor's key."""
    begin = next((len(prefix) for prefix in _PREFIXES if key.startswith(prefix)), 0)
    if not begin:
        if "." not in key:  # of prompts: "prompt_embeddings"
            return "", key
        raise DamagedError(
            f"{where}: {shown(key)[:200]} is not named as PEFT names the tensors of an adapter, and no loader finds "
            f"it. {ADAPTER_AGAIN}"
        )
    dots = [at for marker in markers if (at := key.find(marker, begin - 1)) >= 0]
    if dots:
        return key[begin : min(dots)], key[min(dots) + 1 :]
    path, _, parameter = key[begin:].rpartition(".")
    if path.endswith(".base_layer"):
        return path.removesuffix(".base_layer"), f"base_layer.{parameter}"
    return path, parameter


def _no_weights(files: Mapping[str, File], where: str) -> FastlockError:
    if _PICKLED in files:
        return UnsupportedError(
            f"{where}: holds {_PICKLED}, a pickle, which can run code when it is read. Convert it where you trust it: "
            "PeftModel.from_pretrained(base, DIR).save_pretrained(NEW) writes safetensors."
        )
    return FastlockError(f"{where}: holds no {ADAPTER_WEIGHTS}. Complete the adapter (was a download cut off?).")


def no_such_module(where: str, path: str, base: str) -> MismatchError:
    """The error that says that an adapter is of another base."""
    return MismatchError(
        f"{where}: it adapts {shown(path)[:200]}, and {base} has no such module. Give the base that the adapter was "
        "trained on."
    )
