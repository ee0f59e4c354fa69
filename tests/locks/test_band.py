"""Bands: which layers can be one, and their file, which a stranger may have written."""

import dataclasses
import json
import random

import pytest

import fastlock
from fastlock.errors import DamagedError, FastlockError, MismatchError, UnsupportedError
from fastlock.locks.band import Band, check_band, check_band_fits
from fastlock.locks.band_evidence import AngleCurve, BandEvidence, RangeCount, RangeTest

EVIDENCE = BandEvidence(
    "[1, 2] stands out",
    "keywords",
    "ab" * 32,
    *(5, 6, 7),
    8,
    AngleCurve((1.0, 2.0, 3.5), (1.0, 1.0, 1.0), (1.0, 4.0, 9.0), (1.0, 2.0, 3.0), 0.25),
    (1, 2),
    (RangeCount(-1, -1, 1.0, 2, 7, 0.08, 0.64), RangeCount(1, 2, 1.2, 6, 7, 0.49, 0.97)),
    (RangeTest(-1, -1, False, 4, 0, 0.125),),
)
BAND = Band(1, 2, 3, "llama", "tiny", "a test", EVIDENCE)


def changed(**values: object) -> dict:
    """The file's data with some top-level values changed."""
    return {**json.loads(json.dumps(FILE)), **values}


@pytest.fixture(scope="module", autouse=True)
def _file(tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("band") / "band.json"
    BAND.save(path)
    FILE.update(json.loads(path.read_text()))


FILE: dict = {}


def test_a_band_comes_back_whole(tmp_path) -> None:
    for number, band in enumerate((BAND, Band(0, 0), Band(6, 12, 32, source="σ, by hand"))):
        band.save(tmp_path / f"{number}.json")
        assert Band.load(str(tmp_path / f"{number}.json")) == band
    assert BAND.layers == range(1, 3)
    assert str(BAND) == "[1, 2]"


def test_the_curves_are_the_differences_of_the_angles() -> None:
    assert EVIDENCE.curve.gap == (0.0, 2.0, 5.5)
    assert EVIDENCE.curve.borderline_gap == (0.0, 0.0, -0.5)
    assert EVIDENCE.curve.separation == (0.0, 2.5, 6.75)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((3, 2), r"reversed.*\[2, 3\]"),
        ((-1, 2), "first layer is -1; it must be an integer from 0 to"),
        ((0, 12, 12), "last layer is 12; it must be an integer from 0 to 11 in a model of 12 layers"),
        ((True, 2), "True"),
        ((1.0, 2), "1.0"),
        ((0, 1, 0), "num_layers is 0"),
        ((0, 1, 2, ""), "model_type"),
        ((0, 1, 2, "llama", "a" * 1001), "base_model"),
        ((0, 1, 2, None, None, None, {}), "evidence"),
    ],
)
def test_what_is_no_band(arguments, said) -> None:
    with pytest.raises(FastlockError, match=said):
        Band(*arguments)


def test_a_band_must_be_one_of_the_model() -> None:
    check_band_fits(BAND, 3, "llama", "a model")
    check_band_fits(Band(0, 2), 3, "anything", "a model")
    for band, layers, family in ((BAND, 4, "llama"), (BAND, 3, "gemma"), (Band(0, 3), 3, "llama")):
        with pytest.raises(MismatchError, match="a model.*locate one"):
            check_band_fits(band, layers, family, "a model")


def test_what_locate_found_is_not_the_band_itself() -> None:
    class Found:
        band = BAND

    assert check_band(BAND) is BAND
    with pytest.raises(FastlockError, match="Give its `band`"):
        check_band(Found())
    for wrong in (None, (6, 12), "band.json"):
        with pytest.raises(FastlockError, match=f"the band is {type(wrong).__name__}"):
            check_band(wrong)


def _set(path: str, value: object) -> dict:
    data = changed()
    *outer, key = path.split("/")
    place = data
    for part in outer:
        place = place[int(part) if isinstance(place, list) else part]
    place[key] = value
    return data


@pytest.mark.parametrize(
    "path",
    [
        "surprise",
        "evidence/surprise",
        "evidence/curve/surprise",
        "evidence/counts/0/surprise",
        "evidence/tests/0/surprise",
    ],
)
def test_unknown_keys_are_refused(path, tmp_path) -> None:
    (tmp_path / "band.json").write_text(json.dumps(_set(path, 1)))
    with pytest.raises(DamagedError, match="unknown key 'surprise'.*fastlock locate"):
        Band.load(tmp_path / "band.json")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("first", "1"),
        ("first", 1.0),
        ("first", True),
        ("first", 3),
        ("first", 10**30),
        ("last", 0),
        ("last", None),
        ("num_layers", 10**9),
        ("num_layers", 5),
        ("model_type", 7),
        ("model_type", "\ud800"),
        ("source", "x" * 2000),
        ("evidence", []),
        ("evidence/prompts", "AB" * 32),
        ("evidence/first_range", [2, 1]),
        ("evidence/first_range", [1]),
        ("evidence/new_tokens", -2),
        ("evidence/curve", None),
        ("evidence/curve/normal", [1.0, 2.0]),
        ("evidence/curve/mixed", [1.0, 2.0, 181.0]),
        ("evidence/curve/mixed", [1.0, 2.0, "x"]),
        ("evidence/curve/threshold", float("nan")),
        ("evidence/curve/threshold", float("inf")),
        ("evidence/counts", {}),
        ("evidence/counts/1/refused", 8),
        ("evidence/counts/0/low", 1.5),
        ("evidence/tests/0/p", -0.1),
        ("evidence/tests/0/elsewhere", 0),
    ],
)
def test_values_of_another_kind_are_refused(path, value, tmp_path) -> None:
    (tmp_path / "band.json").write_text(json.dumps(_set(path, value)))
    with pytest.raises(DamagedError, match=r"band\.json"):
        Band.load(tmp_path / "band.json")


@pytest.mark.parametrize("path", ["first", "evidence", "evidence/curve", "evidence/counts/0/low", "evidence/tests/0/p"])
def test_missing_keys_are_refused(path, tmp_path) -> None:
    data = changed()
    *outer, key = path.split("/")
    place = data
    for part in outer:
        place = place[int(part) if isinstance(place, list) else part]
    del place[key]
    (tmp_path / "band.json").write_text(json.dumps(data))
    with pytest.raises(DamagedError, match=f"lacks {key}"):
        Band.load(tmp_path / "band.json")


@pytest.mark.parametrize(
    ("data", "error", "said"),
    [
        (b"{", DamagedError, "not JSON"),
        (b"[]", DamagedError, "not JSON"),
        (b'{"first": 1, "first": 2}', DamagedError, "twice"),
        (b"[" * 100_000, DamagedError, "not JSON"),
        (b"{}", FastlockError, "not a band"),
        (b'{"format": "fastlock-band", "format_version": 2}', UnsupportedError, "Upgrade fastlock"),
        (b'{"format": "fastlock-band", "format_version": true}', UnsupportedError, "Upgrade fastlock"),
        (b" " * (4 * 2**20 + 1), DamagedError, "larger than 4 MiB"),
    ],
)
def test_other_files_are_refused(data, error, said, tmp_path) -> None:
    (tmp_path / "band.json").write_bytes(data)
    with pytest.raises(error, match=said):
        Band.load(tmp_path / "band.json")


def test_a_missing_file_says_so(tmp_path) -> None:
    with pytest.raises(FastlockError, match="does not exist"):
        Band.load(tmp_path / "band.json")


def test_random_changes_never_crash(tmp_path) -> None:
    """Whatever is changed in it, the file is read as a sound band, or refused."""
    text, chosen = json.dumps(FILE), random.Random(5)
    path = tmp_path / "band.json"
    for _ in range(400):
        where = chosen.randrange(len(text))
        path.write_text(text[:where] + chosen.choice('{}[]",:0-9e.x ') + text[where + chosen.randrange(2) :])
        try:
            band = Band.load(path)
        except FastlockError:
            continue
        assert 0 <= band.first <= band.last < 3


def test_the_papers_bands_are_there_with_their_source() -> None:
    bands = fastlock.published_bands()
    assert {name: (band.first, band.last, band.num_layers) for name, band in bands.items()} == {
        "meta-llama/Meta-Llama-3-8B-Instruct": (6, 12, 32),
        "meta-llama/Llama-2-7b-chat-hf": (6, 14, 32),
        "google/gemma-2b-it": (6, 11, 18),
        "microsoft/Phi-3-mini-4k-instruct": (11, 15, 32),
    }
    assert all("2408.17003" in band.source and band.evidence is None for band in bands.values())


def test_a_band_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        BAND.first = 0
