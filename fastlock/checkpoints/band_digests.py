"""Whether a band's tensors are the base's, byte for byte: from headers and digests, with no model loaded."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fastlock.architectures.families import FAMILIES
from fastlock.checkpoints.checkpoint import check_names
from fastlock.checkpoints.config import read_config, transformers_config
from fastlock.checkpoints.tensor_index import Shards, StoredTensor, read_shards
from fastlock.errors import DamagedError, UnsupportedError, shown
from fastlock.locks.band import Band, check_band_fits
from fastlock.storage.files import CONFIG, DOWNLOAD_AGAIN

_BLOCK_BYTES = 16 * 1024 * 1024
_THREADS = 4
# The outermost list in a tensor's name: what is before it, its own name, the number, and the rest.
_LISTED = re.compile(r"((?:[^.\d][^.]*\.)*?)([^.\d][^.]*)\.(\d{1,5})\.(.+)", re.DOTALL)
# Written into a checkpoint's directory, and loaded on top of it or instead of it.
_BESIDE = ("adapter_config.json",)


@dataclass(frozen=True)
class TensorDifference:
    """A tensor of the band that is not the base's.

    Attributes:
        name: as the checkpoint names it.
        what: how it differs, as a clause.
    """

    name: str
    what: str


@dataclass(frozen=True)
class BandComparison:
    """What was compared.

    Attributes:
        tensors: how many of the base's tensors lie in the band.
        digest: SHA-256 (hex) over them: names below the list of layers, dtypes, shapes and bytes.
        differences: of the checkpoint's tensors from them, in the order of their names.
    """

    tensors: int
    digest: str
    differences: tuple[TensorDifference, ...]


class StoredBand:
    """A band in a checkpoint's files, as a loader would see it.

    Attributes:
        where: the directory, for messages.
        files: its files by name.
        tensors: those of the band: their full names, and where they lie, by their names in the list of layers
            ("6.self_attn.q_proj.weight").
    """

    def __init__(self, files: Mapping[str, Any], where: str, band: Band) -> None:
        """Read config, index and headers.

        Raises:
            UnsupportedError: the layers are not one plain list, or the weights are in another format.
            DamagedError: the files are damaged, hostile or disagree.
            MismatchError: the band is not of this model.
            FastlockError: there is no checkpoint.
        """
        self.where, self.files = where, files
        config = transformers_config(read_config(files, where), where).get_text_config()
        check_band_fits(band, config.num_hidden_layers, config.model_type, where)
        beside = [name for name in _BESIDE if name in files]
        if beside:
            raise UnsupportedError(
                f"{where}: holds {beside[0]}, and loaders put the adapter on top of the weights, in the band too. "
                "Merge it first, or verify the directory without it."
            )
        shards = read_shards(dict(files), where)
        check_names(shards.tensors, where)
        listed = _listed(shards, where, config.model_type, config.num_hidden_layers)
        self.tensors: dict[str, tuple[str, StoredTensor]] = {}
        for number in band.layers:
            self.tensors |= {f"{number}.{rest}": stored for rest, stored in listed[number].items()}

    def digests(self) -> dict[str, str]:
        """SHA-256 (hex) of the bytes of each tensor, by its name in the list of layers."""
        with ThreadPoolExecutor(_THREADS) as pool:
            found = pool.map(lambda entry: self._digest(entry[1]), self.tensors.values())
            digests = dict(zip(self.tensors, found, strict=True))
        for file in {tensor.file for _, tensor in self.tensors.values()}:
            self.files[file].check_unchanged()
        return digests

    def _digest(self, tensor: StoredTensor) -> str:
        sha = hashlib.sha256()
        for start in range(0, tensor.length, _BLOCK_BYTES):
            length = min(_BLOCK_BYTES, tensor.length - start)
            sha.update(self.files[tensor.file].read(tensor.start + start, length))
        return sha.hexdigest()


def compared(tuned: StoredBand, base: StoredBand) -> BandComparison:
    """The band of a checkpoint against that of its base; tensors are matched by their names in the list of layers."""
    of_base, of_tuned = base.digests(), tuned.digests()
    differences = list(_differences(tuned, base, of_tuned, of_base))
    total = hashlib.sha256()
    for name in sorted(of_base):
        tensor = base.tensors[name][1]
        total.update(f"{len(name)}:{name} {tensor.dtype} {tensor.shape} {of_base[name]}\n".encode())
    return BandComparison(len(of_base), total.hexdigest(), tuple(differences))


def _differences(
    tuned: StoredBand, base: StoredBand, of_tuned: Mapping[str, str], of_base: Mapping[str, str]
) -> Iterator[TensorDifference]:
    for name in sorted(of_base.keys() | of_tuned.keys()):
        if name not in of_tuned:
            yield TensorDifference(base.tensors[name][0], "is missing")
        elif name not in of_base:
            yield TensorDifference(tuned.tensors[name][0], "is not in the base")
        else:
            full, own = tuned.tensors[name]
            other = base.tensors[name][1]
            if (own.dtype, own.shape) != (other.dtype, other.shape):
                said = f"is {own.dtype} {list(own.shape)}, in the base {other.dtype} {list(other.shape)}"
                yield TensorDifference(full, said)
            elif of_tuned[name] != of_base[name]:
                yield TensorDifference(full, "has other bytes")


_ByLayer = dict[int, dict[str, tuple[str, StoredTensor]]]


def _listed(shards: Shards, where: str, model_type: str, layers: int) -> _ByLayer:
    """The tensors of the decoder's layers: by layer, and by their names in it."""
    family = FAMILIES.get(model_type)
    lists: dict[str, _ByLayer] = {}
    for name, tensor in shards.tensors.items():
        if (match := _LISTED.fullmatch(name)) and (family is None or match[2] == family.layers):
            by_layer = lists.setdefault(match[1] + match[2], {})
            named = by_layer.setdefault(int(match[3]), {})
            if match[4] in named or str(int(match[3])) != match[3]:
                raise DamagedError(f"{where}: {shown(name)} names a layer in two ways. {DOWNLOAD_AGAIN}")
            named[match[4]] = (name, tensor)
    every = set(range(layers))
    if family is None:
        found = [by_layer for by_layer in lists.values() if by_layer.keys() == every]
    else:  # those of a vision tower have other projections; one that is not whole must not make room for another
        start = f"{family.projection}."
        found = [
            by_layer
            for by_layer in lists.values()
            if any(name.startswith(start) for named in by_layer.values() for name in named)
        ]
    if len(found) != 1 or found[0].keys() != every:
        sizes = ", ".join(str(len(by_layer)) for by_layer in found) or "none"
        raise UnsupportedError(
            f"{where}: its {CONFIG} says {layers} layers ({shown(model_type)}); the lists of layers in its files that "
            f"could be these have as many: {sizes}. A band is a part of one plain list of decoder layers; it cannot be "
            "verified here."
        )
    return found[0]
