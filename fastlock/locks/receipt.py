"""The receipt: what a relock did, in data; and how a checkpoint carries the lock.

The JSON form is specified in docs/receipt-format.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from fastlock.errors import FastlockError
from fastlock.locks.receipt_fields import (
    biases_in,
    check_ascending,
    check_keys,
    check_version,
    damaged_receipt,
    digest_in,
    digests_in,
    dtype_in,
    dtypes_in,
    encoded_biases,
    flag_in,
    index_in,
    list_in,
    object_in,
    optional,
    rank_in,
    strength_in,
    text_in,
    texts_in,
)
from fastlock.version import __version__

# That of a lock with a gate is another one: who does not know of gates would take it for a bias alone.
FORMAT_VERSION, GATE_FORMAT_VERSION = 1, 2
# Where config.json holds it.
CONFIG_KEY = "fastlock"
# "weights": no bias at all, and the config as it was; only of a gate alone.
FORMS = ("native", "llama", "weights")

# What a JSON object has to say, and what it may say besides.
_KEYS = (
    "format_version fastlock_version lock_digest strength model_type dtype sites weights_digest biases_digest".split()
)
_GATE_KEYS = "rank constant written_digest".split()
_SITE_KEYS = "layer name heads had_bias".split()
_OPTIONAL_SITE_KEYS = "dtype earlier_dtypes".split()
_CARRIER_KEYS = "form flag was original_biases".split()
_OPTIONAL_CARRIER_KEYS = "stacks original_config config_digest set_aside index_digest".split()


@dataclass(frozen=True)
class LockedSite:
    """One relocked output projection: its layer, module path, locked heads, and whether it had a bias before.

    Its dtype is there where it is another than the receipt's, as after merging adapters into some layers in float32.
    Earlier dtypes are there where the model was brought to another one before it was saved: that of the fold first.
    """

    layer: int
    name: str
    heads: tuple[int, ...]
    had_bias: bool
    dtype: str | None = None
    earlier_dtypes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As data that JSON can hold."""
        data = {"layer": self.layer, "name": self.name, "heads": list(self.heads), "had_bias": self.had_bias}
        dtypes = {"dtype": self.dtype, "earlier_dtypes": list(self.earlier_dtypes)}
        return data | {key: value for key, value in dtypes.items() if value}


class Digests(Protocol):
    """Where a receipt's digests come from: they are known, or taken when they are first asked for."""

    @property
    def weights(self) -> str:
        """As `Receipt.weights_digest`."""

    @property
    def biases(self) -> str:
        """As `Receipt.biases_digest`."""

    @property
    def written(self) -> str | None:
        """As `Receipt.written_digest`."""


@dataclass(frozen=True)
class KnownDigests:
    """Digests that are known already."""

    weights: str
    biases: str
    written: str | None = None


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
        rank: of the lock's gate, which is in the weights of the sites; 0 for a lock without one.
        constant: whether the lock has a constant part, and biases were written.
        original_config: what the model's config was before it was saved in Llama form, None for all others.
        digests: where its digests come from; None for a copy that was made before they were asked for.
    """

    lock_digest: str
    strength: float
    model_type: str
    dtype: str
    sites: tuple[LockedSite, ...]
    fastlock_version: str = __version__
    rank: int = 0
    constant: bool = True
    original_config: dict[str, Any] | None = field(default=None, repr=False, compare=False)
    digests: Digests | None = field(default=None, repr=False, compare=False)

    @property
    def layers(self) -> tuple[int, ...]:
        """The relocked layers, ascending."""
        return tuple(site.layer for site in self.sites)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtype of each site."""
        return tuple(site.dtype or self.dtype for site in self.sites)

    def with_dtypes(self, dtypes: Sequence[str]) -> Receipt:
        """The same receipt with these dtypes, one a site; its own is the first's."""
        sites = tuple(
            replace(site, dtype=None if dtype == dtypes[0] else dtype)
            for site, dtype in zip(self.sites, dtypes, strict=True)
        )
        return replace(self, dtype=dtypes[0], sites=sites)

    def converted(self, dtypes: Sequence[str]) -> Receipt:
        """The receipt of the model after it was brought to these dtypes, one a site."""
        sites = tuple(
            site if before == now else replace(site, earlier_dtypes=(*site.earlier_dtypes, before))
            for site, before, now in zip(self.sites, self.dtypes, dtypes, strict=True)
        )
        return replace(self, sites=sites).with_dtypes(dtypes)

    @property
    def weights_digest(self) -> str:
        """SHA-256 over the SHA-256 of the weights read at each site, by layer: its locked columns, row by row.

        Computed when first asked for, from the model as relock left it: hashing costs more than relocking.

        Raises:
            FastlockError: the model is gone, or was changed since.
        """
        return self._known().weights

    @property
    def biases_digest(self) -> str:
        """SHA-256 of the biases written, [hidden] each, by layer. Computed when first asked for; raises as above.

        Where the lock is a gate alone, none were written, and it is that of no bytes.
        """
        return self._known().biases

    @property
    def written_digest(self) -> str | None:
        """As `weights_digest`, of the locked columns that a gate wrote in their place; None without a gate."""
        return self._known().written if self.rank else None

    def to_dict(self) -> dict[str, Any]:
        """The whole receipt, digests included, as data that JSON can hold: the same receipt gives the same bytes.

        Raises:
            FastlockError: the digests were not asked for yet, and the model is gone or was changed since.
        """
        of_gate = {"rank": self.rank, "constant": self.constant, "written_digest": self.written_digest}
        return {
            "format_version": GATE_FORMAT_VERSION if self.rank else FORMAT_VERSION,
            "fastlock_version": self.fastlock_version,
            "lock_digest": self.lock_digest,
            "strength": self.strength,
            "model_type": self.model_type,
            "dtype": self.dtype,
            "sites": [site.to_dict() for site in self.sites],
            "weights_digest": self.weights_digest,
            "biases_digest": self.biases_digest,
        } | (of_gate if self.rank else {})

    @classmethod
    def from_dict(cls, data: Any, where: str) -> Receipt:
        """The receipt that `to_dict` wrote, out of a file that may have been changed since.

        Args:
            data: what the file says.
            where: the file's name, for messages.

        Raises:
            UnsupportedError: it is of a newer format.
            DamagedError: it is not a receipt, or was changed so that it cannot be one.
        """
        try:
            with_gate = check_version(data, where, FORMAT_VERSION, GATE_FORMAT_VERSION) == GATE_FORMAT_VERSION
            check_keys(data, _KEYS + _GATE_KEYS if with_gate else _KEYS)
            return cls(
                lock_digest=digest_in(data["lock_digest"]),
                strength=strength_in(data["strength"]),
                model_type=text_in(data["model_type"]),
                dtype=dtype_in(data["dtype"]),
                sites=_locked_sites(data["sites"]),
                fastlock_version=text_in(data["fastlock_version"]),
                rank=rank_in(data["rank"]) if with_gate else 0,
                constant=flag_in(data["constant"]) if with_gate else True,
                digests=KnownDigests(
                    digest_in(data["weights_digest"]),
                    digest_in(data["biases_digest"]),
                    optional(data, "written_digest", digest_in),
                ),
            )
        except (TypeError, ValueError, RecursionError) as error:
            raise damaged_receipt(where, error) from None

    def renamed(self, names: list[str]) -> Receipt:
        """The same receipt with these names of its sites, in order."""
        sites = tuple(replace(site, name=name) for site, name in zip(self.sites, names, strict=True))
        return replace(self, sites=sites)

    def _known(self) -> Digests:
        if self.digests is None:
            raise FastlockError("this receipt was copied without its digests. Call its to_dict() before copying it.")
        return self.digests


@dataclass(frozen=True)
class CarrierNote:
    """How a checkpoint carries the lock: enough to remove it again, in memory and on disk.

    Attributes:
        form: one of FORMS.
        flag: the config key that switches the biases on; "" where they are always on.
        was: whether it was on before.
        original_biases: by layer, the numbers of each original bias, in the dtype of the receipt.
        stacks: where the lock was to act; None where transformers saved the checkpoint.
        original_config: what the config was before, of the Llama form alone.
        config_digest, index_digest: SHA-256 of config.json without the receipt, and of the index; None where fastlock
            did not write them.
        set_aside: SHA-256 of each small file that was set aside, by its name; None as above.
    """

    form: str
    flag: str
    was: bool
    original_biases: Mapping[int, bytes] = field(default_factory=dict)
    stacks: tuple[str, ...] | None = None
    original_config: dict[str, Any] | None = None
    config_digest: str | None = None
    index_digest: str | None = None
    set_aside: Mapping[str, str] | None = None

    @property
    def had_none(self) -> bool:
        """Whether the projections had no biases before, or only zeros."""
        return self.form == "llama" or bool(self.flag and not self.was)

    def to_dict(self) -> dict[str, Any]:
        """The note as data that JSON can hold: the same note gives the same bytes. What is None is left out."""
        data: dict[str, Any] = {
            "form": self.form,
            "flag": self.flag,
            "was": self.was,
            "stacks": None if self.stacks is None else list(self.stacks),
            "original_config": self.original_config,
            "original_biases": encoded_biases(self.original_biases),
            "config_digest": self.config_digest,
            "set_aside": None if self.set_aside is None else dict(sorted(self.set_aside.items())),
            "index_digest": self.index_digest,
        }
        return {key: value for key, value in data.items() if value is not None}

    @classmethod
    def from_dict(cls, data: Any, where: str) -> CarrierNote:
        """The note that `to_dict` wrote, out of a file that may have been changed since.

        Args:
            data: what the file says.
            where: the file's name, for messages.

        Raises:
            DamagedError: it is not such a note.
        """
        try:
            check_keys(data, _CARRIER_KEYS, _OPTIONAL_CARRIER_KEYS)
            if data["form"] not in FORMS:
                raise ValueError(f"{str(data['form'])[:80]!a} where one of the forms should be")
            return cls(
                form=data["form"],
                flag=text_in(data["flag"]),
                was=flag_in(data["was"]),
                original_biases=biases_in(data["original_biases"]),
                stacks=optional(data, "stacks", texts_in),
                original_config=optional(data, "original_config", object_in),
                config_digest=optional(data, "config_digest", digest_in),
                index_digest=optional(data, "index_digest", digest_in),
                set_aside=optional(data, "set_aside", digests_in),
            )
        except (TypeError, ValueError, RecursionError) as error:
            raise damaged_receipt(where, error) from None


@dataclass(frozen=True)
class SavedReceipt:
    """What config.json holds under CONFIG_KEY: the receipt, and how the checkpoint carries the lock."""

    receipt: Receipt
    carrier: CarrierNote

    def to_dict(self) -> dict[str, Any]:
        """Both as data that JSON can hold."""
        return self.receipt.to_dict() | {"carrier": self.carrier.to_dict()}

    @classmethod
    def from_dict(cls, data: Any, where: str) -> SavedReceipt:
        """Both out of a file that may have been changed since.

        Args:
            data: what the file says.
            where: the file's name, for messages.

        Raises:
            UnsupportedError: they are of a newer format.
            DamagedError: they are damaged.
        """
        rest = dict(data) if isinstance(data, dict) else data
        carrier = rest.pop("carrier", None) if isinstance(rest, dict) else None
        saved = cls(Receipt.from_dict(rest, where), CarrierNote.from_dict(carrier, where))
        try:
            saved._check_form()
        except ValueError as error:
            raise damaged_receipt(where, error) from None
        return saved

    def _check_form(self) -> None:
        """Whether the carrier can be one of what was done: of a gate alone, no bias is carried."""
        note, of_none = self.carrier, CarrierNote("weights", "", True)
        carried = replace(of_none, form=note.form, flag=note.flag, was=note.was)
        carried = replace(carried, original_biases=note.original_biases, original_config=note.original_config)
        if carried != of_none if not self.receipt.constant else note.form == of_none.form:
            raise ValueError(f"{note.form!r} is not how such a lock is carried")


def weights_digest(site_digests: Iterable[bytes]) -> str:
    """SHA-256 (hex) over the SHA-256 (32 bytes each) of each site's locked columns, by layer."""
    return hashlib.sha256(b"".join(site_digests)).hexdigest()


def biases_digest(biases: Iterable[torch.Tensor | None]) -> str:
    """SHA-256 (hex) of biases, [hidden] each, in order; a missing one counts as no bytes."""
    sha = hashlib.sha256()
    for bias in biases:
        sha.update(b"" if bias is None else raw_bytes(bias))
    return sha.hexdigest()


def columns_digest(columns: torch.Tensor) -> bytes:
    """SHA-256 (32 bytes) of one site's locked columns, row by row."""
    return hashlib.sha256(_as_bytes(columns).data).digest()


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The numbers of a tensor as they lie in memory, row by row."""
    return _as_bytes(tensor).tobytes()


def _as_bytes(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy()


def _locked_sites(value: Any) -> tuple[LockedSite, ...]:
    sites = tuple(map(_locked_site, list_in(value)))
    check_ascending([site.layer for site in sites], "layers")
    return sites


def _locked_site(value: Any) -> LockedSite:
    check_keys(value, _SITE_KEYS, _OPTIONAL_SITE_KEYS)
    heads = tuple(map(index_in, list_in(value["heads"])))
    check_ascending(heads, "heads")
    return LockedSite(
        index_in(value["layer"]),
        text_in(value["name"]),
        heads,
        flag_in(value["had_bias"]),
        optional(value, "dtype", dtype_in),
        optional(value, "earlier_dtypes", dtypes_in) or (),
    )
