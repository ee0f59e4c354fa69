"""Locks with a gate, killed or out of space: the source is untouched; the target is absent, old or complete."""

from __future__ import annotations

import errno
import itertools
import resource
import shutil
import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

import fastlock
from fastlock.checkpoints.layout import COLUMNS_FILE
from tests.checkpoints.test_crash import Failing, contents, finished, forked
from tests.helpers.adapters import config_of, save_adapter
from tests.helpers.families import gated_lock, tiny_model

Contents = dict[str, bytes]


@dataclass(frozen=True)
class Work:
    """Something to do, what it makes of what was in its place, and what it must leave alone.

    Attributes:
        given: what is at `target` before, as a directory to copy; None where nothing is.
        new: what is there afterwards.
    """

    do: Callable[[], object]
    target: Path
    given: Path | None
    new: Contents
    kept: dict[Path, Contents]

    def begin(self) -> None:
        if self.target.exists():
            shutil.rmtree(self.target)
        if self.given is not None:
            shutil.copytree(self.given, self.target)

    def check(self, done: bool) -> bool:
        """Whether the new directory is there; else the old one must be, or none. It must be if the work was done."""
        found = contents(self.target) if self.target.exists() else None
        old = None if self.given is None else self.kept[self.given]
        assert found in (old, self.new), sorted(found or {})
        assert not done or found == self.new
        for directory, before in self.kept.items():
            assert contents(directory) == before
        left = {path for path in self.target.parent.iterdir() if path != self.target} - self.kept.keys()
        assert left <= {self.target.with_name(f".{self.target.name}.fastlock")}
        for path in left if self.given is None else ():  # what others can read there is complete
            assert path.stat().st_mode & 0o077 == 0 or contents(path) == self.new
        return found == self.new


def of_checkpoints(tmp_path: Path, what: str) -> Work:
    model = tiny_model("llama", torch.bfloat16)
    lock, other = gated_lock(model, constant=False), gated_lock(model, [(0, 1), (1, 2)], seed=4)
    source, locked, place, out = (tmp_path / name for name in ("source", "locked", "place", "out"))
    model.save_pretrained(source, max_shard_size="80KB")
    fastlock.relock_checkpoint(source, lock, locked)
    assert (locked / COLUMNS_FILE).is_file()
    kept = {source: contents(source), locked: contents(locked)}
    if what == "relock":
        return Work(partial(fastlock.relock_checkpoint, source, lock, out), out, None, kept[locked], kept)
    if what == "unlock":
        return Work(partial(fastlock.unlock_checkpoint, locked, out), out, None, kept[source], kept)
    if what == "unlock in place":
        return Work(partial(fastlock.unlock_checkpoint, place, place, in_place=True), place, locked, kept[source], kept)
    given, wanted = (source, lock) if what == "relock in place" else (locked, other)
    expected = tmp_path / "expected"
    fastlock.relock_checkpoint(source, wanted, expected)
    kept[expected] = contents(expected)
    relock = partial(fastlock.relock_checkpoint, place, wanted, place, in_place=True)
    return Work(relock, place, given, kept[expected], kept)


def of_adapters(tmp_path: Path, what: str) -> Work:
    """A lock that is a gate alone goes into the LoRA; one with a constant part takes a merged checkpoint."""
    model = tiny_model("llama", torch.bfloat16)
    base, source, locked, out = (tmp_path / name for name in ("base", "adapter", "locked", "out"))
    lock = gated_lock(model, constant=what == "merge")
    model.save_pretrained(base)
    save_adapter(config_of("lora"), source)
    receipt = fastlock.relock_adapter(source, base, lock, locked)
    assert receipt.carrier == ("merge" if what == "merge" else "adapter gate")
    kept = {path: contents(path) for path in (base, source, locked)}
    if what == "unlock adapter":
        return Work(partial(fastlock.unlock_checkpoint, locked, out), out, None, kept[source], kept)
    return Work(partial(fastlock.relock_adapter, source, base, lock, out), out, None, kept[locked], kept)


CHECKPOINTS = ["relock", "unlock", "relock in place", "relock anew in place", "unlock in place"]
ADAPTERS = ["relock adapter", "merge", "unlock adapter"]


@pytest.fixture(params=CHECKPOINTS + ADAPTERS)
def work(request, tmp_path) -> Work:
    return (of_adapters if request.param in ADAPTERS else of_checkpoints)(tmp_path, request.param)


def test_killed_at_every_step(work: Work, monkeypatch) -> None:
    """Each run begins over what the one before left there, and so does the last, which ends."""
    killing, complete = Failing(monkeypatch, None), 0
    for step in itertools.count(1):
        work.begin()

        def until_killed(step: int = step) -> None:
            killing.left = step
            work.do()

        code = finished(forked(until_killed))
        assert code in (0, -signal.SIGKILL), f"step {step}: {code}"
        complete += work.check(done=code == 0)
        if code == 0:
            break
    assert step > 10
    assert 0 < complete < step


@pytest.mark.parametrize("work", ["relock", "relock in place", "merge"], indirect=True)
def test_a_full_disk_at_every_step(work: Work, monkeypatch) -> None:
    failing, refusals = Failing(monkeypatch, errno.ENOSPC), 0
    for step in itertools.count(1):
        work.begin()
        failing.left, refused = step, False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is complete, and something is left to remove
            try:
                work.do()
            except fastlock.FastlockError:
                refused = True
        reached, failing.left = failing.left <= 0, None
        assert work.check(done=not refused) != refused
        refusals += refused
        if not reached:
            break
    assert not refused
    assert refusals > 10


def test_files_that_cannot_grow(work: Work) -> None:
    """Every file of the result is cut short once, in the middle of being written."""
    sizes = sorted({len(data) for data in work.new.values()} - {0})

    def within(limit: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        work.do()

    refusals = 0
    for size in sizes:
        work.begin()
        code = finished(forked(lambda size=size: within(size - 1)))
        assert code in (0, 3), f"files of {size} bytes: {code}"
        assert work.check(done=code == 0) != (code == 3)
        refusals += code == 3
    assert refusals > 2
    work.begin()
    work.do()
    assert work.check(done=True)


@pytest.mark.parametrize("what", ["relock adapter", "merge"])
def test_a_base_at_the_place_where_the_target_is_made_is_not_lost(what: str, tmp_path) -> None:
    work = of_adapters(tmp_path, what)
    base = (tmp_path / "base").rename(tmp_path / ".out.fastlock")
    lock = gated_lock(tiny_model("llama", torch.bfloat16), constant=what == "merge")
    with pytest.raises(fastlock.FastlockError, match=r"\.out\.fastlock: is where .*out is made, .* another name"):
        fastlock.relock_adapter(tmp_path / "adapter", base, lock, tmp_path / "out")
    assert contents(base) == work.kept[tmp_path / "base"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("in_place", [False, True])
def test_a_base_at_the_place_where_a_checkpoint_is_made_is_not_lost(in_place: bool, tmp_path) -> None:
    model, source = tiny_model("llama", torch.bfloat16), tmp_path / "source"
    out = source if in_place else tmp_path / "out"
    base = out.with_name(f".{out.name}.fastlock")
    for directory in (source, base):
        model.save_pretrained(directory)
    before = {directory: contents(directory) for directory in (source, base)}
    with pytest.raises(fastlock.FastlockError, match=rf"{base.name}: is where .*{out.name} is made, .* another name"):
        fastlock.relock_checkpoint(source, gated_lock(model), out, base=base, in_place=in_place)
    assert {directory: contents(directory) for directory in (source, base)} == before
    assert in_place or not out.exists()


def test_a_base_that_nobody_may_write_to_is_merged_with_its_permissions(tmp_path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    model = tiny_model("llama", torch.bfloat16)
    model.save_pretrained(base)
    (base / "own").mkdir()
    (base / "own" / "notes.txt").write_text("mine")
    save_adapter(config_of("lora"), tmp_path / "adapter")
    modes = {"own/notes.txt": 0o400, "own": 0o500, ".": 0o555}
    for name, mode in modes.items():
        (base / name).chmod(mode)
    receipt = fastlock.relock_adapter(tmp_path / "adapter", base, gated_lock(model), out)
    assert receipt.carrier == "merge"
    for directory in (base, out):
        assert {name: (directory / name).stat().st_mode & 0o777 for name in modes} == modes
        for name in (".", "own"):  # so that they can be removed
            (directory / name).chmod(0o700)
    assert (out / "own" / "notes.txt").read_text() == "mine"
