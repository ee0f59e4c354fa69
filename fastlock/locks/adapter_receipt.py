"""The receipt of an adapter: what a relock did, in data. It is a file of its own: PEFT drops keys it does not know.

The JSON form is specified in docs/receipt-format.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastlock.locks.receipt_fields import (
    biases_in,
    check_ascending,
    check_keys,
    check_version,
    damaged_receipt,
    digest_in,
    digests_in,
    dtype_in,
    encoded_biases,
    flag_in,
    index_in,
    list_in,
    optional,
    rank_in,
    strength_in,
    text_in,
    texts_in,
)
from fastlock.version import __version__

T = TypeVar("T")
# That of a lock with a gate is another one: who does not know of gates would take it for a bias alone.
ADAPTER_FORMAT_VERSION, ADAPTER_GATE_FORMAT_VERSION = 1, 2
# Where an adapter's directory holds it.
ADAPTER_RECEIPT = "fastlock.json"
ADAPTER_CARRIERS = ("base bias", "adapter bias", "sidecar")
# The only one of a lock with a gate.
GATE_CARRIER = "adapter gate"

_RECEIPT_KEYS = (
    "format_version fastlock_version lock_digest strength method carrier stacks base sites adapter_digest "
    "biases_digest original_biases written original"
).split()
_SITE_KEYS = "layer name heads touched dtype".split()
_BASE_KEYS = "name model_type weights_digest".split()


@dataclass(frozen=True)
class AdapterSite:
    """One locked output projection of an adapted model.

    Attributes:
        layer: the decoder layer.
        name: the projection's path, as the adapter names it, or would.
        heads: the locked ones, ascending.
        touched: whether the adapter touches it.
        dtype: of its bias; with a gate, of its A and B.
        gap: how far W d in the base's bias is off: 0 where it is exact, else ‖f − W d‖ / ‖W d‖, where f is what the
            displacement does in the adapted model; None if W d is zero, and with a gate.
        scale: the s of the fold, None where there is none.
    """

    layer: int
    name: str
    heads: tuple[int, ...]
    touched: bool
    dtype: str
    gap: float | None = None
    scale: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As data that JSON can hold."""
        data: dict[str, Any] = {
            "layer": self.layer,
            "name": self.name,
            "heads": list(self.heads),
            "touched": self.touched,
            "dtype": self.dtype,
            "gap": self.gap,
            "scale": self.scale,
        }
        return {key: value for key, value in data.items() if value is not None}


@dataclass(frozen=True)
class AdapterBase:
    """The base that an adapter was folded over.

    Attributes:
        name: the directory or URL of the base: of the relocked one, where the lock is in its biases.
        model_type: its family.
        weights_digest: as `Receipt.weights_digest`, of its locked columns.
    """

    name: str
    model_type: str
    weights_digest: str

    def to_dict(self) -> dict[str, Any]:
        """As data that JSON can hold."""
        return {"name": self.name, "model_type": self.model_type, "weights_digest": self.weights_digest}


@dataclass(frozen=True)
class AdapterReceipt:
    """What a relock of an adapter did.

    Attributes:
        lock_digest: SHA-256 of the lock (`Lock.digest`).
        strength: the strength applied.
        method: PEFT's name of the adapter's method ("LORA").
        carrier: where the lock is, one of ADAPTER_CARRIERS; GATE_CARRIER, where the lock has a gate.
        stacks: where the lock was to act.
        base: what the adapter was folded over.
        sites: the locked output projections, layers ascending.
        adapter_digest: SHA-256 over the SHA-256 of what was read of the adapter at each site, by layer.
        biases_digest: SHA-256 of the biases written, by layer; with a gate, of its columns of B, [hidden, rank].
        original_biases: by layer, the numbers of the biases that they replaced, in the dtype of the site.
        written: SHA-256 of each small file that was written, by name; of a large one, of its header.
        original: SHA-256 of the adapter's own of the same files, by name.
        scaling: the rule that s followed, None where the fold has no s.
        allowed_gap: how far each fold was allowed to be from the base's own, None where it is exact.
        fastlock_version: the fastlock that did it.
        rank: of the lock's gate, 0 for a lock without one.
    """

    lock_digest: str
    strength: float
    method: str
    carrier: str
    stacks: tuple[str, ...]
    base: AdapterBase
    sites: tuple[AdapterSite, ...]
    adapter_digest: str
    biases_digest: str
    original_biases: Mapping[int, bytes] = field(default_factory=dict)
    written: Mapping[str, str] = field(default_factory=dict)
    original: Mapping[str, str] = field(default_factory=dict)
    scaling: str | None = None
    allowed_gap: float | None = None
    fastlock_version: str = __version__
    rank: int = 0

    @property
    def layers(self) -> tuple[int, ...]:
        """The locked layers, ascending."""
        return tuple(site.layer for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """The receipt as data that JSON can hold: the same receipt gives the same bytes. What is None is left out."""
        data: dict[str, Any] = {
            "format_version": ADAPTER_GATE_FORMAT_VERSION if self.rank else ADAPTER_FORMAT_VERSION,
            "fastlock_version": self.fastlock_version,
            "lock_digest": self.lock_digest,
            "strength": self.strength,
            "method": self.method,
            "carrier": self.carrier,
            "stacks": list(self.stacks),
            "base": self.base.to_dict(),
            "scaling": self.scaling,
            "allowed_gap": self.allowed_gap,
            "sites": [site.to_dict() for site in self.sites],
            "adapter_digest": self.adapter_digest,
            "biases_digest": self.biases_digest,
            "original_biases": encoded_biases(self.original_biases),
            "written": dict(sorted(self.written.items())),
            "original": dict(sorted(self.original.items())),
            "rank": self.rank or None,
        }
        return {key: value for key, value in data.items() if value is not None}

    @classmethod
    def from_dict(cls, data: Any, where: str) -> AdapterReceipt:
        """The receipt that `to_dict` wrote, out of a file that may have been changed since.

        Args:
            data: what the file says.
            where: the file's name, for messages.

        Raises:
            UnsupportedError: it is of a newer format.
            DamagedError: it is not a receipt, or was changed so that it cannot be one.
        """
        try:
            version = check_version(data, where, ADAPTER_FORMAT_VERSION, ADAPTER_GATE_FORMAT_VERSION)
            with_gate = version == ADAPTER_GATE_FORMAT_VERSION
            check_keys(data, _RECEIPT_KEYS + ["rank"] * with_gate, ["scaling", "allowed_gap"])
            return cls(
                lock_digest=digest_in(data["lock_digest"]),
                strength=strength_in(data["strength"]),
                method=text_in(data["method"]),
                carrier=_one_of((GATE_CARRIER,) if with_gate else ADAPTER_CARRIERS, data["carrier"], "carriers"),
                stacks=texts_in(data["stacks"]),
                base=_base(data["base"]),
                sites=_sites(data["sites"]),
                adapter_digest=digest_in(data["adapter_digest"]),
                biases_digest=digest_in(data["biases_digest"]),
                original_biases=biases_in(data["original_biases"]),
                written=digests_in(data["written"]),
                original=digests_in(data["original"]),
                scaling=optional(data, "scaling", text_in),
                allowed_gap=optional(data, "allowed_gap", _gap),
                fastlock_version=text_in(data["fastlock_version"]),
                rank=rank_in(data["rank"]) if with_gate else 0,
            )
        except (TypeError, ValueError, RecursionError) as error:
            raise damaged_receipt(where, error) from None


def _base(value: Any) -> AdapterBase:
    check_keys(value, _BASE_KEYS)
    if not isinstance(value["name"], str):
        raise TypeError(f"{str(value['name'])[:80]!a} where the name of a base should be")
    return AdapterBase(value["name"], text_in(value["model_type"]), digest_in(value["weights_digest"]))


def _sites(value: Any) -> tuple[AdapterSite, ...]:
    sites = tuple(map(_site, list_in(value)))
    check_ascending([site.layer for site in sites], "layers")
    return sites


def _site(value: Any) -> AdapterSite:
    check_keys(value, _SITE_KEYS, ["gap", "scale"])
    heads = tuple(map(index_in, list_in(value["heads"])))
    check_ascending(heads, "heads")
    return AdapterSite(
        index_in(value["layer"]),
        text_in(value["name"]),
        heads,
        flag_in(value["touched"]),
        dtype_in(value["dtype"]),
        optional(value, "gap", _gap),
        optional(value, "scale", _number),
    )


def _gap(value: Any) -> float:
    number = _number(value)
    if number < 0:
        raise ValueError(f"{value!r} where a gap should be")
    return number


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise TypeError(f"{str(value)[:80]!a} where a number should be")
    return float(value)


def _one_of(names: Sequence[str], value: Any, what: str) -> str:
    if value not in names:
        raise ValueError(f"{str(value)[:80]!a} where one of the {what} should be")
    return str(value)
