"""Finding the checkpoints of a zoo, and the files that they share."""

import os
from pathlib import Path

import pytest

import fastlock
from fastlock.zoo import find
from fastlock.zoo.find import Source, check_names, find_sources, shared_files

REVISIONS = ("0123456789abcdef", "fedcba9876543210")


def empty_checkpoint(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    return directory


def names(*sources, out=None) -> list[str]:
    return [source.name for source in find_sources(sources, out)]


def test_what_each_kind_of_source_stands_for(tmp_path, monkeypatch) -> None:
    for name in ("runs/a/final", "runs/b", "runs/b/step-1", "runs/.hidden", "alone"):
        empty_checkpoint(tmp_path / name)
    assert names(tmp_path / "alone") == ["alone"]
    assert names(tmp_path / "runs") == ["a/final", "b"]
    assert names(tmp_path / "runs" / "*") == ["b", "final"]
    assert names(tmp_path / "**" / "fin?l") == ["final"]
    assert names(tmp_path) == ["alone", "runs/a/final", "runs/b"]
    (tmp_path / "list.txt").write_text("# two of them\nalone\n\n  runs/*/final  \n")
    assert names(tmp_path / "list.txt", tmp_path / "runs" / "b") == ["alone", "b", "final"]
    monkeypatch.chdir(tmp_path / "alone")
    assert names(".") == ["alone"]
    assert find_sources(["."])[0].directory == str(tmp_path / "alone")


def test_a_hugging_face_cache(tmp_path) -> None:
    for model, revisions in {"org--one": REVISIONS[:1], "org--main": REVISIONS, "org--two": REVISIONS}.items():
        for revision in revisions:
            empty_checkpoint(tmp_path / "hub" / f"models--{model}" / "snapshots" / revision)
    refs = tmp_path / "hub" / "models--org--main" / "refs"
    refs.mkdir()
    (refs / "main").write_text(REVISIONS[1])
    (tmp_path / "hub" / "datasets--org--x" / "snapshots" / "1").mkdir(parents=True)
    (tmp_path / "hub" / "models--org--none" / "snapshots" / "1").mkdir(parents=True)
    found = find_sources([tmp_path])
    assert [source.name for source in found] == [
        "org--main",
        "org--one",
        "org--two@01234567",
        "org--two@fedcba98",
    ]
    assert found[0].directory.endswith(REVISIONS[1])
    assert names(tmp_path / "hub" / "models--org--main") == ["org--main"]
    assert names(tmp_path / "hub" / "models--*") == [source.name for source in found]


@pytest.mark.parametrize("pattern", ["zoo", "zoo/**/m"])
def test_links(pattern: str, tmp_path) -> None:
    """Loops end, other ways to the same directory count for nothing, and a link to a checkpoint is a checkpoint."""
    empty_checkpoint(tmp_path / "zoo" / "x" / "m")
    for name in ("loop", "x/loop", "x/self"):
        (tmp_path / "zoo" / name).symlink_to(tmp_path / "zoo" if "loop" in name else "self")
    (tmp_path / "zoo" / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "zoo" / "again").symlink_to(tmp_path / "zoo" / "x")
    assert names(tmp_path / pattern) == (["x/m"] if pattern == "zoo" else ["m"])
    (tmp_path / "zoo" / "latest").symlink_to(tmp_path / "zoo" / "x" / "m")
    assert names(tmp_path / "zoo") == ["latest", "x/m"]


def test_the_directory_of_the_results_is_no_source(tmp_path) -> None:
    for name in ("a", "out/b"):
        empty_checkpoint(tmp_path / name)
    assert names(tmp_path, out=tmp_path / "out") == ["a"]
    assert names(tmp_path / "*", out=tmp_path / "out") == ["a"]


def test_the_same_checkpoint_given_twice_is_one(tmp_path) -> None:
    empty_checkpoint(tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path)
    assert names(tmp_path, tmp_path / "a", tmp_path / "*", tmp_path / "link" / "a") == ["a"]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["nothing"], "nothing: does not exist"),
        (["no*"], "does not exist"),
        (["empty"], "no checkpoint is in it"),
        (["file.bin"], "no checkpoint is in it"),
        (["nested.txt"], "line 2: file.txt is itself a list"),
        (["binary.txt"], "binary.txt: is not a list of checkpoints"),
        (["wrong.txt"], "missing: does not exist"),
        (["nowhere://bucket/zoo"], "nowhere://bucket/zoo: cannot be reached"),
        (["a\0b"], "a.b"),
        ([], "there is nowhere to search"),
        ([None], "is not a path"),
    ],
)
def test_sources_that_stand_for_nothing(sources: list, message: str, tmp_path, monkeypatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.bin").write_bytes(b"")
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "nested.txt").write_text("\nfile.txt")
    (tmp_path / "wrong.txt").write_text("missing")
    (tmp_path / "binary.txt").write_bytes(b"\xff\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(fastlock.FastlockError, match=message):
        find_sources(sources)


def test_which_files_are_shared(tmp_path, monkeypatch) -> None:
    for name in "abcd":
        empty_checkpoint(tmp_path / name)
    (tmp_path / "a" / "1.safetensors").write_text("x")
    (tmp_path / "a" / "own.safetensors").write_text("x")
    (tmp_path / "a" / "shared.json").write_text("x")
    os.link(tmp_path / "a" / "shared.json", tmp_path / "b" / "shared.json")
    os.link(tmp_path / "a" / "1.safetensors", tmp_path / "b" / "1.safetensors")
    (tmp_path / "c" / "2.safetensors").symlink_to(tmp_path / "b" / "1.safetensors")
    (tmp_path / "d" / "1.safetensors").symlink_to(tmp_path / "nowhere")
    os.link(tmp_path / "a" / "own.safetensors", tmp_path / "linked elsewhere")
    (tmp_path / "e").symlink_to(tmp_path / "b")
    a, b, c, _, e = shared_files(find_sources([tmp_path]))
    status = (tmp_path / "a" / "1.safetensors").stat()
    assert a == b == c == e == [(status.st_dev, status.st_ino)]
    monkeypatch.setattr(os, "stat", None)  # what cannot be shared is not even opened
    assert find._linked_files(str(tmp_path / "d"), False) == set()


def test_a_checkpoint_that_is_linked_as_a_whole(tmp_path) -> None:
    empty_checkpoint(tmp_path / "a")
    (tmp_path / "a" / "1.safetensors").write_text("x")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    one, two = shared_files(find_sources([tmp_path]))
    assert one == two
    assert len(one) == 1


def test_a_checkpoint_without_a_name_is_refused() -> None:
    with pytest.raises(
        fastlock.FastlockError, match=r"s3://bucket: has no name\. Move the checkpoint into a directory"
    ):
        check_names([Source("s3://bucket", "")])
