"""A checkpoint as it is stored: its config, where its output projections lie, and the locked columns read from there.

Nothing is loaded: configs, headers and the locked columns are all that is read.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from fastlock.architectures.families import Family, check_lock_fits, family_of_config, head_geometry
from fastlock.checkpoints.config import read_config, transformers_config
from fastlock.checkpoints.tensor_index import Stored, read_shards
from fastlock.errors import FastlockError
from fastlock.kernels.fold.reference import HeadColumns
from fastlock.locks.lock import Lock

MAX_THREADS = 8
T = TypeVar("T")
# Rows are mapped in blocks of this size, which bounds the memory that a large projection takes.
_BLOCK_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True)
class StoredSite:
    """One layer's attention output projection in a checkpoint's files.

    Attributes:
        layer: the decoder layer.
        name: of the projection, in the file ("model.layers.3.self_attn.o_proj").
        weight: W, [hidden, num_heads * head_dim]; [num_heads * head_dim, hidden] where the family transposes it.
        bias: c, [hidden], None where the file has none.
        num_heads, head_dim: of its input.
        transposed: how W is kept.
    """

    layer: int
    name: str
    weight: Stored
    bias: Stored | None
    num_heads: int
    head_dim: int
    transposed: bool

    @property
    def hidden_size(self) -> int:
        """The length of its output."""
        return self.weight.shape[1 if self.transposed else 0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its weight."""
        dtype = self.weight.torch_dtype
        assert dtype is not None
        return dtype


@dataclass(frozen=True)
class StoredColumns:
    """The locked columns of one site, and their digest.

    Attributes:
        columns: side by side, [hidden, len(heads) * head_dim], in the dtype of the file.
        digest: SHA-256 of their bytes, row by row.
    """

    columns: HeadColumns
    digest: bytes


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
        sites: the output projection of every layer.
    """

    def __init__(self, files: dict[str, Any], where: str) -> None:
        """Read config, index and headers.

        Raises:
            FastlockError: they are damaged, hostile or disagree, or the family is refused or unknown.
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
        self.sites = self._find_sites()

    @property
    def kind(self) -> str:
        """The family's name."""
        kind: str = self.text_config.model_type
        return kind

    def sites_for(self, lock: Lock) -> list[StoredSite]:
        """The sites that the lock shifts, layers ascending.

        Raises:
            FastlockError: the lock is of another geometry, or a weight is not of a dtype that can be folded.
        """
        check_lock_fits(lock, len(self.sites), self.text_config, self.where)
        locked = [self.sites[layer] for layer in sorted(set(lock.layers.tolist()))]
        for site in locked:
            if site.weight.torch_dtype is None:
                raise FastlockError(
                    f"{self.where}: {site.name}.weight is {site.weight.dtype[:20]}; fastlock folds F16, BF16, F32 and "
                    "F64. Quantised checkpoints can't be relocked yet: relock the unquantised one, then quantise."
                )
            if site.bias is not None and (site.bias.dtype, site.bias.shape) != (site.weight.dtype, (site.hidden_size,)):
                raise FastlockError(
                    f"{self.where}: {site.name}.bias is {site.bias.dtype[:20]} {list(site.bias.shape)}, but should be "
                    f"{site.weight.dtype} [{site.hidden_size}]. Get the checkpoint again."
                )
        return locked

    def read_columns(self, site: StoredSite, heads: Sequence[int]) -> StoredColumns:
        """Read the locked columns of one site, and nothing else of it."""
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
            columns = np.empty((rows, len(heads) * width), np.uint8)
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
        return StoredColumns(HeadColumns.side_by_side(matrix, site.head_dim), hashlib.sha256(columns.data).digest())

    def read_vector(self, stored: Stored) -> torch.Tensor:
        """A whole tensor of one dimension, in the dtype of the file."""
        data = bytearray(self.files[stored.file].read(stored.start, stored.length))
        assert stored.torch_dtype is not None
        return torch.frombuffer(data, dtype=stored.torch_dtype)

    def modules(self, names: Sequence[str]) -> dict[str, Stored]:
        """The weights of modules of every layer ("self_attn.q_proj"), by module path; those that the file has."""
        prefix = self.sites[0].name.removesuffix(f"0.{self.family.projection}")
        found: dict[str, Stored] = {}
        for site in self.sites:
            for name in names:
                path = f"{prefix}{site.layer}.{name}"
                if f"{path}.weight" in self.shards.tensors:
                    found[path] = self.shards.tensors[f"{path}.weight"]
        return found

    def check_unchanged(self) -> None:
        """Raise if a file was changed since it was first looked at."""
        for file in self.files.values():
            file.check_unchanged()

    def _find_sites(self) -> list[StoredSite]:
        family, tensors = self.family, self.shards.tensors
        pattern = re.compile(
            rf"((?:.*\.)?{family.layers}\.)(\d{{1,5}})\.{re.escape(family.projection)}\.weight", re.DOTALL
        )
        by_prefix: dict[str, dict[int, str]] = {}
        for name in tensors:
            if match := pattern.fullmatch(name):
                by_prefix.setdefault(match[1], {})[int(match[2])] = name.removesuffix(".weight")
        layers: int = self.text_config.num_hidden_layers
        found = [names for names in by_prefix.values() if names.keys() == set(range(layers))]
        if len(found) != 1:
            raise FastlockError(
                f"{self.where}: its config says {layers} layers, and its files hold {len(found)} such lists of layers "
                f"with {family.projection} ({self.kind}). They do not belong together, or the checkpoint is a variant "
                "that fastlock does not know (quantised, or an adapter?)."
            )
        num_heads, head_dim = head_geometry(self.text_config)
        sites = [
            StoredSite(
                layer,
                name,
                tensors[f"{name}.weight"],
                tensors.get(f"{name}.bias"),
                num_heads,
                head_dim,
                family.transposed,
            )
            for layer, name in sorted(found[0].items())
        ]
        expected = (self.text_config.hidden_size, num_heads * head_dim)
        for site in sites:
            if site.weight.shape != (expected[::-1] if family.transposed else expected):
                raise FastlockError(
                    f"{self.where}: {site.name}.weight is {list(site.weight.shape)}, but its config says {num_heads} "
                    f"heads of {head_dim} and a hidden size of {expected[0]}. They do not belong together."
                )
        return sites


def in_threads(function: Callable[[StoredSite], T], sites: Sequence[StoredSite]) -> list[T]:
    """The function's result for each site, one thread a site: threads of torch's own would get in each other's way."""
    available = torch.get_num_threads()
    threads = min(available, MAX_THREADS, len(sites))
    if threads < 2:
        return [function(site) for site in sites]
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        return list(pool.map(function, sites))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(available)
