"""How compute-sanitizer is found and asked; what it says of our kernels only a GPU can tell."""

from pathlib import Path

import pytest
import torch

from bench.lib import machine
from bench.ops import sanitizer


@pytest.fixture
def commands(monkeypatch, tmp_path) -> list[list[str]]:
    """What is run instead, on a machine that says it has a GPU."""
    run: list[list[str]] = []
    monkeypatch.setattr(machine, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(sanitizer, "run_command", lambda command: run.append(command) or "ERROR SUMMARY: 0 errors")
    monkeypatch.setattr(sanitizer, "TOOLKIT", str(tmp_path / "toolkit"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return run


def install(directory: Path) -> Path:
    directory.mkdir()
    tool = directory / "compute-sanitizer"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    return tool


@pytest.mark.parametrize("place", ["bin", "toolkit"])
def test_it_is_found_on_the_path_and_in_the_toolkit(place: str, tmp_path, commands) -> None:
    tool = install(tmp_path / place)
    try:
        sanitizer.check_memory()
    except pytest.skip.Exception as skipped:
        pytest.fail(str(skipped))
    assert commands[0][0] == str(tool)


def test_calls_of_the_driver_that_fail_are_no_errors(tmp_path, commands) -> None:
    """fastlock itself asks for a kernel's parameters until there is none, and torch asks for functions."""
    install(tmp_path / "bin")
    sanitizer.check_memory()
    options = dict(zip(commands[0][1:-3:2], commands[0][2:-3:2], strict=True))
    assert options["--report-api-errors"] == "no"
    assert int(options["--error-exitcode"]) not in (0, 1)
    assert commands[0][-2:] == ["-m", "bench.ops.sanitized"]


def test_without_it_one_line_says_so(tmp_path, commands) -> None:
    with pytest.raises(pytest.skip.Exception, match="neither on the PATH nor in") as skipped:
        sanitizer.check_memory()
    assert len(str(skipped.value).splitlines()) == 1
    assert commands == []


def test_what_it_finds_is_a_failure(tmp_path, commands, monkeypatch) -> None:
    install(tmp_path / "bin")
    monkeypatch.setattr(sanitizer, "run_command", lambda command: "ERROR SUMMARY: 2 errors")
    with pytest.raises(AssertionError, match="2 errors"):
        sanitizer.check_memory()
