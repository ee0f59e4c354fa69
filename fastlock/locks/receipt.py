"""The receipt: what a relock did, in data."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from fastlock.errors import FastlockError
from fastlock.locks.lock import check_strength
from fastlock.models.sites import Site
from fastlock.version import __version__

FORMAT_VERSION = 1


@dataclass(frozen=True)
class LockedSite:
    """One relocked output projection: its layer, module path, locked heads, and whether it had a bias before."""

    layer: int
    name: str
    heads: tuple[int, ...]
    had_bias: bool


@dataclass(frozen=True)
class Receipt:
    """What a relock did.

    Attributes:
        lock_digest: SHA-256 of the lock (`Lock.digest`).
        strength: the strength applied.
        model_type: the model family.
        dtype: the dtype of the biases written.
        sites: the relocked output projections.
        fastlock_version: the fastlock that did it.
        original_config: what the model's config was before it was saved in Llama form, None for all others.
    """

    lock_digest: str
    strength: float
    model_type: str
    dtype: str
    sites: tuple[LockedSite, ...]
    fastlock_version: str = __version__
    original_config: dict[str, Any] | None = field(default=None, repr=False, compare=False)
    _source: _Source | None = field(default=None, repr=False, compare=False)

    @property
    def layers(self) -> tuple[int, ...]:
        """The relocked layers, ascending."""
        return tuple(site.layer for site in self.sites)

    @cached_property
    def weights_digest(self) -> str:
        """SHA-256 over the SHA-256 of each site's weights read, by layer: its locked columns, row by row.

        Computed when first asked for, from the model as relock left it: hashing costs more than relocking.

        Raises:
            FastlockError: the model is gone, or its weights were changed since.
        """
        return weights_digest(
            hashlib.sha256(raw_bytes(locked_columns(site.weight, locked.heads, site.head_dim))).digest()
            for locked, site in zip(self.sites, self._read(), strict=True)
        )

    @cached_property
    def biases_digest(self) -> str:
        """SHA-256 of the biases written, [hidden] each, by layer. Computed when first asked for."""
        return biases_digest(site.bias for site in self._read())

    def to_dict(self) -> dict[str, Any]:
        """The whole receipt, digests included, as data that JSON can hold."""
        return {
            "format_version": FORMAT_VERSION,
            "fastlock_version": self.fastlock_version,
            "lock_digest": self.lock_digest,
            "strength": self.strength,
            "model_type": self.model_type,
            "dtype": self.dtype,
            "sites": [
                {"layer": site.layer, "name": site.name, "heads": list(site.heads), "had_bias": site.had_bias}
                for site in self.sites
            ],
            "weights_digest": self.weights_digest,
            "biases_digest": self.biases_digest,
        }

    @classmethod
    def from_dict(cls, data: Any, where: str) -> Receipt:
        """The receipt that `to_dict` wrote, out of a file that may have been changed since.

        Raises:
            FastlockError: it is no receipt, or one of a newer format.
        """
        try:
            if data["format_version"] != FORMAT_VERSION:
                raise FastlockError(
                    f"{where}: receipt format {data['format_version']!r}; this fastlock reads {FORMAT_VERSION}. "
                    "Upgrade fastlock."
                )
            receipt = cls(
                lock_digest=_text(data["lock_digest"]),
                strength=check_strength(data["strength"]),
                model_type=_text(data["model_type"]),
                dtype=_text(data["dtype"]),
                sites=tuple(_locked_site(site) for site in data["sites"]),
                fastlock_version=_text(data["fastlock_version"]),
            )
            digests = {name: _text(data[name]) for name in ("weights_digest", "biases_digest")}
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise FastlockError(
                f"{where}: the receipt is damaged ({type(error).__name__}: {error}). Get the checkpoint again, "
                "or relock its original."
            ) from None
        return receipt.with_digests(**digests)

    def renamed(self, names: list[str]) -> Receipt:
        """The same receipt, its sites called by these names."""
        sites = tuple(replace(site, name=name) for site, name in zip(self.sites, names, strict=True))
        return replace(self, sites=sites).with_digests(self.weights_digest, self.biases_digest)

    def with_digests(self, weights_digest: str, biases_digest: str) -> Receipt:
        """The same receipt with its digests known already."""
        known = replace(self)
        known.__dict__.update(weights_digest=weights_digest, biases_digest=biases_digest)
        return known

    def of(self, sites: list[Site]) -> Receipt:
        """The same receipt, its digests to be taken from these sites."""
        return replace(self, _source=_Source(sites))

    def _read(self) -> list[Site]:
        if self._source is None:
            raise FastlockError("this receipt was copied without its digests; call its to_dict() before copying it.")
        return self._source.sites()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_source": None}


class _Source:
    """The sites that a receipt speaks of: it keeps no model alive, and notices changed weights."""

    def __init__(self, sites: list[Site]) -> None:
        self._sites = [
            (weakref.ref(site.module), site.layer, site.name, site.num_heads, site.head_dim) for site in sites
        ]
        self._versions = _versions(sites)

    def sites(self) -> list[Site]:
        found = []
        for reference, layer, name, num_heads, head_dim in self._sites:
            module = reference()
            if module is None:
                raise FastlockError("the model of this receipt is gone; call to_dict() before dropping the model.")
            found.append(Site(layer, name, module, num_heads, head_dim))
        if _versions(found) != self._versions:
            raise FastlockError(
                "the model was changed since this receipt was made, so that digests of now would not be its own. "
                "Relock it again for a receipt of the model as it is."
            )
        return found


def _versions(sites: Iterable[Site]) -> list[tuple[int, int]]:
    tensors = [tensor for site in sites for tensor in (site.module.weight, site.module.bias)]
    return [(id(tensor), version_of(tensor)) for tensor in tensors]


def version_of(tensor: torch.Tensor | None) -> int:
    """How often a tensor was written to, as far as PyTorch counts it: 0 where it does not."""
    try:
        return 0 if tensor is None else tensor._version
    except RuntimeError:  # made in inference mode
        return 0


def locked_columns(weight: torch.Tensor, heads: Iterable[int], head_dim: int) -> torch.Tensor:
    """The columns of W that the lock reads, [hidden, len(heads) * head_dim]."""
    return torch.cat([weight[:, head * head_dim : (head + 1) * head_dim] for head in heads], dim=1)


def weights_digest(of_sites: Iterable[bytes]) -> str:
    """SHA-256 over the SHA-256 of each site's locked columns."""
    return hashlib.sha256(b"".join(of_sites)).hexdigest()


def biases_digest(biases: Iterable[torch.Tensor | None]) -> str:
    """SHA-256 of biases, [hidden] each, in order; a missing one counts as no bytes."""
    sha = hashlib.sha256()
    for bias in biases:
        sha.update(b"" if bias is None else raw_bytes(bias))
    return sha.hexdigest()


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The numbers of a tensor as they lie in memory, row by row."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.isascii():
        raise TypeError(f"{str(value)[:80]!a} where ASCII text should be")
    return value


def _index(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{str(value)[:80]!a} where an index should be")
    return value


def _locked_site(data: Any) -> LockedSite:
    if type(data["had_bias"]) is not bool:
        raise TypeError("had_bias is neither true nor false")
    heads = tuple(_index(head) for head in data["heads"])
    return LockedSite(_index(data["layer"]), _text(data["name"]), heads, data["had_bias"])
