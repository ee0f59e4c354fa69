"""The page that says what became of a zoo."""

from html.parser import HTMLParser

import pytest

from fastlock.zoo import report as zoo_report
from fastlock.zoo import tasks


class Page(HTMLParser):
    """A page's text, and its tags and attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data):
        self.text += data


def page(results: list, total: int | None = None, seconds: float = 3.0, **facts: str) -> Page:
    return Page(zoo_report.report_page(results, len(results) if total is None else total, seconds, facts))


def result(name: str, status: str = "relocked", error: str = "", at: float = 0.0) -> tasks.Result:
    return tasks.Result(f"/zoo/{name}", name, f"/out/{name}", status, error, 0.5, 10, 2000, 1e9 + at)


def test_nothing_in_the_page_is_taken_for_markup() -> None:
    bad = '<script src="//x">"\'&lt;\x1b\udcff'
    plain = page([result("x", "failed", "x")], fact="x")
    shown = page([result(bad, "failed", bad)], **{bad: bad})
    assert shown.tags == plain.tags
    assert shown.attributes == plain.attributes
    assert shown.text.count(bad.replace("\x1b", "\\x1b").replace("\udcff", "\\udcff")) == 6
    assert not {"script", "link", "img", "iframe"} & set(shown.tags)
    assert not {"src", "href"} & set(shown.attributes)


def test_the_page_shows_failures_first_and_not_too_many_rows() -> None:
    results = [result(f"n{number}", at=number / 1000) for number in range(zoo_report.MAX_ROWS + 100)]
    shown = page([*results, result("zz", "failed", "because")])
    assert shown.text.index("because") < shown.text.index("n0")
    assert f"The first {zoo_report.MAX_ROWS:,} of {zoo_report.MAX_ROWS + 101:,}" in shown.text
    assert shown.tags.count("tr") == zoo_report.MAX_ROWS + 3
    assert "Stopped" not in shown.text
    assert "Stopped early: 1 of 3 " in page([result("a"), result("b")], 3).text
    assert "0 checkpoints" in page([]).text


@pytest.mark.parametrize("span", [0.0, 1.0, 5000.0, 500_000.0])
def test_the_throughput_adds_up(span: float) -> None:
    kinds = ["failed", *["relocked"] * 4] * 10
    results = [result(str(number), kind, at=span * number / 49) for number, kind in enumerate(kinds)]
    assert page(results, seconds=span + 1).tags.count("rect") >= 2
    titles = zoo_report._throughput(results).split("<title>")[1:]
    assert sum(int(title.split(": ")[1].split(" ")[0]) for title in titles) == 40
    assert sum(int(title.split(", ")[1].split(" ")[0]) for title in titles) == 10


def test_round_numbers() -> None:
    assert [zoo_report._round_up(value) for value in (0.03, 1.0, 1.1, 21, 499)] == [0.04, 1.0, 2.0, 40.0, 600.0]
    assert [zoo_report._bytes(value) for value in (0, 999, 1000, 12345678, 1e15)] == [
        "0 B",
        "999 B",
        "1 kB",
        "12.3 MB",
        "1,000 TB",
    ]
    assert [zoo_report._duration(value) for value in (0.5, 59.94, 61, 7322)] == [
        "0.5 s",
        "59.9 s",
        "1 min 1 s",
        "2 h 2 min",
    ]
