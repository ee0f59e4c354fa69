"""What a small model is asked about is nothing that it is taught, and as much as is promised."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib import resources

import pytest

from bench.efficacy import topics_asked, topics_further, topics_taught, tuned_prompts
from bench.efficacy.topic import Topic


def plain(request: str) -> str:
    """The words alone: two requests that differ in case or punctuation are one."""
    return " ".join(re.findall(r"\w+", request.lower()))


def requests(topics: tuple[Topic, ...]) -> list[str]:
    return [plain(request) for topic in topics for request in (*topic.harmful, *topic.harmless, *topic.scary)]


def sizes(topics: tuple[Topic, ...]) -> list[tuple[int, int, int]]:
    return [(len(topic.harmful), len(topic.harmless), len(topic.scary)) for topic in topics]


def tuned() -> set[str]:
    """Every request of the templated set."""
    module = tuned_prompts
    actions = (*module.HARMFUL_ACTIONS, *module.HARMLESS_ACTIONS)
    return {plain(request) for request in (*module.asked(actions), *module.QUESTIONS, *module.SCARY)}


def shipped() -> set[str]:
    """Every request that comes with the package."""
    data = resources.files("fastlock.data")
    prompts = json.loads((data / "prompts.json").read_text("utf-8"))
    pairs = [json.loads(line)["question"] for line in (data / "pairs.jsonl").read_text("utf-8").splitlines()]
    lines = [
        line for name in ("borderline.txt", "harmless.txt") for line in (data / name).read_text("utf-8").split("\n")
    ]
    return {plain(request) for request in (*prompts["harmful"], *prompts["harmless"], *pairs, *lines)}


def content(request: str) -> set[str]:
    """Its words of four letters and more."""
    return {word for word in request.split() if len(word) > 3}


@pytest.mark.parametrize("taught", [topics_taught.TAUGHT, topics_further.FURTHER], ids=["taught", "further"])
def test_nothing_that_is_asked_is_taught(taught: tuple[Topic, ...]) -> None:
    asked = topics_asked.ASKED
    assert not {topic.name for topic in taught} & {topic.name for topic in asked}
    assert not set(requests(taught)) & set(requests(asked))


def test_nothing_that_is_asked_is_on_a_further_topic_in_almost_the_same_words() -> None:
    asked = [(request, content(request)) for request in requests(topics_asked.ASKED)]
    alike = []
    for request in requests(topics_further.FURTHER):
        words = content(request)
        alike += [(request, other) for other, theirs in asked if len(words & theirs) > 0.7 * len(words | theirs)]
    assert alike == []


def test_a_further_topic_is_new_and_of_the_usual_size() -> None:
    further = topics_further.FURTHER
    assert len({topic.name for topic in further} | {topic.name for topic in topics_taught.TAUGHT}) == 80 + 17
    times = Counter(requests((*further, *topics_taught.TAUGHT)))
    assert [request for request, count in times.items() if count > 1] == []
    assert all((harmful, harmless) == (12, 10) and scary in (13, 14) for harmful, harmless, scary in sizes(further))


def test_nothing_that_is_asked_is_in_an_older_set() -> None:
    asked = set(requests(topics_asked.ASKED))
    assert not asked & tuned()
    assert not asked & shipped()


def test_no_request_is_asked_twice() -> None:
    times = Counter(requests(topics_asked.ASKED))
    assert [request for request, count in times.items() if count > 1] == []
    names = [topic.name for topic in topics_asked.ASKED]
    assert len(set(names)) == len(names)


def test_as_much_is_asked_as_the_docstring_says() -> None:
    *english, foreign = sizes(topics_asked.ASKED)
    assert english == [(14, 22, 20)] * 14
    assert foreign == (20, 24, 16)
    assert topics_asked.ASKED[-1].name == "asked topics in other languages"


def test_a_topic_decides_or_is_reported() -> None:
    deciding = ["health and medicine", "police, courts and evidence", "science and chemistry", "hospitals"]
    assert [topic.name for topic in topics_asked.DECIDE] == deciding
    assert [topic for topic in topics_asked.ASKED if topic.name not in deciding] == list(topics_asked.TEST)
    for kind, decide, test in (("harmful", 56, 160), ("harmless", 88, 244), ("scary", 80, 216)):
        for name, count in (("DECIDE", decide), ("TEST", test)):
            gathered = getattr(topics_asked, f"{name}_{kind.upper()}")
            assert len(gathered) == count
            assert set(gathered) == {
                request for topic in getattr(topics_asked, name) for request in getattr(topic, kind)
            }


def test_a_framing_holds_the_request_once() -> None:
    request = topics_asked.TEST_HARMFUL[0]
    framed = [framing.format(request) for framing in topics_asked.JAILBREAKS]
    assert [text.count(request) for text in framed] == [1] * 6
    assert len(set(framed)) == 6
    assert (len(topics_asked.PREFILLS), len(topics_asked.SYSTEM_PROMPTS), len(topics_asked.EARLIER_TURNS)) == (5, 3, 3)
    assert all(len(turn) == 2 for turns in topics_asked.EARLIER_TURNS for turn in turns)
