"""The table of GGUF architectures."""

import re
from pathlib import Path

import pytest

import fastlock
from fastlock.architectures.families import FAMILIES
from fastlock.architectures.gguf_architectures import (
    ACT,
    REFUSED_DESPITE_PLACE,
    check_gguf_architecture,
    why_gguf_refused,
)
from fastlock.architectures.serving_stacks import acts


def test_it_agrees_with_what_is_known_of_the_families() -> None:
    """Families whose checkpoints are converted, lock included, and no others. MPT's converter takes no bias."""
    converted = {family for families in ACT.values() for family in families}
    assert converted - {"mpt"} == {family for family in FAMILIES if "llama.cpp" in acts(family)}
    assert not ACT.keys() & REFUSED_DESPITE_PLACE.keys()


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("qwen3", "llama.cpp has no place for the bias there, and stops at the file"),
        ("an unknown one", "llama.cpp has no place for the bias there"),
        ("ernie4_5", "does not use it: the lock would be lost in silence"),
        ("falcon-h1", "it mixes attention with layers that have no heads"),
        ("deci", "its heads differ from layer to layer"),
        ("bert", "it is no decoder"),
        ("mistral3", "no run of it with a lock was found to be right yet"),
    ],
)
def test_all_others_are_refused_with_the_reason(architecture: str, reason: str) -> None:
    assert reason in why_gguf_refused(architecture)
    with pytest.raises(fastlock.UnsupportedError, match=reason) as error:
        check_gguf_architecture(architecture, "m.gguf")
    assert str(error.value).startswith(f"m.gguf: is of the architecture {architecture}, and cannot be relocked: ")
    assert "llama, mpt" in str(error.value)


def test_those_in_the_table_pass() -> None:
    for architecture in ACT:
        check_gguf_architecture(architecture, "m.gguf")


def test_the_documentation_has_the_same_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    section = page.partition("## GGUF\n")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| ([\w-]+) \| ([\w, ]+) \|$", section, re.MULTILINE)[1:])
    assert rows == {architecture: ", ".join(families) for architecture, families in ACT.items()}
    for architecture in REFUSED_DESPITE_PLACE:
        assert re.search(rf"(?<![\w-]){architecture}(?![\w-])", section), architecture
