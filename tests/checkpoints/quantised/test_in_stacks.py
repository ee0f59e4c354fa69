"""What `doctor` says of quantised checkpoints: the format, and what is known of it in each stack."""

from __future__ import annotations

from pathlib import Path

import pytest

import fastlock
from fastlock.checkpoints.quantised.in_stacks import _NOTES
from fastlock.checkpoints.quantised.table import KINDS
from tests.checkpoints.quantised.test_formats import FORMATS
from tests.checkpoints.quantised.test_relocking import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*basis not checked")

SAID = {
    "gptq": ("GPTQ", "it needs gptqmodel and optimum", "refuses act-order with groups"),
    "w4a16": ("compressed-tensors pack-quantized", "run", "run"),
    "block fp8": ("int8 or FP8", "run", "blocks read in its source, not run"),
    "nf4": ("bitsandbytes 4-bit", "run", "needs the plugin vllm-bnb-plugin"),
}


@pytest.mark.parametrize("name", SAID)
def test_the_format_and_what_is_known_of_it_are_said(name: str, tmp_path: Path) -> None:
    layout, in_transformers, in_vllm = SAID[name]
    source, lock, _ = checkpoint(tmp_path, FORMATS[name][0])
    fastlock.relock_checkpoint(source, lock, tmp_path / "out", stacks=["transformers", "vllm", "sglang"])
    for directory, acts in ((source, False), (tmp_path / "out", True)):
        found = fastlock.doctor(directory, ["transformers", "vllm", "sglang"])
        assert [finding.acts for finding in found] == [acts] * 3
        for finding, said in zip(found, (in_transformers, in_vllm, "read in its source, not run"), strict=True):
            assert f"({layout}: " in finding.reason
            assert finding.reason.endswith(f"{said})")


def test_the_table_names_formats_that_there_are() -> None:
    assert {layout for of_stack in _NOTES.values() for layout in of_stack} <= {name for name, _ in KINDS}
