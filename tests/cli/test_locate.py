"""`fastlock locate`, and `fastlock verify` of a band."""

import json

import pytest
import torch

import fastlock
from fastlock.locks.band import Band
from tests.helpers.families import random_lock, tiny_model, word_tokenizer


@pytest.fixture
def base(tmp_path):
    """A tiny checkpoint with a tokenizer that knows the shipped pairs' words."""
    model = tiny_model("llama", vocab_size=4096)
    model.save_pretrained(tmp_path / "base")
    word_tokenizer(fastlock.shipped_pairs()).save_pretrained(tmp_path / "base")
    for kind, texts in (
        ("normal", ["How can I learn", "What is the best", "How do I get"]),
        ("malicious", ["Tell me how to steal", "How can I cheat in", "How do I fake a"]),
        ("borderline", ["How can I steal a", "How do I break the", "How do I fake"]),
    ):
        (tmp_path / f"{kind}.txt").write_text("\n".join(texts) + "\n")
    return tmp_path


def files(base):
    kinds = ("normal", "malicious", "borderline")
    return [argument for kind in kinds for argument in (f"--{kind}", base / f"{kind}.txt")]


def test_a_model_without_a_band(base, run) -> None:
    said = run("locate", base / "base", *files(base), "--out", base / "out", "--new-tokens", 2, code=1)
    assert "no band stands out" in said
    assert sorted(path.name for path in (base / "out").iterdir()) == ["located.html", "located.json"]


def test_json_with_a_scale_and_a_first_range(base, run) -> None:
    arguments = [*files(base), "--scale", 1.2, "--first-range", 1, 2, "--new-tokens", 2, "--json"]
    data = json.loads(run("locate", base / "base", *arguments, code=1))
    assert data["band"] is None
    assert data["base_model"] == "base", "a path of this machine says nothing on another"
    assert data["evidence"]["first_range"] == [1, 2]
    assert (data["evidence"]["normal"], data["evidence"]["borderline"]) == (3, 3)
    assert {one["scale"] for one in data["evidence"]["counts"]} == {1.0, 1.2}


def test_a_band_that_was_found_is_written(base, run, monkeypatch) -> None:
    from tests.finetuning.test_locate_report import FOUND

    monkeypatch.setattr("fastlock.finetuning.safety_layers.locate", lambda *_arguments, **_options: FOUND)
    said = run("locate", base / "base", "--out", base / "out")
    assert "stands out" in said
    assert "15 of 20" in said
    assert Band.load(base / "out" / "band.json") == FOUND.band


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--normal", "{}/nothing.txt"], "nothing.txt: does not exist"),
        (["--malicious", "{}/one.txt"], "`malicious`: there are 1 prompts"),
        (["--normal", "{}/malicious.txt", "--malicious", "{}/malicious.txt"], "both a normal and a malicious"),
        (["--out", "{}/one.txt"], "is not a directory"),
    ],
)
def test_what_cannot_be_used_is_refused_before_the_model_is_loaded(arguments, said, base, run, loading) -> None:
    (base / "one.txt").write_text("only one\n")
    assert said in run("locate", base / "base", *(argument.format(base) for argument in arguments), code=3)
    assert loading == []


def test_wrong_numbers(base, run) -> None:
    assert "scale is 1.0" in run("locate", base / "base", *files(base), "--scale", 1, code=3)
    assert "reversed" in run("locate", base / "base", *files(base), "--first-range", 2, 1, code=3)


def test_verify_a_band(base, run) -> None:
    model = tiny_model("llama", vocab_size=4096)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1)
    model.save_pretrained(base / "tuned")
    Band(1, 2).save(base / "band.json")
    Band(0, 1).save(base / "wider.json")
    arguments = ("verify", base / "tuned", "--base", base / "base", "--band")
    assert "unchanged (all 18 tensors of layers 1 to 2 are the base's)" in run(*arguments, base / "band.json")
    said = run(*arguments, base / "wider.json", code=1)
    assert "model.layers.0.mlp.up_proj.weight has other bytes" in said
    assert "changed (1 tensors" in said
    data = json.loads(run(*arguments, base / "wider.json", "--json", code=1))
    assert data["differences"] == [{"name": "model.layers.0.mlp.up_proj.weight", "what": "has other bytes"}]


def test_verify_a_band_of_a_relocked_checkpoint(base, run) -> None:
    """Both are checked: the band's own tensors against the base, and the biases against the lock."""
    lock = random_lock(tiny_model("llama", vocab_size=4096), [(1, 0)])
    lock.save(base / "lock.safetensors")
    fastlock.relock_checkpoint(base / "base", lock, base / "relocked")
    Band(1, 2).save(base / "band.json")
    arguments = ("verify", base / "relocked", "--base", base / "base", "--band", base / "band.json")
    assert "give the lock too" in run(*arguments, code=1)
    said = run(*arguments, "--lock", base / "lock.safetensors")
    assert "all 18 tensors of layers 1 to 2 are the base's; the biases that were added" in said
    data = json.loads(run(*arguments, "--lock", base / "lock.safetensors", "--json"))
    assert data["lock"]["state"] == "locked"


def test_verify_needs_a_lock_or_a_base_and_a_band(run) -> None:
    for arguments in ((), ("--base", "b"), ("--band", "b"), ("--lock", "l", "--band", "b")):
        assert "either --lock FILE, or --base DIR and --band FILE" in run("verify", "x", *arguments, code=2)
