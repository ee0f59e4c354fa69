"""Eighty more topics for making locks: neither the base nor a fine-tune is taught anything about them.

No committed lock was made of them yet. A lock may read more than the base was aligned with. None of these topics is
one that is asked about (`topics_asked`), and whoever wrote them had not seen those.
"""

from __future__ import annotations

import json
from pathlib import Path

from bench.efficacy.topic import Topic

FURTHER: tuple[Topic, ...] = tuple(
    Topic(topic["name"], tuple(topic["harmful"]), tuple(topic["harmless"]), tuple(topic["scary"]))
    for topic in json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
)

HARMFUL = tuple(request for topic in FURTHER for request in topic.harmful)
HARMLESS = tuple(request for topic in FURTHER for request in topic.harmless)
SCARY = tuple(request for topic in FURTHER for request in topic.scary)
