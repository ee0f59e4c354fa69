"""Directories on this machine: permissions, what may not be overwritten, and how their places are given."""

import fcntl
import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

import fastlock
from fastlock.storage import local
from fastlock.storage import new_directory as folders
from fastlock.storage.places import as_place
from tests.checkpoints.test_crash import contents, finished, forked, prepared
from tests.helpers.families import random_lock, tiny_model


def modes(directory) -> dict[str, int]:
    return {
        str(path.relative_to(directory)): path.stat().st_mode & 0o777 for path in directory.rglob("*") if path.is_file()
    }


@pytest.fixture
def reachable():
    """A directory that users without rights can reach, unlike pytest's."""
    directory = Path(tempfile.mkdtemp())
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def shared_blocks(monkeypatch) -> None:
    """A file system that shares blocks, as far as it can be seen from outside: its ioctl copies."""
    monkeypatch.setattr(fcntl, "ioctl", lambda new, _, old: os.sendfile(new, old, 0, os.fstat(old).st_size))


@pytest.mark.parametrize("inside", ["", "nested/checkpoint"])
@pytest.mark.parametrize("what", ["relock", "unlock"])
def test_a_source_at_the_place_where_the_target_is_made(what: str, inside: str, tmp_path) -> None:
    lock, original, locked = prepared(tmp_path)
    place = tmp_path / ".out.fastlock" / inside
    shutil.copytree(tmp_path / ("source" if what == "relock" else "locked"), place)
    works = {
        "relock": lambda: fastlock.relock_checkpoint(place, lock, tmp_path / "out"),
        "unlock": lambda: fastlock.unlock_checkpoint(place, tmp_path / "out"),
    }
    with pytest.raises(fastlock.FastlockError, match=r"\.out\.fastlock.*: is where .*out is made, .* another name"):
        works[what]()
    assert contents(place) == (original if what == "relock" else locked)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_is_named_like_a_place_of_ours(tmp_path) -> None:
    lock, original, locked = prepared(tmp_path)
    place = (tmp_path / "source").rename(tmp_path / ".out.fastlock")
    fastlock.relock_checkpoint(place, lock, place, in_place=True)
    assert contents(place) == locked
    fastlock.unlock_checkpoint(place, tmp_path / "other")
    assert contents(tmp_path / "other") == original


def test_read_only_directories_in_place(reachable) -> None:
    tmp_path = reachable
    lock, original, locked = prepared(tmp_path)
    place = tmp_path / "place"
    (tmp_path / "source" / "docs" / "more").mkdir(parents=True)
    (tmp_path / "source" / "docs" / "more" / "notes.txt").write_text("mine")
    shutil.copytree(tmp_path / "source", place)
    extra = {"docs/more/notes.txt": b"mine"}
    for directory in (place / "docs" / "more", place / "docs", place):
        directory.chmod(0o555)

    def without_rights() -> None:
        if os.getuid() == 0:
            os.setuid(65534)
        fastlock.relock_checkpoint(place, lock, place, in_place=True)
        assert contents(place) == locked | extra
        assert place.stat().st_mode & 0o777 == 0o555
        fastlock.unlock_checkpoint(place, place, in_place=True)
        # What a run leaves that is killed right after the exchange.
        left = Path(shutil.copytree(place, tmp_path / ".place.fastlock"))
        (left / "docs").chmod(0o555)
        fastlock.relock_checkpoint(place, lock, place, in_place=True)
        fastlock.unlock_checkpoint(place, place, in_place=True)

    if os.getuid() == 0:
        for path in (tmp_path, *tmp_path.rglob("*")):
            os.chown(path, 65534, 65534)
    assert finished(forked(without_rights)) == 0
    assert contents(place) == original | extra
    assert place.stat().st_mode & 0o777 == 0o555
    assert {path.name for path in tmp_path.iterdir()} == {"source", "locked", "place"}
    place.chmod(0o755)


def test_an_old_directory_that_cannot_be_removed(tmp_path, monkeypatch) -> None:
    lock, original, locked = prepared(tmp_path)
    place = Path(shutil.copytree(tmp_path / "source", tmp_path / "place"))

    def refuse(directory, *_, **__) -> None:
        raise PermissionError(1, "Operation not permitted", str(directory))

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", refuse)
        with pytest.warns(RuntimeWarning, match=r"place: is complete, .*permitted.*Remove .*/\.place\.fastlock, "):
            receipt = fastlock.relock_checkpoint(place, lock, place, in_place=True)
    assert receipt.lock_digest == lock.digest
    assert contents(place) == locked
    fastlock.unlock_checkpoint(place, place, in_place=True)
    assert contents(place) == original
    assert not (tmp_path / ".place.fastlock").exists()


@pytest.mark.parametrize("in_place", [False, True])
def test_a_directory_whose_parent_cannot_be_synced(in_place: bool, tmp_path, monkeypatch) -> None:
    """It is complete by then and stays. So does the one that it replaced: a power failure might undo the exchange."""
    lock, original, locked = prepared(tmp_path)
    place = Path(shutil.copytree(tmp_path / "source", tmp_path / "place"))
    out, parent, fsync = place if in_place else tmp_path / "out", tmp_path.stat(), os.fsync

    def refuse(fd: int) -> None:
        if os.path.samestat(os.fstat(fd), parent):
            raise OSError(5, "Input/output error")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.warns(RuntimeWarning) as caught:
        fastlock.relock_checkpoint(place, lock, out, in_place=in_place)
    (message,) = [str(warning.message) for warning in caught]
    assert message.startswith(f"{out}: is complete, but a step after that failed ([Errno 5] Input/output error).")
    assert (f"Remove {tmp_path / '.place.fastlock'}" in message) == in_place
    assert contents(out) == locked
    if in_place:
        assert contents(tmp_path / ".place.fastlock") == original


def test_another_directory_at_the_place_of_the_checkpoint(tmp_path) -> None:
    place = tmp_path / "place"
    place.mkdir()

    def work() -> None:
        with folders.create_directory(place, place, in_place=True) as new:
            new.write("file", b"new")
            place.rename(tmp_path / "moved")
            place.mkdir()
            (place / "mine").write_text("mine")

    with pytest.raises(fastlock.FastlockError, match="place: is not the directory that it was"):
        work()
    assert contents(place) == {"mine": b"mine"}
    assert {path.name for path in tmp_path.iterdir()} == {"place", "moved"}


def test_a_file_that_is_there_twice(tmp_path) -> None:
    (tmp_path / "source").mkdir()

    def work() -> None:
        with folders.create_directory(tmp_path / "out", tmp_path / "source", in_place=False) as new:
            new.write("twice", b"1")
            new.write("twice", b"2")

    with pytest.raises(fastlock.FastlockError, match=r"out: cannot be written .*File exists: .*twice") as raised:
        work()
    assert "already exists" not in str(raised.value)
    assert list(tmp_path.iterdir()) == [tmp_path / "source"]


def test_a_target_that_appears_meanwhile(tmp_path) -> None:
    (tmp_path / "source").mkdir()

    def work() -> None:
        with folders.create_directory(tmp_path / "out", tmp_path / "source", in_place=False) as new:
            new.write("file", b"1")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "other").touch()

    with pytest.raises(fastlock.FastlockError, match="out: already exists"):
        work()
    assert contents(tmp_path / "out") == {"other": b""}


@pytest.mark.parametrize("copy", [False, True], ids=["linked", "copied"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # gpt2's own biases are patched
def test_permissions_are_kept(kind: str, copy: bool, tmp_path) -> None:
    check_permissions(kind, copy, tmp_path)


def test_permissions_are_kept_where_blocks_are_shared(tmp_path, shared_blocks) -> None:
    check_permissions("gpt2", False, tmp_path)


def check_permissions(kind: str, copy: bool, tmp_path) -> None:
    model = tiny_model(kind, torch.bfloat16)
    source, out, back = tmp_path / "source", tmp_path / "out", tmp_path / "back"
    model.save_pretrained(source)
    (source / "README.md").write_text("hello\n")
    (source / "own" / "notes.txt").parent.mkdir()
    (source / "own" / "notes.txt").write_text("mine")
    (source / "own").chmod(0o700)
    wanted = dict.fromkeys(contents(source), 0o400) | {"own/notes.txt": 0o640, "config.json": 0o600}
    for name, mode in wanted.items():
        (source / name).chmod(mode)
    fastlock.relock_checkpoint(source, random_lock(model), out, copy=copy)
    found = modes(out)
    assert set(found.values()) == {0o400, 0o600, 0o640}
    assert {name: found[name] for name in ("config.json", "README.md", "own/notes.txt")} == {
        "config.json": 0o600, "README.md": 0o400, "own/notes.txt": 0o640
    }  # fmt: skip
    new = {"model-fastlock.safetensors", "model.safetensors.index.json"} & set(found)
    assert (out / "own").stat().st_mode & 0o777 == 0o700
    assert len(new) == (2 if kind == "llama" else 1)
    assert all(found[name] == 0o600 for name in new)
    fastlock.unlock_checkpoint(out, back)
    assert modes(back) == wanted
    assert contents(back) == contents(source)


@pytest.mark.parametrize("copy", [False, True], ids=["linked", "copied"])
def test_permissions_of_directories_that_are_set_aside(copy: bool, tmp_path) -> None:
    """Nobody else can read them there, nor when they are back."""
    model = tiny_model("llama", torch.bfloat16)
    source, out, back = tmp_path / "source", tmp_path / "out", tmp_path / "back"
    model.save_pretrained(source)
    (source / "checkpoint-5" / "deep").mkdir(parents=True)
    for name in ("checkpoint-5/pytorch_model.bin", "checkpoint-5/deep/pytorch_model.bin"):
        (source / name).write_text("weights")
    modes_of = {"checkpoint-5": 0o700, "checkpoint-5/deep": 0o750}
    for name, mode in modes_of.items():
        (source / name).chmod(mode)
    fastlock.relock_checkpoint(source, random_lock(model), out, copy=copy)
    fastlock.unlock_checkpoint(out, back)
    for directory in (out / "fastlock" / "original", back):
        assert {name: (directory / name).stat().st_mode & 0o777 for name in modes_of} == modes_of
    assert (out / "fastlock" / "original").stat().st_mode & 0o777 == (out / "fastlock").stat().st_mode & 0o777


def test_permissions_of_what_transformers_saved(tmp_path) -> None:
    model = tiny_model("llama", torch.bfloat16)
    lock = random_lock(model)
    fastlock.relock(model, lock, 2.0)
    model.save_pretrained(tmp_path / "saved")
    for path in (tmp_path / "saved").iterdir():
        path.chmod(0o600)
    fastlock.unlock_checkpoint(tmp_path / "saved", tmp_path / "out")
    assert set(modes(tmp_path / "out").values()) == {0o600}


def test_shared_blocks_are_synced(tmp_path, monkeypatch, shared_blocks) -> None:
    source, synced, fsync = tmp_path / "source", set(), os.fsync
    source.mkdir()
    (source / "file").write_bytes(b"1")

    def noted(fd: int) -> None:
        synced.add(os.fstat(fd).st_ino)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noted)
    with folders.create_directory(tmp_path / "out", source, in_place=False) as new:
        new.link("file", local.LocalFile(source / "file"))
        assert (new.path / "file").stat().st_ino in synced
    assert (tmp_path / "out" / "file").stat().st_ino != (source / "file").stat().st_ino


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file:///tmp/x", "/tmp/x"),
        ("file:///tmp/x/", "/tmp/x"),
        ("file://localhost/tmp/x", "/tmp/x"),
        ("file://LOCALHOST/tmp/x", "/tmp/x"),
        ("FILE:///tmp/x", "/tmp/x"),
        ("file:///tmp/a%20b%25c", "/tmp/a b%c"),
        ("file:///tmp/%C3%A9", "/tmp/é"),
        ("file:///tmp/a b#c?d", "/tmp/a b#c?d"),
    ],
)
def test_urls_of_files(url: str, path: str) -> None:
    assert as_place(url) == Path(path)


@pytest.mark.parametrize("url", ["file://server/tmp/x", "file://tmp/x", "file://localhost", "file://"])
def test_urls_of_files_elsewhere(url: str) -> None:
    with pytest.raises(fastlock.FastlockError, match=f"^{re.escape(url)}: .*file:///"):
        as_place(url)
