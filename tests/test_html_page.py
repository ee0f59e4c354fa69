"""What pages and pictures share: numbers where they belong, and nothing from outside taken for markup."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from fastlock.html_page import Axis, figure, group, head, label, mark, svg, table, x_axis, y_axis

BAD = '"><script>&\x1b'


def test_an_axis_draws_numbers_between_its_ends() -> None:
    rising, falling = Axis(2, 4, 100, 300), Axis(0, 1, 50, 10)
    assert [rising(value) for value in (2, 3, 4, 5)] == [100, 200, 300, 400]
    assert [falling(value) for value in (0, 0.25, 1)] == pytest.approx([50, 40, 10])


def test_ticks_stand_where_their_numbers_are_drawn() -> None:
    axis, ticks = Axis(0, 10, 0, 100), [(5, "five"), (10, "ten")]
    for drawn, along in ((x_axis(axis, ticks, 3, 7), "x"), (y_axis(axis, ticks, 3, 7), "y")):
        across = {"x": "y", "y": "x"}[along]
        lines = [element.attrib for element in ElementTree.fromstring(f"<g>{drawn}</g>").iter("line")]
        assert [(float(line[f"{along}1"]), float(line[f"{along}2"])) for line in lines] == [(50, 50), (100, 100)]
        assert {(float(line[f"{across}1"]), float(line[f"{across}2"])) for line in lines} == {(3, 7)}
        texts = ElementTree.fromstring(f"<g>{drawn}</g>").iter("text")
        assert [text.text for text in texts] == ["five", "ten"]


def test_nothing_in_a_picture_is_taken_for_markup() -> None:
    marks = [mark("rect", BAD, kind=BAD, x=1), label(BAD, 1, 2), group(BAD, [label(BAD, 3, 4, kind="value")])]
    picture = svg(10, 20, BAD, marks, alone=True)
    elements = [element.tag.rpartition("}")[2] for element in ElementTree.fromstring(picture).iter()]
    assert elements == ["svg", "style", "rect", "title", "text", "g", "title", "text"]
    page = head(BAD) + figure(BAD, picture, BAD) + table([BAD], [[BAD]])
    assert "<script" not in page
    assert "\x1b" not in page


def test_a_picture_alone_brings_its_colours_along() -> None:
    """In a page they are the page's, and follow its dark mode."""
    alone, inside = svg(1, 1, "", [], alone=True), svg(1, 1, "", [])
    assert ".bar { fill: #" in alone
    assert "var(" not in alone
    assert "<style" not in inside
    assert "svg .bar { fill: var(--bar) }" in head("")
    assert head("").count("--bar:") == 2
