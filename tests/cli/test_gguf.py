"""The commands on a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fastlock
from tests.helpers.command import run_command
from tests.helpers.gguf_files import Kind, Tiny, lock_of


@pytest.fixture
def files(tmp_path: Path) -> Path:
    Tiny(Kind.Q8_0).write(tmp_path / "m.gguf")
    lock_of([(0, 1), (2, 3)]).save(tmp_path / "lock.safetensors")
    return tmp_path


def test_the_whole_way(files) -> None:
    source, out, back, lock = (files / name for name in ("m.gguf", "out.gguf", "back.gguf", "lock.safetensors"))
    said = run_command("doctor", source, code=1).out
    assert said == "llama.cpp: not relocked; for llama.cpp the lock would be carried as biases in a new GGUF\n"
    done = json.loads(run_command("relock", source, "--lock", lock, "--out", out, "--strength", "2", "--json").out)
    assert done["out"] == str(out)
    assert [site["name"] for site in done["receipt"]["sites"]] == ["blk.0.attn_output", "blk.2.attn_output"]
    assert "locked at strength 2" in run_command("verify", out, "--lock", lock).out
    assert "llama.cpp uses the biases of all 2 locked layers" in run_command("doctor", out).out
    assert "unlocked" in run_command("unlock", out, "--out", back).out
    assert back.read_bytes() == source.read_bytes()
    assert "not locked" in run_command("verify", back, "--lock", lock, code=1).out


def test_a_gguf_of_any_name_is_known_by_how_it_begins(files) -> None:
    blob = (files / "m.gguf").rename(files / "5d41402abc")
    run_command("relock", blob, "--lock", files / "lock.safetensors", "--out", files / "out.gguf", "--for", "llama.cpp")
    assert fastlock.verify((files / "out.gguf").rename(files / "blob"), fastlock.Lock.load(files / "lock.safetensors"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--for", "vllm"], "is a GGUF, in which a lock acts in llama.cpp alone"),
        (["--for", "llama.cpp,transformers"], "is a GGUF, in which a lock acts in llama.cpp alone"),
    ],
)
def test_other_stacks_are_refused(options: list[str], message: str, files) -> None:
    source, out = files / "m.gguf", files / "out.gguf"
    said = run_command("relock", source, "--lock", files / "lock.safetensors", "--out", out, *options, code=3).err
    assert message in " ".join(said.split())
    assert not out.exists()


def test_a_gguf_is_not_changed_in_place(files) -> None:
    source = files / "m.gguf"
    before = source.read_bytes()
    for command in (["relock", source, "--lock", files / "lock.safetensors"], ["unlock", source]):
        said = run_command(*command, "--in-place", "--yes", code=3).err
        assert "a GGUF is not changed in place" in " ".join(said.split())
    assert source.read_bytes() == before
    assert len(list(files.iterdir())) == 2


def test_what_doctor_says_of_other_stacks_and_of_damage(files) -> None:
    source, out = files / "m.gguf", files / "out.gguf"
    run_command("relock", source, "--lock", files / "lock.safetensors", "--out", out)
    said = run_command("doctor", out, "--for", "transformers,vllm,sglang,llama.cpp", "--json", code=1).out
    found = {one["stack"]: one for one in json.loads(said)["stacks"]}
    assert [stack for stack, one in found.items() if one["acts"]] == ["llama.cpp"]
    assert "silently drops them" in found["transformers"]["reason"]
    assert "nobody has checked what vllm makes of a GGUF" in found["vllm"]["reason"]
    out.write_bytes(out.read_bytes().replace(b"tiny", b"tony", 1))
    assert "changed since it was relocked (its header" in run_command("doctor", out, code=1).out
    out.write_bytes(out.read_bytes()[:-1000])
    assert "ends after" in " ".join(run_command("doctor", out, code=3).err.split())


def test_options_of_other_kinds_are_refused(files) -> None:
    """None is passed over in silence."""
    source, lock, out = files / "m.gguf", files / "lock.safetensors", files / "out.gguf"
    for command, message in {
        ("doctor", source, "--base", files): "is no adapter, and is examined without a base",
        ("doctor", source, "--lock", lock): "is no adapter, and is examined without a base",
        ("verify", source, "--lock", lock, "--base", files): "a base is given with an adapter",
        ("relock", source, "--lock", lock, "--out", out, "--base", files): "holds GGUF. Give the path of the GGUF",
        ("relock", source, "--lock", lock, "--out", out, "--gap", "0.1", "--base", files): "are for adapters",
        ("relock", source, "--lock", lock, "--out", out, "--as", "adapter"): "is a GGUF. Make the adapter of",
    }.items():
        code = 2 if "for adapters" in message else 3
        assert message in " ".join(run_command(*command, code=code).err.split())
    assert not out.exists()


def test_a_directory_of_them_is_no_checkpoint(files) -> None:
    hub, lock, out = files / "hub", ["--lock", files / "lock.safetensors"], ["--out", files / "out"]
    hub.mkdir()
    (files / "m.gguf").rename(hub / "m.gguf")
    for name, options in {"relock": [*lock, *out], "verify": lock, "unlock": out, "doctor": []}.items():
        said = " ".join(run_command(name, hub, *options, code=3).err.split())
        assert "hub: holds GGUF. Give the path of the GGUF file itself" in said


def test_inspect_shows_its_receipt(files) -> None:
    source, out, lock = files / "m.gguf", files / "out.gguf", files / "lock.safetensors"
    said = run_command("inspect", source).out
    assert said == f"{source}: a GGUF that is not relocked by fastlock (its metadata holds no receipt)\n"
    shown = json.loads(run_command("inspect", source, "--json").out)
    assert shown == {"path": str(source), "kind": "GGUF", "receipt": None}
    done = json.loads(run_command("relock", source, "--lock", lock, "--out", out, "--strength", "2", "--json").out)
    out = out.rename(files / "blob")
    shown = json.loads(run_command("inspect", out, "--json").out)
    assert shown == {"path": str(out), "kind": "GGUF", "receipt": done["receipt"]}
    said = "".join(run_command("inspect", out).out.split())
    for text in ("arelockedGGUF", "strength│2.0", "blk.0.attn_output", "blk.2.attn_output"):
        assert text in said
    out.write_bytes(out.read_bytes()[:100])
    assert "blob" in run_command("inspect", out, code=3).err
    assert "Download it first" in run_command("inspect", "s3://bucket/m.gguf", code=3).err
