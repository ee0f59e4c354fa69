"""`fastlock doctor`, of a checkpoint and of the machine."""

import json

import pytest

from fastlock.kernels.launch_paths import LaunchPath


def test_of_a_checkpoint(files, run) -> None:
    base, lock, out = files / "base", files / "lock.safetensors", files / "out"
    assert "not relocked" in run("doctor", base, "--for", "vllm", code=1)
    run("relock", base, "--lock", lock, "--out", out)
    assert "vllm uses the biases of all 2 locked layers" in run("doctor", out, "--for", "vllm")
    found = json.loads(run("doctor", out, "--json"))["stacks"]
    assert [(finding["stack"], finding["acts"]) for finding in found] == [("transformers", True), ("vllm", True)]


def test_of_the_machine(run, monkeypatch) -> None:
    paths = [
        LaunchPath("cuda:0, H100 [x]", "jit", "Triton compiles on the first launch: this installation has no cubins"),
        LaunchPath("CPU", "reference", "plain PyTorch"),
    ]
    monkeypatch.setattr("fastlock.kernels.launch_paths.launch_paths", lambda: paths)
    said = run("doctor").splitlines()
    assert said[0] == "cuda:0, H100 [x]: jit (Triton compiles on the first launch: this installation has no cubins)"
    assert len(said) == 2
    devices = json.loads(run("doctor", "--json"))["devices"]
    assert [(device["path"], device["reason"]) for device in devices] == [(path.path, path.reason) for path in paths]
    assert [device["faults"] for device in devices] == [[], []]
    assert "Name one" in run("doctor", "--for", "vllm", code=2)


def test_of_a_machine_whose_kernels_are_wrong(run, monkeypatch) -> None:
    paths = [LaunchPath("cuda:0, B300", "reference", "no cubin fits", ("its jit is wrong", "and not written"))]
    monkeypatch.setattr("fastlock.kernels.launch_paths.launch_paths", lambda: paths)
    assert run("doctor").splitlines() == [
        "cuda:0, B300: reference (no cubin fits)",
        "cuda:0, B300: its jit is wrong",
        "cuda:0, B300: and not written",
    ]
    assert json.loads(run("doctor", "--json"))["devices"][0]["faults"] == ["its jit is wrong", "and not written"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--for vllm", "--for was given without a checkpoint. Name one, or leave --for out."),
        ("--base b", "--base was given without an adapter. Name one, or leave --base out."),
        ("--lock l", "--lock was given without an adapter. Name one, or leave --lock out."),
        ("--for vllm --lock l", "--for and --lock were given without an adapter. Name one, or leave --for and --lock"),
    ],
)
def test_it_names_the_options_that_lack_something(options: str, said: str, run) -> None:
    assert f"fastlock doctor: error: {said}" in run("doctor", *options.split(), code=2)
