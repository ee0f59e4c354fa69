"""SGLang does not run on a CPU alone: whether its code makes the output projection with a bias, read in its source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fastlock.architectures.families import FAMILIES
from fastlock.architectures.serving_stacks import acts

MODELS = Path(__file__).parents[2] / ".venv-sglang" / "sglang" / "srt" / "models"
PROJECTIONS = ("o_proj", "dense", "out_proj", "c_proj")
# Its Mistral is its Llama; its Phi-MoE has the name of Microsoft's own checkpoints.
ELSEWHERE = {"mistral": "llama.py", "phimoe": "phimoe.py"}


def file_of(kind: str) -> Path | None:
    """The file whose EntryClass is the family's, None where there is none."""
    if kind in ELSEWHERE:
        return MODELS / ELSEWHERE[kind]
    for path in MODELS.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EntryClass":
                names = {name.id for name in ast.walk(node.value) if isinstance(name, ast.Name)}
                if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind] in names:
                    return path
    return None


def biases(path: Path) -> set[str]:
    """What the file gives as `bias` to the projections that could be the attention's; "True" where it says nothing."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            attribute = ast.unparse(node.targets[0]).removeprefix("self.")
            if attribute in PROJECTIONS and ast.unparse(node.value.func) == "RowParallelLinear":
                given = [ast.unparse(keyword.value) for keyword in node.value.keywords if keyword.arg == "bias"]
                found.add(given[0] if given else "True")
    return found


@pytest.mark.parametrize("kind", sorted(kind for kind in FAMILIES if "sglang" in acts(kind)))
def test_a_listed_family_has_a_place_for_the_bias(kind: str) -> None:
    path = file_of(kind)
    assert path is not None
    found = biases(path)
    assert found
    assert "False" not in found


@pytest.mark.parametrize("kind", ["cohere", "gemma", "granite", "granitemoe", "olmoe", "qwen2", "mixtral", "glm4"])
def test_a_family_that_is_not_listed_has_none(kind: str) -> None:
    path = file_of(kind)
    assert path is not None
    assert biases(path) == {"False"}
