"""The table of serving stacks, and the page that shows it to people."""

from pathlib import Path

import pytest
from families import random_lock, tiny_model
from safetensors.torch import load_file

import fastlock
from fastlock.checkpoint import NEW_SHARD
from fastlock.sites import FAMILIES
from fastlock.stacks import CHECKED, STACKS, acts, native_flag, needs

PAGE = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()


def test_the_page_shows_the_table() -> None:
    for kind in sorted(FAMILIES):
        cells = " | ".join("yes" if stack in acts(kind) else "no" for stack in STACKS)
        assert f"| {kind} | {cells} |" in PAGE, f"| {kind} | {cells} |"
    assert "| " + " | ".join(f"{stack} {CHECKED[stack]}" for stack in STACKS) + " |" in PAGE


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_the_table_agrees_with_itself(kind: str) -> None:
    assert ("transformers" in acts(kind)) == (FAMILIES[kind].bias_flag is not None)
    for stack in STACKS:
        assert (native_flag(kind, stack) is None) == (stack not in acts(kind))
        assert not needs(kind, stack) or stack in acts(kind)


def test_an_unknown_family_acts_nowhere() -> None:
    assert acts("bert") == frozenset()
    assert native_flag("bert", "vllm") is None
    assert needs("bert", "vllm") == ()


def relock(tmp_path, kind: str, stacks: list[str], **changes):
    model = tiny_model(kind, **changes)
    model.save_pretrained(tmp_path / "source")
    fastlock.relock_checkpoint(tmp_path / "source", random_lock(model), tmp_path / "out", stacks=stacks)
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("kind", "changes", "modules"),
    [
        ("mistral", {"sliding_window": 4}, ["q_proj", "k_proj", "v_proj", "o_proj"]),
        ("phi3", {}, ["qkv_proj", "o_proj"]),
    ],
)
def test_where_transformers_has_no_place_and_vllm_has(kind: str, changes, modules, tmp_path) -> None:
    out = relock(tmp_path, kind, ["vllm", "sglang"], **changes)
    names = {f"model.layers.{layer}.self_attn.{module}.bias" for layer in range(3) for module in modules}
    assert set(load_file(out / NEW_SHARD)) == names
    lock = random_lock(tiny_model(kind))
    assert fastlock.verify(out, lock)
    assert [finding.acts for finding in fastlock.doctor(out, STACKS)] == [s in acts(kind) for s in STACKS]
    fastlock.unlock_checkpoint(out, tmp_path / "back")
    assert not fastlock.verify(tmp_path / "back", lock)


@pytest.mark.parametrize(
    ("kind", "stacks", "message"),
    [
        ("qwen3", ["transformers", "vllm"], "vllm would lose.*--for transformers,sglang.*--model-impl transformers"),
        ("mixtral", ["vllm"], "vllm would lose.*--for llama.cpp"),
        ("glm4", ["transformers"], "transformers would lose.*No stack has a place"),
        ("granite", ["transformers", "sglang"], "sglang would lose"),
    ],
)
def test_a_refusal_names_the_stack_and_what_works(kind: str, stacks, message: str, tmp_path) -> None:
    with pytest.raises(fastlock.FastlockError, match=message):
        relock(tmp_path, kind, stacks)
    assert not (tmp_path / "out").exists()


def test_a_window_is_refused_with_its_reason(tmp_path) -> None:
    with pytest.raises(fastlock.FastlockError, match=r"sliding window of 4|transformers would lose"):
        relock(tmp_path, "mistral", ["transformers", "vllm"], sliding_window=4)
