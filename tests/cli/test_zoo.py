"""`fastlock zoo`."""

import json
import shutil

import pytest

from fastlock.zoo.run import Summary
from tests.helpers.command import Done, run_command


@pytest.fixture
def tunes(files):
    """A directory of six checkpoints, a to f, beside the lock that fits."""
    for name in "abcdef":
        shutil.copytree(files / "base", files / "zoo" / name)
    return files / "zoo"


def run(*arguments: object, code: int = 0) -> Done:
    return run_command("zoo", *arguments, code=code)


def test_the_command(files, tunes) -> None:
    lock, out = ["--lock", files / "lock.safetensors"], files / "out"
    done = run("relock", tunes / "[ab]", *lock, "--out", out, "--strength", "2", "--workers", "2")
    assert "2 relocked" in done.out
    assert "2/2" in done.err
    done = run("relock", tunes, *lock, "--out", out, "--strength", "2", "--workers", "2", "--json")
    assert json.loads(done.out)["counts"] == {"relocked": 4, "done already": 2}
    assert done.err == ""
    assert "6 locked" in run("verify", out, *lock).out
    (out / "a" / "config.json").write_text("{")
    (tunes / "b").rename(tunes / "\x1b[31m[red]b")
    done = run("verify", tunes / "*b", out / "*", *lock, code=1)
    assert "[red]b: not locked: " in done.out
    assert "\x1b" not in done.out
    assert "a: failed: " in done.out
    wrong = json.loads(run("verify", out, *lock, "--json", code=1).out)["wrong"]
    assert [result["name"] for result in wrong] == ["a"]
    assert "failed: " in run("relock", tunes / "a", *lock, "--out", out, code=1).out


def test_the_options_reach_the_function(files, tunes, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr("fastlock.zoo.run.relock_zoo", lambda *_, **keywords: calls.append(keywords) or Summary())
    command = ["relock", tunes, "--lock", files / "lock.safetensors", "--out", files / "out"]
    run(*command)
    run(
        *command,
        "--for",
        "vllm, sglang",
        "--for",
        "llama.cpp",
        *"--copy --base x --ray auto --rank 1 --world-size 3".split(),
    )
    for keywords in calls:
        del keywords["on_result"]
    default = {"base": None, "workers": None, "ray": None, "rank": None, "world_size": None, "copy": False}
    default |= {"carrier": None, "gap": None}
    assert calls[0] == {**default, "stacks": None}
    stated = {"base": "x", "ray": "auto", "rank": 1, "world_size": 3, "copy": True}
    assert calls[1] == {**default, **stated, "stacks": ("vllm", "sglang", "llama.cpp")}
    for wrong in (["--rank", "1"], ["--world-size", "2"], ["--rank", "2", "--world-size", "2"], ["--workers", "0"]):
        run(*command, *wrong, code=2)
    assert len(calls) == 2


def test_bases_and_what_is_said_of_adapters_reach_the_function(files, tunes, monkeypatch) -> None:
    calls = []
    for name in ("relock_zoo", "verify_zoo"):
        monkeypatch.setattr(f"fastlock.zoo.run.{name}", lambda *_, **keywords: calls.append(keywords) or Summary())
    lock = ["--lock", files / "lock.safetensors"]
    command = ["relock", tunes, *lock, "--out", files / "out"]
    (files / "a=b").mkdir()
    for bases in (["x", "y"], ["org/x=x", "org/y=y=z"], [str(files / "a=b")]):
        options = [word for base in bases for word in ("--base", base)]
        run(*command, *options, "--carrier", "merge", "--gap", "0.02")
        run("verify", tunes, *lock, *options)
    assert [(one["carrier"], one["gap"]) for one in calls[::2]] == [("merge", 0.02)] * 3
    assert [one["base"] for one in calls[::2]] == [one["base"] for one in calls[1::2]]
    assert [one["base"] for one in calls[::2]] == [["x", "y"], {"org/x": "x", "org/y": "y=z"}, str(files / "a=b")]
    for wrong in (["--base", "x", "--base", "org/y=y"], ["--base", "n=x", "--base", "n=y"], ["--base", "=x"]):
        assert "NAME=DIR" in run(*command, *wrong, code=2).err
    assert len(calls) == 6
