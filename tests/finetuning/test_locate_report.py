"""The page of `locate`: it shows what was found, is sound XML inside, and trusts no name."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

import fastlock
from fastlock.finetuning.locate_report import count_rows, report_html, write_report
from fastlock.finetuning.safety_layers import Located
from fastlock.locks.band import Band
from fastlock.locks.band_evidence import AngleCurve, BandEvidence, RangeCount, RangeTest

CURVE = AngleCurve((1.0, 2.0, 3.0, 3.0), (1.0, 1.5, 2.0, 2.0), (1.1, 6.0, 11.0, 11.5), (1.0, 2.5, 5.0, 5.0), 0.75)
COUNTS = (
    RangeCount(-1, -1, 1.0, 3, 20, 0.05, 0.36),
    RangeCount(1, 1, 1.1, 9, 20, 0.26, 0.66),
    RangeCount(1, 2, 1.1, 15, 20, 0.53, 0.89),
    RangeCount(1, 3, 1.1, 13, 20, 0.43, 0.82),
    RangeCount(2, 2, 1.1, 8, 20, 0.22, 0.61),
    RangeCount(0, 2, 1.1, 14, 20, 0.48, 0.85),
)
TESTS = (RangeTest(-1, -1, False, 12, 0, 0.000488), RangeTest(0, 2, False, 1, 0, 1.0))
EVIDENCE = BandEvidence("[1, 2] stands out", "keywords", "0a" * 32, 10, 11, 20, 8, CURVE, (1, 1), COUNTS, TESTS)
BAND = Band(1, 2, 4, "llama", "tiny & <small>", None, EVIDENCE)
FOUND = Located(BAND, EVIDENCE, "tiny & <small>", 4)
NONE = Located(
    None, dataclasses.replace(EVIDENCE, reason="no band stands out", first_range=None, counts=(), tests=()), "", 4
)


def pictures(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def marks(picture: ElementTree.Element, kind: str) -> list[ElementTree.Element]:
    return [one for one in picture.iter() if kind in one.attrib.get("class", "").split()]


def test_three_pictures_with_every_number() -> None:
    angles, growing, shrinking = pictures(report_html(FOUND, {"command": "a test"}))
    assert len(marks(angles, "curve")) == 3
    titles = [one.text for one in angles.iter() if one.tag.endswith("title")]
    assert "layer 2: 8.00°, malicious" in titles
    assert "layer 2: 8.50°, separation" in titles
    assert "layer 2: 2.00°, borderline" in titles
    assert len(marks(growing, "bar")) == 3
    assert len(marks(shrinking, "bar")) == 3
    said = [one.text for one in growing.iter() if one.tag.endswith("title")]
    assert "layers 1 to 2: 15 of 20" in said


def test_higher_is_further_up_and_the_band_is_shaded() -> None:
    _, growing, shrinking = pictures(report_html(FOUND, {}))
    heights = [float(one.attrib["cy"]) for one in marks(growing, "bar")]
    assert heights[1] < heights[2] < heights[0]
    places = [float(one.attrib["cx"]) for one in marks(growing, "bar")]
    assert places == sorted(places)
    for picture in (growing, shrinking):
        (shade,) = [one for one in picture.iter() if one.tag.endswith("rect")]
        left, right = float(shade.attrib["x"]), float(shade.attrib["x"]) + float(shade.attrib["width"])
        inside = [left < place < right for place in places]
        assert inside == [True, True, False]


def test_intervals_are_around_their_counts() -> None:
    _, growing, _ = pictures(report_html(FOUND, {}))
    for dot, line in zip(marks(growing, "bar"), marks(growing, "limits"), strict=True):
        assert float(line.attrib["y2"]) < float(dot.attrib["cy"]) < float(line.attrib["y1"])


def test_where_no_band_stands_out_the_page_says_so() -> None:
    page = report_html(NONE, {})
    assert "No band stands out." in page
    assert "none stands out" in page
    assert len(pictures(page)) == 1
    assert "unnamed" in page


def test_counts_without_a_band_are_shown_too() -> None:
    found = Located(None, EVIDENCE, "x", 4)
    assert len(pictures(report_html(found, {}))) == 3


def test_names_are_text_and_the_page_is_whole() -> None:
    class Balanced(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.scripts = 0

        def handle_starttag(self, tag: str, attrs: object) -> None:
            self.scripts += tag in ("script", "small", "img")

    parser = Balanced()
    page = report_html(FOUND, {"<script>alert(1)</script>": "<img src=x>"})
    parser.feed(page)
    assert parser.scripts == 0
    assert "tiny &amp; &lt;small&gt;" in page
    assert "http" not in re.sub(r'xmlns="[^"]*"', "", page)


@pytest.mark.parametrize("layers", [1, 4, 126])
def test_any_number_of_layers(layers) -> None:
    flat = tuple(0.0 for _ in range(layers))
    evidence = dataclasses.replace(NONE.evidence, curve=AngleCurve(flat, flat, flat, flat, 0.0))
    (angles,) = pictures(report_html(Located(None, evidence, "", layers), {}))
    assert "nan" not in ElementTree.tostring(angles, "unicode")
    assert len(marks(angles, "separation")) == 1 + layers


def test_rows_of_the_table() -> None:
    assert count_rows(COUNTS)[0] == ("none", "1", "3 of 20", "5% to 36%")
    assert count_rows(COUNTS)[2] == ("1 to 2", "1.1", "15 of 20", "53% to 89%")


def test_what_is_written(tmp_path) -> None:
    write_report(tmp_path, FOUND, {"command": "a test"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["band.json", "located.html", "located.json"]
    assert fastlock.Band.load(tmp_path / "band.json") == BAND
    data = json.loads((tmp_path / "located.json").read_text())
    assert (data["command"], data["band"], data["num_layers"]) == ("a test", [1, 2], 4)
    write_report(tmp_path, NONE, {})
    assert not (tmp_path / "band.json").exists(), "an older band would be taken for this model's"
    assert json.loads((tmp_path / "located.json").read_text())["band"] is None
