"""A model in GGUF files: its geometry, its output projections, and what is read of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fastlock.architectures.families import check_lock_fits
from fastlock.architectures.gguf_architectures import check_gguf_architecture
from fastlock.checkpoints.base import Shape
from fastlock.checkpoints.gguf.columns import check_type, read_columns
from fastlock.checkpoints.gguf.parts import GgufPart
from fastlock.checkpoints.gguf.tensor_types import F32
from fastlock.errors import DamagedError, UnsupportedError, shown
from fastlock.kernels.fold.reference import HeadColumns
from fastlock.storage.files import DOWNLOAD_AGAIN

if TYPE_CHECKING:
    from fastlock.checkpoints.gguf.header import GgufTensor
    from fastlock.locks.lock import Lock

_ARCHITECTURE, _TYPE = "general.architecture", "general.type"
# What a GGUF can be beside a model, and what to do then.
_OTHER_KINDS = {
    "adapter": "an adapter, which has no place for a bias. Relock the GGUF of its base: the lock is exact under every "
    "adapter that leaves attn_output alone",
    "imatrix": "an importance matrix. Give the model's GGUF",
    "mmproj": "the part of a model that reads images or sound. Relock the language model's GGUF, and keep this one",
    "vocab": "a vocabulary without a model. Give the model's GGUF",
}
_WITHOUT_HEADS = ("imatrix", "mmproj", "vocab")
# No model has more layers, heads, or numbers in a row.
_MAX_SIZE = 2**20
# Words in keys by which tools would say that they rotated the heads. llama.cpp itself writes no such key.
_ROTATED = re.compile("rotation|rotated|hadamard|quarot|spinquant", re.IGNORECASE)


@dataclass(frozen=True)
class GgufGeometry:
    """The heads of a model; named as in a config of transformers.

    Attributes:
        num_hidden_layers: how many layers it has.
        num_attention_heads: heads of each.
        head_dim: the length of a head's output.
        hidden_size: of the output projection's output.
    """

    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    hidden_size: int

    @property
    def shape(self) -> Shape:
        """As that of a base."""
        return self.hidden_size, self.num_attention_heads, self.head_dim, self.num_hidden_layers


@dataclass(frozen=True)
class GgufSite:
    """One layer's output projection.

    Attributes:
        layer: the layer.
        name: of the projection ("blk.3.attn_output").
        part: which of the model's files holds W.
        weight: W, of the shape (num_heads * head_dim, hidden).
        bias_part: which holds c, None where there is none.
        bias: c, [hidden] float32.
    """

    layer: int
    name: str
    part: int
    weight: GgufTensor
    bias_part: int | None
    bias: GgufTensor | None


@dataclass(frozen=True)
class GgufColumns:
    """The locked columns of one site.

    Attributes:
        columns: side by side, [hidden, len(heads) * head_dim] float32; float64 if the projection has a scale.
        digest: SHA-256 of the bytes that were read for them.
    """

    columns: HeadColumns
    digest: bytes


class WithoutHeadsError(UnsupportedError):
    """A GGUF is no model that speaks: there is nothing in it to lock."""


class GgufModel:
    """A model in GGUF files.

    Attributes:
        where: the first file, for messages.
        parts: its files.
        architecture: as `general.architecture` names it.
        geometry: its heads.
    """

    def __init__(self, parts: Sequence[GgufPart], where: str) -> None:
        """Read the metadata.

        Raises:
            WithoutHeadsError: it has none.
            UnsupportedError: it is no model, is of an architecture in which a lock would not act, or was rotated.
            DamagedError: the metadata is damaged.
        """
        self.parts, self.where = parts, where
        header = parts[0].header
        self.architecture = shown((header.text(_ARCHITECTURE) or "")[:80])
        kind = header.text(_TYPE) or ("mmproj" if self.architecture == "clip" else "model")
        if kind == "model" and not any(part.header.tensors for part in parts):
            kind = "vocab"
        if kind != "model":
            what = _OTHER_KINDS.get(kind, f"of the type {shown(kind[:80])}. Give the model's GGUF")
            kind_of_error = WithoutHeadsError if kind in _WITHOUT_HEADS else UnsupportedError
            raise kind_of_error(f"{where}: is {what}.")
        if not self.architecture:
            raise self._damaged(f"has no {_ARCHITECTURE}")
        check_gguf_architecture(self.architecture, where)
        self._check_basis()
        self.geometry = self._read_geometry()
        self._places = {name: i for i, part in enumerate(parts) for name in part.header.tensors}

    def sites_for(self, lock: Lock) -> list[GgufSite]:
        """The sites that a lock shifts, layers ascending.

        Raises:
            MismatchError: the lock is of another geometry.
            UnsupportedError: a weight is of a type that cannot be read, or a bias is not in F32.
            DamagedError: a tensor is missing, or is not as the metadata says.
        """
        check_lock_fits(lock, self.geometry.num_hidden_layers, self.geometry, self.where)
        sites = [self.site(layer) for layer in sorted(set(lock.layers.tolist()))]
        for site in sites:
            check_type(site.weight.name, site.weight.type, self.where)
        return sites

    def site(self, layer: int) -> GgufSite:
        """The site of a layer, whatever the type of its weight. Raises as `sites_for` does."""
        geometry, name = self.geometry, f"blk.{layer}.attn_output"
        width = geometry.num_attention_heads * geometry.head_dim
        part, weight = self._tensor(f"{name}.weight", (width, geometry.hidden_size))
        if f"{name}.bias" not in self._places:
            return GgufSite(layer, name, part, weight, None, None)
        bias_part, bias = self._tensor(f"{name}.bias", (geometry.hidden_size,))
        if bias.type != F32:
            raise UnsupportedError(
                f"{self.where}: {bias.name} is {bias.type.name}; fastlock changes biases in F32, as llama.cpp's "
                "converter writes them. Convert the model again."
            )
        return GgufSite(layer, name, part, weight, bias_part, bias)

    def read_columns(self, site: GgufSite, heads: Sequence[int]) -> GgufColumns:
        """Read the locked columns of one site, and nothing else of it.

        Args:
            site: of this model.
            heads: the locked ones, ascending.
        """
        head_dim = self.geometry.head_dim
        numbers, digest = read_columns(self.parts[site.part], site.weight, heads, head_dim)
        columns = torch.from_numpy(numbers)
        if (scale := self._scale(site)) is not None:
            columns = columns.double() * scale
        return GgufColumns(HeadColumns.side_by_side(columns, head_dim), digest)

    def read_bias(self, site: GgufSite) -> torch.Tensor | None:
        """The bias that is there, [hidden] float32, None where there is none."""
        if site.bias is None or site.bias_part is None:
            return None
        return torch.frombuffer(bytearray(self.parts[site.bias_part].read(site.bias)), dtype=torch.float32)

    def check_unchanged(self) -> None:
        """Raise a DamagedError if a file was changed since it was opened."""
        for part in self.parts:
            part.file.check_unchanged()

    def _scale(self, site: GgufSite) -> float | None:
        """By what llama.cpp multiplies the projection (of NVFP4), None where it does not."""
        name = f"{site.name}.scale"
        if name not in self._places:
            return None
        part, tensor = self._tensor(name, (1,))
        if tensor.type != F32:
            raise self._damaged(f"{name} is {tensor.type.name}, and should be F32")
        return float(torch.frombuffer(bytearray(self.parts[part].read(tensor)), dtype=torch.float32)[0])

    def _tensor(self, name: str, shape: tuple[int, ...]) -> tuple[int, GgufTensor]:
        """Which part holds a tensor, and where."""
        if name not in self._places:
            raise self._damaged(f"lacks {name}")
        part = self._places[name]
        tensor = self.parts[part].header.tensors[name]
        if tensor.shape != shape:
            raise self._damaged(
                f"{name} is {list(tensor.shape)}, but by its metadata should be {list(shape)}: they do not belong "
                "together"
            )
        return part, tensor

    def _check_basis(self) -> None:
        """Refuse a model of which the metadata says that its heads were rotated: a lock would pull somewhere else."""
        rotated = next((key for part in self.parts for key in part.header.entries if _ROTATED.search(key)), None)
        if rotated is not None:
            raise UnsupportedError(
                f"{self.where}: its metadata has {shown(rotated[:80])}: its heads were rotated, and a lock would pull "
                "somewhere else. Relock the model before it is rotated and quantised."
            )

    def _read_geometry(self) -> GgufGeometry:
        heads, hidden = self._number("attention.head_count"), self._number("embedding_length")
        head_dim = self.parts[0].header.number(f"{self.architecture}.attention.value_length")
        head_dim = hidden // heads if head_dim is None else head_dim
        if not 0 < head_dim <= _MAX_SIZE:
            raise self._damaged(f"says that its heads have a length of {head_dim}")
        return GgufGeometry(self._number("block_count"), heads, head_dim, hidden)

    def _number(self, key: str) -> int:
        number = self.parts[0].header.number(f"{self.architecture}.{key}")
        if number is None or not 0 < number <= _MAX_SIZE:
            raise self._damaged(f"its {self.architecture}.{key} is {'missing' if number is None else number}")
        return number

    def _damaged(self, what: str) -> DamagedError:
        return DamagedError(f"{self.where}: {what}. {DOWNLOAD_AGAIN}")
