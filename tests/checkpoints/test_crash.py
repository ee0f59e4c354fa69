"""Killed, out of space, two at a time: the source is untouched, the target absent, old or complete."""

import builtins
import errno
import faulthandler
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import fastlock
from fastlock.checkpoints import relocking, unlocking
from fastlock.storage import local
from fastlock.storage import new_directory as folders
from tests.helpers.families import random_lock, tiny_model

KILLS = 500


def contents(directory) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def prepared(tmp_path, kind: str = "llama"):
    """A checkpoint, its lock, and what relocking and unlocking it must give."""
    model = tiny_model(kind, torch.bfloat16)
    lock = random_lock(model)
    model.save_pretrained(tmp_path / "source")
    fastlock.relock_checkpoint(tmp_path / "source", lock, tmp_path / "locked")
    return lock, contents(tmp_path / "source"), contents(tmp_path / "locked")


def forked(work) -> int:
    """Run in a child of its own; its process id. The child's exit code: 0 done, 3 refused, 4 anything else."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except fastlock.FastlockError:
        os._exit(3)
    except BaseException:
        os._exit(4)


def finished(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# `make test` runs the tests with threads of pytest's own, so the killing is done from a process with none.
def test_killed_at_any_moment(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["runs"] == KILLS
    assert counts["killed in the middle"] > KILLS // 5
    assert counts["complete"] + counts["absent or old"] == KILLS


def kill_many(tmp_path: Path) -> dict[str, int]:
    """Relock, unlock, and both in place, each killed after a random time; it raises at the first thing that is lost."""
    torch.set_num_threads(1)
    lock, original, locked = prepared(tmp_path)
    source, out, place = tmp_path / "source", tmp_path / "out", tmp_path / "place"
    works = [
        (None, locked, lambda: fastlock.relock_checkpoint(source, lock, out)),
        (None, original, lambda: fastlock.unlock_checkpoint(tmp_path / "locked", out)),
        (original, locked, lambda: fastlock.relock_checkpoint(place, lock, place, in_place=True)),
        (locked, original, lambda: fastlock.unlock_checkpoint(place, place, in_place=True)),
    ]
    generator, longest = random.Random(0), 0.02
    counts = {"runs": 0, "killed in the middle": 0, "complete": 0, "absent or old": 0}
    for run in range(KILLS):
        old, new, work = works[run % len(works)]
        target = out if old is None else place
        if old is not None:
            shutil.copytree(source if old is original else tmp_path / "locked", place)
        started = time.perf_counter()
        pid = forked(work)
        time.sleep(generator.uniform(0, longest))
        os.kill(pid, signal.SIGKILL)
        code = finished(pid)
        counts["runs"] += 1
        counts["killed in the middle"] += code == -signal.SIGKILL
        took = time.perf_counter() - started
        longest = 0.9 * longest + 0.1 * took if code == 0 else min(0.05, longest * 1.02)
        assert code in (0, -signal.SIGKILL), code
        found = contents(target) if target.exists() else None
        assert found in (old, new), f"run {run}: {sorted(found or {})}"
        assert code != 0 or found == new
        assert contents(source) == original
        assert contents(tmp_path / "locked") == locked
        counts["complete" if found == new else "absent or old"] += 1
        if found == old:
            work()  # again, over whatever the killed run left
            assert contents(target) == new
        if target.exists():
            shutil.rmtree(target)
        assert {path.name for path in tmp_path.iterdir()} <= {"source", "locked", f".{target.name}.fastlock"}
        shutil.rmtree(tmp_path / f".{target.name}.fastlock", ignore_errors=True)
    return counts


class Failing:
    """Every call that changes the file system, counted; the one of a given number fails, or without a code, kills."""

    CHANGES = ("mkdir", "link", "symlink", "rename", "chmod", "fchmod", "unlink", "rmdir")
    CALLS = (*CHANGES, "open", "fsync")

    def __init__(self, monkeypatch, code: int | None) -> None:
        self.monkeypatch, self.code, self.left = monkeypatch, code, None
        for name in self.CHANGES if code is None else self.CALLS:
            self._wrap(os, name)
        self._wrap(folders, "_exchange")
        if code is not None:
            self._wrap(builtins, "open")
            self._wrap(folders.Path, "open")

    def _wrap(self, owner, name: str) -> None:
        original = getattr(owner, name)

        def call(*args, **kwargs):
            if self.left is not None:
                self.left -= 1
                if self.left == 0:
                    if self.code is None:
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise OSError(self.code, os.strerror(self.code))
            return original(*args, **kwargs)

        self.monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("what", ["relock", "unlock", "relock in place", "unlock in place", "gpt2"])
def test_a_failure_at_every_step(what: str, code: int, tmp_path, monkeypatch) -> None:
    lock, original, locked = prepared(tmp_path, "gpt2" if what == "gpt2" else "llama")
    source, out, place = tmp_path / "source", tmp_path / "out", tmp_path / "place"
    works = {
        "relock": (None, locked, lambda: fastlock.relock_checkpoint(source, lock, out)),
        "gpt2": (None, locked, lambda: fastlock.relock_checkpoint(source, lock, out)),
        "unlock": (None, original, lambda: fastlock.unlock_checkpoint(tmp_path / "locked", out)),
        "relock in place": (original, locked, lambda: fastlock.relock_checkpoint(place, lock, place, in_place=True)),
        "unlock in place": (locked, original, lambda: fastlock.unlock_checkpoint(place, place, in_place=True)),
    }
    old, new, work = works[what]
    target = out if old is None else place
    failing, failures, warnings_given, reached = Failing(monkeypatch, code), 0, 0, True
    for step in itertools.count(1):
        failing.left = None
        if target.exists():
            shutil.rmtree(target)
        if old is not None:
            shutil.copytree(source if old is original else tmp_path / "locked", place)
        failing.left, refused = step, False
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                work()
            except fastlock.FastlockError:
                refused = True
        reached, failing.left, failures = failing.left <= 0, None, failures + refused
        found = contents(target) if target.exists() else None
        assert found == (old if refused else new), f"step {step}: {sorted(found or {})}"
        warned = [warning for warning in caught if "is complete, but" in str(warning.message)]
        assert not (refused and warned), f"step {step}: {warned}"
        warnings_given += len(warned)
        assert contents(source) == original
        assert contents(tmp_path / "locked") == locked
        if not reached:
            break
    assert not refused
    assert failures > 10
    assert warnings_given  # a failure after the rename, which leaves the result where it is


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of a given size, empty each time; returns its directory."""
    place = tmp_path / "disk"
    place.mkdir()

    def mounted(kilobytes: int) -> Path:
        subprocess.run(["umount", str(place)], capture_output=True, check=False)
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("file systems can't be mounted here")
        return place

    yield mounted
    subprocess.run(["umount", str(place)], capture_output=True, check=False)


@pytest.mark.parametrize("what", ["relock", "relock, copied", "unlock", "gpt2"])
def test_a_full_disk(what: str, small_disk, tmp_path) -> None:
    lock, original, locked = prepared(tmp_path, "gpt2" if what == "gpt2" else "llama")
    source, options = tmp_path / "source", {"copy": "copied" in what}
    refusals = 0
    for kilobytes in itertools.count(4, 12):
        out = small_disk(kilobytes) / "out"
        try:
            if what.startswith("unlock"):
                fastlock.unlock_checkpoint(tmp_path / "locked", out)
            else:
                fastlock.relock_checkpoint(source, lock, out, **options)
        except fastlock.FastlockError as error:
            assert "No space left on device" in str(error)  # noqa: PT017 - with enough space it is not raised
            refusals += 1
            assert not list(out.parent.iterdir())
            continue
        break
    assert refusals
    assert contents(out) == (original if what.startswith("unlock") else locked)
    assert contents(source) == original
    assert contents(tmp_path / "locked") == locked


def test_a_source_that_is_cut_short_while_it_is_mapped(tmp_path) -> None:
    """The system ends the process (SIGBUS), as documented; nothing half is there, and the next run clears up."""
    lock, original, locked = prepared(tmp_path)
    shard = tmp_path / "source" / "model.safetensors"

    def work() -> None:
        faulthandler.disable()
        local._read_ahead = lambda mapped, base: os.truncate(shard, 0)
        fastlock.relock_checkpoint(tmp_path / "source", lock, tmp_path / "out")

    assert finished(forked(work)) == -signal.SIGBUS
    assert not (tmp_path / "out").exists()
    shard.write_bytes(original["model.safetensors"])
    fastlock.relock_checkpoint(tmp_path / "source", lock, tmp_path / "out")
    assert contents(tmp_path / "out") == locked


def test_two_runs_on_one_target(tmp_path) -> None:
    lock, original, locked = prepared(tmp_path)
    for _ in range(25):
        pids = [
            forked(lambda: fastlock.relock_checkpoint(tmp_path / "source", lock, tmp_path / "out")) for _ in range(2)
        ]
        codes = sorted(finished(pid) for pid in pids)
        assert codes == [0, 3]
        assert contents(tmp_path / "out") == locked
        shutil.rmtree(tmp_path / "out")
    assert contents(tmp_path / "source") == original
    assert {path.name for path in tmp_path.iterdir()} == {"source", "locked"}


def test_a_second_run_in_place_while_the_first_clears_away(tmp_path, monkeypatch) -> None:
    """After the exchange, what the first run clears away is a directory that the second one must not take."""
    lock, original, locked = prepared(tmp_path)
    place, started, remove = tmp_path / "place", [], shutil.rmtree
    shutil.copytree(tmp_path / "source", place)

    def second(*args, **kwargs) -> None:
        if not started:
            started.append(contents(place))
            for work in (
                lambda: fastlock.relock_checkpoint(place, lock, place, 3.0, in_place=True),
                lambda: fastlock.unlock_checkpoint(place, place, in_place=True),
            ):
                with pytest.raises(fastlock.FastlockError, match="place: another process is making it"):
                    work()
        remove(*args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", second)
    fastlock.relock_checkpoint(place, lock, place, in_place=True)
    assert started == [locked]
    assert contents(place) == locked
    fastlock.unlock_checkpoint(place, place, in_place=True)
    assert contents(place) == original
    assert {path.name for path in tmp_path.iterdir()} == {"source", "locked", "place"}


@pytest.mark.parametrize("work", ["relock", "unlock"])
def test_in_place_nobody_else_has_it_from_before_it_is_read(work: str, tmp_path, monkeypatch) -> None:
    lock, original, locked = prepared(tmp_path)
    place, codes = tmp_path / "place", []
    shutil.copytree(tmp_path / ("source" if work == "relock" else "locked"), place)

    def run() -> None:
        if work == "relock":
            fastlock.relock_checkpoint(place, lock, place, in_place=True)
        else:
            fastlock.unlock_checkpoint(place, place, in_place=True)

    def read(directory) -> dict[str, local.LocalFile]:
        found = local.local_files(directory)
        if not codes:
            codes.append(None)
            codes.append(finished(forked(run)))
        return found

    monkeypatch.setattr(relocking if work == "relock" else unlocking, "files_in", read)
    run()
    assert codes == [None, 3]
    assert contents(place) == (locked if work == "relock" else original)


def test_another_process_is_making_it(tmp_path) -> None:
    lock, _, _ = prepared(tmp_path)
    with (
        folders.create_directory(tmp_path / "out", tmp_path / "source", in_place=False),
        pytest.raises(fastlock.FastlockError, match="another process is making it"),
    ):
        fastlock.relock_checkpoint(tmp_path / "source", lock, tmp_path / "out")


@pytest.mark.parametrize("when", ["before reading", "before linking"])
@pytest.mark.parametrize("how", ["replaced", "appended", "truncated"])
def test_a_source_that_changes(when: str, how: str, tmp_path, monkeypatch) -> None:
    lock, _, _ = prepared(tmp_path)
    shard = tmp_path / "source" / "model.safetensors"

    def change() -> None:
        data = shard.read_bytes()
        if how == "replaced":
            shard.unlink()
            shard.write_bytes(data[:-1] + b"\0")
        else:
            with shard.open("r+b") as file:
                file.truncate(len(data) + (100 if how == "appended" else -100))

    owner, name = (local.LocalFile, "view") if when == "before reading" else (folders.NewDirectory, "link")
    original, changed = getattr(owner, name), []

    def hook(*args):
        if not changed:
            changed.append(change())
        return original(*args)

    monkeypatch.setattr(owner, name, hook)
    with pytest.raises(fastlock.DamagedError, match="changed while it was being read"):
        fastlock.relock_checkpoint(tmp_path / "source", lock, tmp_path / "out")
    assert changed
    assert not (tmp_path / "out").exists()


def test_without_permission(tmp_path) -> None:
    if os.getuid() != 0:
        pytest.skip("root gives up its rights here")
    lock, original, _ = prepared(tmp_path)

    def without_rights() -> None:
        os.setuid(65534)
        fastlock.relock_checkpoint(tmp_path / "source", lock, tmp_path / "out")

    tmp_path.chmod(0o755)
    assert finished(forked(without_rights)) == 3
    assert contents(tmp_path / "source") == original
    assert not (tmp_path / "out").exists()


if __name__ == "__main__":
    print(json.dumps(kill_many(Path(sys.argv[1]))))
