"""A band: the contiguous layers that tell malicious from normal, to be frozen while a model is fine-tuned; and why."""

from __future__ import annotations

import os
from dataclasses import dataclass

from fastlock.errors import DamagedError, FastlockError, MismatchError, check_number, shown
from fastlock.locks import band_file
from fastlock.locks.band_evidence import BandEvidence
from fastlock.storage.files import read_bounded, write_atomic
from fastlock.storage.places import as_path

MAX_LAYERS = 10_000
MAX_LETTERS = 1000


@dataclass(frozen=True)
class Band:
    """Contiguous decoder layers, first and last included, counted from 0.

    Attributes:
        first, last: the layers.
        num_layers: how many the model has; None where unknown.
        model_type: its family; None where unknown.
        base_model: its name; None where unknown.
        source: where the band comes from.
        evidence: what was measured; None where it was not measured here.

    Raises:
        FastlockError: the layers are not integers, are reversed, or lie outside the model.
    """

    first: int
    last: int
    num_layers: int | None = None
    model_type: str | None = None
    base_model: str | None = None
    source: str | None = None
    evidence: BandEvidence | None = None

    def __post_init__(self) -> None:
        if self.num_layers is not None:
            check_number("num_layers", self.num_layers, 1, MAX_LAYERS)
        end = MAX_LAYERS if self.num_layers is None else self.num_layers
        of = "" if self.num_layers is None else f" in a model of {self.num_layers} layers, counted from 0"
        check_number("a band's first layer", self.first, 0, end - 1, of)
        check_number("a band's last layer", self.last, 0, end - 1, of)
        if self.first > self.last:
            raise FastlockError(
                f"the band [{self.first}, {self.last}] is reversed. Give its first layer, then its last one: "
                f"[{self.last}, {self.first}]."
            )
        for name in ("model_type", "base_model", "source"):
            text = getattr(self, name)
            if text is not None and not (isinstance(text, str) and 0 < len(text) <= MAX_LETTERS):
                raise FastlockError(f"a band's {name} is {text!r:.80}; give text of at most {MAX_LETTERS} letters.")
        if self.evidence is not None and not isinstance(self.evidence, BandEvidence):
            raise FastlockError("a band's evidence is what `fastlock.locate` measured: a BandEvidence, or None.")

    @property
    def layers(self) -> range:
        """The numbers of the layers."""
        return range(self.first, self.last + 1)

    def __str__(self) -> str:
        """The band as the paper writes it: "[6, 12]"."""
        return f"[{self.first}, {self.last}]"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the band and its evidence as JSON (docs/safety-layers.md).

        Raises:
            FastlockError: the file cannot be written.
        """
        fields = {name: getattr(self, name) for name in band_file.FIELDS}
        write_atomic(as_path(path), band_file.serialized(fields))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Band:
        """Read a band that `save` wrote.

        Raises:
            UnsupportedError: the file is of a newer format.
            DamagedError: it is damaged, or not a band.
            FastlockError: it is missing or cannot be read.
        """
        place = as_path(path)
        fields = band_file.read(read_bounded(place, band_file.MAX_FILE_BYTES), str(place))
        try:
            return Band(**fields)
        except FastlockError as error:
            raise DamagedError(f"{place}: not a band that can be used ({error}) {band_file.REMEDY}") from None


def check_band(band: object) -> Band:
    """The band that was given.

    Raises:
        FastlockError: it is something else.
    """
    if isinstance(band, Band):
        return band
    found = getattr(band, "band", None)
    if isinstance(found, Band):
        raise FastlockError("what `fastlock.locate` found was given instead of the band. Give its `band`.")
    raise FastlockError(
        f"the band is {type(band).__name__}; give a fastlock.Band: Band(6, 12), Band.load(FILE), or what "
        "`fastlock.locate` found (its `band`, which is None where no band stands out)."
    )


def check_band_fits(band: Band, num_layers: int, model_type: str, name: str) -> None:
    """Refuse a band that is not one of a model's.

    Args:
        band: the band.
        num_layers: how many decoder layers the model has.
        model_type: its family.
        name: the model, for messages.

    Raises:
        MismatchError: it has fewer layers, or is of another size or family than the band's own model.
    """
    if band.last >= num_layers:
        raise MismatchError(
            f"the band {band} lies outside {name}, which has {num_layers} layers, 0 to {num_layers - 1}. Give a band "
            "of this model, or locate one."
        )
    for what, own, others in (
        ("layers", band.num_layers, num_layers),
        ("model_type", band.model_type, model_type),
    ):
        if own is not None and own != others:
            raise MismatchError(
                f"the band {band} is of a model with {what} {shown(str(own))}, but {name} has {what} "
                f"{shown(str(others))}. Give a band of this model, or locate one."
            )
