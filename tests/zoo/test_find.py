"""Finding the checkpoints of a zoo, and the files that they share."""

import os
from pathlib import Path

import pytest

import fastlock
from fastlock.zoo import find
from fastlock.zoo.find import ADAPTER, CHECKPOINT, GGUF, Source, check_names, find_sources, shared_files

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
    assert find_sources(["."])[0].place == str(tmp_path / "alone")


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
    assert found[0].place.endswith(REVISIONS[1])
    assert names(tmp_path / "hub" / "models--org--main") == ["org--main"]
    assert names(tmp_path / "hub" / "models--*") == [source.name for source in found]


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def test_gguf_files(tmp_path) -> None:
    """Of a split model the first part, or where that is missing, each: whoever reads it says what is missing."""
    zoo = tmp_path / "zoo"
    parts = [f"b/big-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    touch(*(zoo / name for name in ("a.gguf", "b/B.GGUF", *parts, "b/.hidden.gguf", "b/.cache/c.gguf", "b/readme.md")))
    touch(zoo / "b" / "lone-00002-of-00003.gguf", zoo / "b" / "lone-00003-of-00003.gguf")
    (zoo / "b" / "link.gguf").symlink_to(tmp_path / "nowhere")
    of_b = ["B.GGUF", "big-00001-of-00003.gguf", "link.gguf", *(f"lone-0000{i}-of-00003.gguf" for i in (2, 3))]
    assert names(zoo) == ["a.gguf", *(f"b/{name}" for name in of_b)]
    assert {source.kind for source in find_sources([zoo])} == {GGUF}
    assert names(zoo / "b" / "*.*") == of_b
    assert names(*(zoo / part for part in parts), zoo / "b" / "*-00003-of-*") == [of_b[1], of_b[4]]
    assert find_sources([zoo / parts[2]]) == [Source(str(zoo / parts[0]), of_b[1], GGUF)]
    assert names(zoo, out=zoo / "b") == ["a.gguf"]
    url = zoo.as_uri().replace("file://", "local://")
    (zoo / "b" / "link.gguf").unlink()  # a link to nothing is nothing to fsspec
    assert names(url) == names(zoo)
    assert find_sources([f"{url}/a.gguf"])[0].kind == GGUF


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["m.gguf", "config.json"], {"z/m.gguf": GGUF}),
        (["m.gguf", "config.json", "model.safetensors", "sub/n.gguf"], {"z": CHECKPOINT}),
        (["m.gguf", "config.json", "pytorch_model.bin"], {"z": CHECKPOINT}),
        (["m.gguf", "adapter_config.json", "adapter_model.safetensors"], {"z": ADAPTER}),
        (["m.gguf", "sub/config.json", "sub/n.gguf"], {"z/m.gguf": GGUF, "z/sub/n.gguf": GGUF}),
        (["sub/config.json", "sub/model.safetensors", "m.gguf"], {"z/m.gguf": GGUF, "z/sub": CHECKPOINT}),
    ],
)
def test_what_a_gguf_lies_beside(files: list[str], found: dict[str, str], tmp_path) -> None:
    touch(*(tmp_path / "zoo" / "z" / name for name in files))
    url = (tmp_path / "zoo").as_uri().replace("file://", "local://")
    for place in (tmp_path / "zoo", url):
        assert {source.name: source.kind for source in find_sources([place])} == found
    for place in (tmp_path / "zoo" / "z", f"{url}/z"):
        shorter = {name.removeprefix("z/"): kind for name, kind in found.items()}
        assert {source.name: source.kind for source in find_sources([place])} == shorter


def test_gguf_files_in_a_hugging_face_cache(tmp_path) -> None:
    files = ("config.json", "m-Q4_0.gguf", "BF16/m-00001-of-00002.gguf", "BF16/m-00002-of-00002.gguf")
    snapshots = tmp_path / "models--org--one" / "snapshots"
    touch(*(snapshots / REVISIONS[0] / name for name in files), snapshots / "file")
    found = ["org--one/BF16/m-00001-of-00002.gguf", "org--one/m-Q4_0.gguf"]
    assert names(tmp_path) == found
    touch(
        snapshots / REVISIONS[1] / "n.gguf", tmp_path / "models--org--two" / "snapshots" / "1" / "unet" / "config.json"
    )
    assert names(tmp_path) == [
        *(name.replace("one", f"one@{REVISIONS[0][:8]}") for name in found),
        "org--one@fedcba98/n.gguf",
    ]


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
