"""The command with adapters: relocked over a base, examined, verified and unlocked."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tests.helpers.adapters import config_of, save_adapter
from tests.helpers.families import gated_lock, tiny_model
from tests.helpers.relocked_adapters import contents

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"


def test_the_whole_way_of_an_adapter_that_touches_its_projections(files: Path, run) -> None:
    source, out, lock = save_adapter(config_of("lora"), files / "adapter"), files / "out", files / "lock.safetensors"
    over = ("--base", files / "base", "--lock", lock)
    assert "adapter bias or merge" in run("doctor", source, *over, "--for", "transformers", code=1)
    said = run("relock", source, *over, "--out", out, "--strength", "2", "--for", "transformers")
    assert "2 layers relocked at strength 2" in said
    assert "adapter bias: Load it with PEFT or transformers" in said
    assert "locked at strength 2" in run("verify", out, *over)
    assert "uses the adapter bias" in run("doctor", out, *over, "--for", "transformers")
    run("unlock", out, "--out", files / "back")
    assert contents(files / "back") == contents(source)


def test_one_that_leaves_them_alone_names_its_base(files: Path, run) -> None:
    source, out = save_adapter(config_of("elsewhere"), files / "adapter"), files / "out"
    arguments = ("relock", source, "--base", files / "base", "--lock", files / "lock.safetensors", "--out")
    said = run(*arguments, out, "--relocked-base", files / "there")
    assert f"base bias: Serve it over {files / 'there'}, the relocked base" in said
    receipt = json.loads(run(*arguments, files / "more", "--relocked-base", files / "there", "--json"))["receipt"]
    assert (receipt["carrier"], receipt["base"]["name"]) == ("base bias", str(files / "there"))
    findings = json.loads(run("doctor", files / "more", "--json"))["stacks"]
    assert [(finding["acts"], finding["method"]) for finding in findings] == [(True, "LORA")] * 2


def test_the_python_of_the_page_runs(files: Path, monkeypatch) -> None:
    save_adapter(config_of("lora"), files / "adapter")
    monkeypatch.chdir(files)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["receipt"].carrier == "adapter bias"
    assert contents(files / "adapter-again") == contents(files / "adapter")


def test_a_gap_is_told(files: Path, run) -> None:
    source = save_adapter(config_of("lora", lora_alpha=0.001), files / "adapter")
    arguments = ("relock", source, "--base", files / "base", "--lock", files / "lock.safetensors", "--out")
    assert "is allowed" in run(*arguments, files / "out", "--gap", "1e-9", code=3)
    assert "The base's own fold is off by at most 0." in run(*arguments, files / "out", "--gap", "0.02")


def test_what_goes_with_an_adapter_alone(files: Path, run) -> None:
    source, lock = save_adapter(config_of("lora"), files / "adapter"), files / "lock.safetensors"
    relock = ("relock", "--lock", lock)
    assert "fastlock relock ADAPTER --base BASE" in run(*relock, source, "--out", files / "out", code=3)
    assert "are for adapters" in run(*relock, files / "base", "--out", files / "out", "--gap", "0.1", code=2)
    in_place = (*relock, source, "--base", files / "base", "--in-place", "--yes")
    assert "relocked into a new directory" in run(*in_place, code=2)
    assert "not changed in place" in run("unlock", source, "--in-place", "--yes", code=3)
    assert "--lock was given without an adapter" in run("doctor", "--lock", lock, code=2)


def test_a_gate_as_an_adapter_and_within_one(files: Path, run) -> None:
    lock, base, out = files / "gate.safetensors", files / "base", files / "out"
    gated_lock(tiny_model("llama"), constant=False).save(lock)
    said = run("relock", base, "--lock", lock, "--out", out, "--as", "adapter", "--for", "vllm")
    assert "2 layers relocked at strength 1 (" in said
    assert f"adapter gate: Serve it over {base} as it is, as any LoRA" in said
    assert "all 2 layers hold their gate" in run("verify", out, "--lock", lock)
    assert "uses the adapter gate" in run("doctor", out, "--for", "sglang,llama.cpp")
    assert "was none before" in run("unlock", out, "--out", files / "back", code=3)
    source = save_adapter(config_of("lora"), files / "adapter")
    said = run("relock", source, "--base", base, "--lock", lock, "--out", files / "within")
    assert "adapter gate: Serve it over" in said
    run("unlock", files / "within", "--out", files / "back")
    assert contents(files / "back") == contents(source)
    alone = ("relock", base, "--lock", lock, "--as", "adapter")
    assert "Give --lock and --out alone" in run(*alone, "--out", files / "no", "--base", base, code=2)
    assert "Give --lock and --out alone" in run(*alone, "--in-place", "--yes", code=2)
    assert not (files / "no").exists()
