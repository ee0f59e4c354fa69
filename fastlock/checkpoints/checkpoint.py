"""A checkpoint as it is stored: its config, where its output projections lie, and the locked columns read from there.

Nothing is loaded: configs, headers and the locked columns are all that is read.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastlock.architectures.families import Family, check_lock_fits, family_of_config, head_geometry
from fastlock.checkpoints.config import read_config, transformers_config
from fastlock.checkpoints.quantised import (
    WEIGHTS,
    DequantisedColumns,
    Quantised,
    Settings,
    SiteTensors,
    format_at,
    is_projection,
    is_quantised,
    quantised_at,
)
from fastlock.checkpoints.quantised.basis import check_basis
from fastlock.checkpoints.tensor_index import StoredTensor, read_shards
from fastlock.dtypes import BY_TORCH_NAME, FOLDABLE, SAFETENSORS_NAMES
from fastlock.errors import DamagedError, FastlockError, UnsupportedError, shown
from fastlock.kernels.fold.reference import HeadColumns
from fastlock.locks.lock import Lock
from fastlock.storage.byte_columns import ByteColumns, Bytes
from fastlock.storage.files import CONFIG, DOWNLOAD_AGAIN

MAX_FEATURES = 2**24
# What only quantised projections have: packed weights, or what bitsandbytes keeps beside its weights.
_PACKED = ("_proj.qweight", "_proj.weight_packed", "_proj.weight.absmax", "_proj.SCB", "_proj.weight.SCB")
# What wrappers put before the names of a model's tensors.
_WRAPPERS = {"_orig_mod.": "torch.compile", "module.": "DataParallel or DDP", "base_model.model.": "PEFT"}
# Rows are mapped in blocks of this size, which bounds the memory that a large projection takes.
_BLOCK_BYTES = 32 * 1024 * 1024
_QUANTISED = (
    "fastlock reads GPTQ, AWQ, compressed-tensors, FP8, NVFP4, MXFP4 and bitsandbytes. Of any other format, relock the "
    "unquantised checkpoint, then quantise it."
)


@dataclass(frozen=True)
class StoredSite:
    """One layer's attention output projection in a checkpoint's files.

    Attributes:
        layer: the decoder layer.
        name: of the projection, in the file ("model.layers.3.self_attn.o_proj").
        weight: W, [hidden, num_heads * head_dim]; [num_heads * head_dim, hidden] where the family transposes it. Of a
            quantised one, the tensor by which it was found.
        bias: c, [hidden], None where the file has none.
        hidden_size: the length of its output.
        num_heads, head_dim: of its input.
        transposed: how W is kept.
        quantised: whether W is quantised: see `quantised`.
        torch_dtype: what `dtype` is, None if fastlock does not fold that.
    """

    layer: int
    name: str
    weight: StoredTensor
    bias: StoredTensor | None
    hidden_size: int
    num_heads: int
    head_dim: int
    transposed: bool
    quantised: bool
    torch_dtype: torch.dtype | None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its bias, and of W where that is not quantised.

        Raises:
            UnsupportedError: fastlock does not fold it.
        """
        if self.torch_dtype is None:
            raise _not_folded(f"{shown(self.name)}.weight", self.weight)
        return self.torch_dtype

    def column_bytes(self, heads: int) -> int:
        """How many bytes the columns of so many heads have."""
        return self.hidden_size * heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class StoredColumns:
    """The locked columns of one site.

    Attributes:
        stored: as they are read: quantised ones are dequantised in the rows that are asked for.
        digest: takes the SHA-256 of their bytes, row by row; if they are quantised, of the bytes that were read for
            them. It is long, and may be called in any thread.
    """

    stored: HeadColumns | DequantisedColumns
    digest: Callable[[], bytes]

    @property
    def columns(self) -> HeadColumns:
        """All of them, [hidden, len(heads) * head_dim], in the dtype of the file; float64 if they are quantised."""
        return self.stored.in_rows(slice(None))


class Checkpoint:
    """A checkpoint in its files, as a loader would see it.

    Attributes:
        where: the directory, for messages.
        files: its files by name.
        raw: the parsed config.json.
        config: what transformers makes of it.
        text_config: the decoder's part of that.
        text_key: the key of that part in config.json, None where the config is the decoder's own.
        family: the decoder's family.
        shards: its tensors.
        quantisation: its `quantization_config`; empty if it has none.
        sites: the output projection of every layer.
    """

    def __init__(self, files: dict[str, Any], where: str) -> None:
        """Read config, index and headers.

        Args:
            files: by name.
            where: the directory, for messages.

        Raises:
            UnsupportedError: the family is refused or unknown, or the weights are quantised or in another format.
            DamagedError: the files are damaged, hostile or disagree.
            FastlockError: there is no checkpoint.
        """
        self.where = where
        self.files = files
        self.raw = read_config(files, where)
        self.config = transformers_config(self.raw, where)
        self.text_config = self.config.get_text_config()
        self.text_key = next(
            (key for key in getattr(self.config, "sub_configs", {}) if getattr(self.config, key) is self.text_config),
            None,
        )
        self.family: Family = family_of_config(self.text_config, where)
        self.shards = read_shards(files, where)
        quantisation = self.raw.get("quantization_config")
        self.quantisation: dict[str, Any] = quantisation if isinstance(quantisation, dict) else {}
        check_names(self.shards.tensors, where)
        self._modules: dict[tuple[str, ...], dict[str, int]] = {}  # what was asked of `modules`
        self.sites = self._find_sites()
        self._check_quantised()

    @property
    def model_type(self) -> str:
        """The family's name."""
        model_type: str = self.text_config.model_type
        return model_type

    def sites_for(self, lock: Lock) -> list[StoredSite]:
        """The sites that the lock shifts, layers ascending.

        Raises:
            MismatchError: the lock is of another geometry.
            UnsupportedError: a weight is not of a dtype that can be folded.
            DamagedError: a bias does not fit its weight.
        """
        check_lock_fits(lock, len(self.sites), self.text_config, self.where)
        locked = [self.sites[layer] for layer in sorted(set(lock.layers.tolist()))]
        for site in locked:
            if site.quantised:
                self._quantised(site)
            if site.torch_dtype is None:
                raise _not_folded(f"{self.where}: {shown(site.name)}.weight", site.weight)
            if site.bias is not None and (site.bias.torch_dtype, site.bias.shape) != (site.dtype, (site.hidden_size,)):
                raise DamagedError(
                    f"{self.where}: {shown(site.name)}.bias is {site.bias.dtype[:20]!a} {list(site.bias.shape)}, but "
                    f"should be {SAFETENSORS_NAMES[site.dtype]!a} [{site.hidden_size}]. {DOWNLOAD_AGAIN}"
                )
        return locked

    def _check_quantised(self) -> None:
        """Raise if the projections are quantised in a way that cannot be folded: told by the config, and the first."""
        num_heads, _ = head_geometry(self.text_config)
        grouped = (getattr(self.text_config, "num_key_value_heads", None) or num_heads) != num_heads
        check_basis(self.quantisation, grouped, self.where)
        if (site := next((site for site in self.sites if site.quantised), None)) is not None:
            self._quantised(site)

    def _quantised(self, site: StoredSite) -> tuple[Quantised, SiteTensors]:
        """A quantised projection, and the tensors that it is read from.

        Raises:
            UnsupportedError: it is of a format that fastlock does not read.
            DamagedError: its tensors do not go together.
        """
        tensors = SiteTensors(self.files, self.shards.tensors, site.name, self.where)
        projection = quantised_at(tensors, self._settings(site))
        if projection is None:
            raise UnsupportedError(
                f"{self.where}: {shown(site.name)} is quantised, and its tensors are of no format that fastlock knows. "
                f"{_QUANTISED}"
            )
        return projection, tensors

    def _settings(self, site: StoredSite) -> Settings:
        return Settings(self.where, site.hidden_size, site.num_heads * site.head_dim, self.quantisation)

    @property
    def quantised_format(self) -> str | None:
        """The name, in `quantised.table`, of the first quantised output projection's format; None if there is none."""
        site = next((site for site in self.sites if site.quantised), None)
        if site is None:
            return None
        return format_at(SiteTensors(self.files, self.shards.tensors, site.name, self.where), self._settings(site))

    def read_columns(self, site: StoredSite, heads: Sequence[int], room: Bytes | None = None) -> StoredColumns:
        """Read the locked columns of one site, and nothing else of it; of a quantised one in float64.

        Args:
            site: of this checkpoint.
            heads: the locked ones, ascending.
            room: memory to put them into, `site.column_bytes(len(heads))` bytes; by default memory of their own.
        """
        if site.quantised:
            projection, tensors = self._quantised(site)
            of_heads = [projection.columns(head * site.head_dim, site.head_dim) for head in heads]
            return StoredColumns(DequantisedColumns(of_heads, site.hidden_size, site.head_dim), tensors.digest)
        file, itemsize = self.files[site.weight.file], site.dtype.itemsize
        width = site.head_dim * itemsize
        rows, row_bytes = site.weight.shape[0], site.weight.shape[1] * itemsize
        block = max(1, _BLOCK_BYTES // row_bytes)
        if site.transposed:
            parts = [
                file.read(site.weight.start + head * site.head_dim * row_bytes, site.head_dim * row_bytes)
                for head in heads
            ]
            stacked = np.frombuffer(b"".join(parts), np.uint8).reshape(len(heads) * site.head_dim, -1, itemsize)
            columns = np.ascontiguousarray(stacked.transpose(1, 0, 2)).reshape(site.hidden_size, -1)
        else:
            room = np.empty(site.column_bytes(len(heads)), np.uint8) if room is None else room
            columns = room.reshape(rows, len(heads) * width)
            for first in range(0, rows, block):
                count = min(block, rows - first)
                with file.view(site.weight.start + first * row_bytes, count * row_bytes) as view:
                    stored = np.frombuffer(view, np.uint8).reshape(count, row_bytes)
                    for i, head in enumerate(heads):
                        columns[first : first + count, i * width : (i + 1) * width] = stored[
                            :, head * width : (head + 1) * width
                        ]
                    del stored
        matrix = torch.from_numpy(columns).view(site.dtype)
        return StoredColumns(
            HeadColumns.side_by_side(matrix, site.head_dim), lambda: hashlib.sha256(columns.data).digest()
        )

    def identity_of(self, site: StoredSite) -> tuple[Any, ...]:
        """What changes when the numbers of a site's weight may have."""
        tensors = [site.weight]
        if site.quantised:
            tensors = [tensor for name, tensor in self.shards.tensors.items() if name.startswith(f"{site.name}.")]
        put_back = [
            (start, patch.name)
            for start, patch in self.files[site.weight.file].patches
            if isinstance(patch, ByteColumns) and start == site.weight.start
        ]
        return (*((self.files[tensor.file].identity, tensor.start) for tensor in tensors), *put_back)

    def read_vector(self, tensor: StoredTensor) -> torch.Tensor:
        """A whole tensor of one dimension, in the dtype of the file.

        Raises:
            UnsupportedError: fastlock does not fold that dtype.
        """
        if (dtype := tensor.torch_dtype) is None:
            raise _not_folded(f"{self.where}: a bias in {shown(tensor.file)}", tensor)
        data = bytearray(self.files[tensor.file].read(tensor.start, tensor.length))
        return torch.frombuffer(data, dtype=dtype)

    def modules(self, names: Sequence[str]) -> dict[str, int]:
        """The modules of every layer ("self_attn.q_proj") that the files have, by path, with their output's length.

        A module is known by any of its tensors: quantised formats have no `weight`, or one that is packed.

        Raises:
            DamagedError: a weight has an impossible shape.
            UnsupportedError: the length of a quantised module's output cannot be told.
        """
        if (lengths := self._modules.get(tuple(names))) is None:
            prefix, lengths = self.sites[0].name.removesuffix(f"0.{self.family.projection}"), {}
            for site in self.sites:
                for name in names:
                    path = f"{prefix}{site.layer}.{name}"
                    if is_projection(self.shards.tensors, path):
                        lengths[path] = self._out_features(path, name)
            self._modules[tuple(names)] = lengths
        return dict(lengths)

    def _out_features(self, path: str, name: str) -> int:
        weight = self.shards.tensors.get(f"{path}.weight")
        if weight is not None and weight.torch_dtype is not None and not is_quantised(self.shards.tensors, path):
            length = weight.shape[0] if len(weight.shape) == 2 else 0
            if not 0 < length <= min(weight.length, MAX_FEATURES):
                raise DamagedError(
                    f"{self.where}: {shown(path)}.weight has the shape {list(weight.shape)}. {DOWNLOAD_AGAIN}"
                )
            return length
        num_heads, head_dim = head_geometry(self.text_config)
        grouped = getattr(self.text_config, "num_key_value_heads", None) or num_heads
        by_name: dict[str, int] = {
            "q_proj": num_heads * head_dim,
            "k_proj": grouped * head_dim,
            "v_proj": grouped * head_dim,
            "o_proj": self.text_config.hidden_size,
        }
        length = by_name.get(name.rpartition(".")[2], 0)
        if not 0 < length <= MAX_FEATURES:
            raise UnsupportedError(
                f"{self.where}: {shown(path)} is quantised, and needs a bias of unknown length. {_QUANTISED}"
            )
        return length

    def check_unchanged(self) -> None:
        """Raise a DamagedError if a file was changed since it was first looked at."""
        for file in self.files.values():
            file.check_unchanged()

    def _find_sites(self) -> list[StoredSite]:
        family, tensors = self.family, self.shards.tensors
        num_heads, head_dim = head_geometry(self.text_config)
        expected = (self.text_config.hidden_size, num_heads * head_dim)
        sites = []
        for layer, name in enumerate(self._projections()):
            weight = next(tensors[key] for suffix in WEIGHTS if (key := f"{name}.{suffix}") in tensors)
            bias, quantised = tensors.get(f"{name}.bias"), is_quantised(tensors, name)
            if not quantised and weight.shape != (expected[::-1] if family.transposed else expected):
                raise self._unfit(
                    f"{shown(name)}.weight is {list(weight.shape)}, but its config says {num_heads} heads of "
                    f"{head_dim} and a hidden size of {expected[0]}. They do not belong together."
                )
            dtype = self._dtype_beside(bias) if quantised else weight.torch_dtype
            sites.append(
                StoredSite(
                    layer, name, weight, bias, expected[0], num_heads, head_dim, family.transposed, quantised, dtype
                )
            )
        return sites

    def _dtype_beside(self, bias: StoredTensor | None) -> torch.dtype | None:
        """The dtype of the bias of a quantised projection: its own, or the one that the model computes in."""
        if bias is not None and bias.torch_dtype is not None:
            return bias.torch_dtype
        dtype = getattr(self.text_config, "dtype", None) or self.config.dtype
        return BY_TORCH_NAME.get(str(dtype).removeprefix("torch."), torch.float16)

    def _projections(self) -> list[str]:
        """The names of the output projections in the files, layers ascending."""
        family = self.family
        pattern = re.compile(
            rf"((?:.*\.)?{family.layers}\.)(\d{{1,5}})\.({re.escape(family.projection)})\.(?:{'|'.join(WEIGHTS)})",
            re.DOTALL,
        )
        by_prefix: dict[str, dict[int, str]] = {}
        for name in self.shards.tensors:
            if match := pattern.fullmatch(name):
                by_prefix.setdefault(match[1], {})[int(match[2])] = match[1] + match[2] + "." + match[3]
        layers: int = self.text_config.num_hidden_layers
        complete = [names for names in by_prefix.values() if names.keys() == set(range(layers))]
        if len(complete) != 1:
            longest = max(map(len, by_prefix.values()), default=0)
            if len(by_prefix) == 1 and longest > layers:
                raise self._unfit(
                    f"its files hold {longest} layers with {family.projection}, but its config says {layers}. Correct "
                    f"num_hidden_layers in {CONFIG}, or remove the layers that are too many."
                )
            raise self._unfit(
                f"its config says {layers} layers, and its files hold {len(complete)} such lists of layers with "
                f"{family.projection} ({self.model_type}). They do not belong together, or fastlock does not know this "
                "variant."
            )
        return [complete[0][layer] for layer in range(layers)]

    def _unfit(self, problem: str) -> FastlockError:
        """The error for files that do not look as the config says: a quantised checkpoint's never do."""
        if self.raw.get("quantization_config") is not None:
            return UnsupportedError(f"{self.where}: is quantised, as its config says. {_QUANTISED}")
        if any(name.endswith(_PACKED) for name in self.shards.tensors):
            return UnsupportedError(f"{self.where}: is quantised, as its tensors show. {_QUANTISED}")
        return DamagedError(f"{self.where}: {problem}")


def check_names(names: Iterable[str], where: str) -> None:
    """Refuse tensors that are named as a wrapper names them: no loader takes those names for the model's.

    Raises:
        UnsupportedError: one is.
    """
    for name in names:
        if name.startswith(tuple(_WRAPPERS)):
            wrapper = next(wrapper for prefix, wrapper in _WRAPPERS.items() if name.startswith(prefix))
            raise UnsupportedError(
                f"{where}: {shown(name)} is named as {wrapper} names it, and no loader knows such names. Save the "
                "model inside the wrapper, or take the prefix off."
            )


def _not_folded(name: str, tensor: StoredTensor) -> UnsupportedError:
    return UnsupportedError(f"{name} is {tensor.dtype[:20]!a}; fastlock folds {FOLDABLE}. {_QUANTISED}")
