"""A zoo relocked and verified: sharing folds, going on after a stop, logs, and what is refused."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest

import fastlock
from fastlock.zoo import run as zoo
from fastlock.zoo import tasks
from tests.helpers.families import random_lock, tiny_model


def statuses(summary: zoo.Summary) -> dict[str, str]:
    return {result.name: result.status for result in summary.results}


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def recording(job: tasks.Job, task: tasks.Task) -> tasks.Done:
    """`relock_one`, noting beside `out` how many folds it was given and how many it made."""
    original = tasks.relock_checkpoint

    def recorded(source, lock, out, strength, *, folds, **keywords):
        given = len(folds)
        receipt = original(source, lock, out, strength, folds=folds, **keywords)
        with (Path(out).parent.parent / "folds.jsonl").open("a") as file:
            file.write(json.dumps([task.name, given, len(folds) - given]) + "\n")
        return receipt

    tasks.relock_checkpoint = recorded
    try:
        return tasks.relock_one(job, task)
    finally:
        tasks.relock_checkpoint = original


def test_linked_checkpoints_fold_once(tunes, lock, tmp_path, monkeypatch) -> None:
    """a, c and e have one file of weights, b and d another; f has its own. a was done before."""
    for name, other in {"c": "a", "e": "a", "d": "b"}.items():
        weights = tunes / name / "model.safetensors"
        weights.unlink()
        if name == "e":
            weights.symlink_to(tunes / other / "model.safetensors")
        else:
            os.link(tunes / other / "model.safetensors", weights)
    zoo.relock_zoo([tunes / "a"], lock, tmp_path / "out", workers=1)
    monkeypatch.setattr(zoo, "relock_one", recording)
    summary = zoo.relock_zoo([tunes], lock, tmp_path / "out", workers=2)
    assert statuses(summary) == {"a": "done already"} | dict.fromkeys("bcdef", "relocked")
    lines = [json.loads(line) for line in (tmp_path / "folds.jsonl").read_text().splitlines()]
    assert sorted(lines) == [["b", 0, 2], ["c", 0, 2], ["d", 2, 0], ["e", 2, 0], ["f", 0, 2]]
    assert zoo.verify_zoo([tmp_path / "out"], lock, workers=2)


def test_a_zoo_with_all_that_can_be_wrong(tunes, made, lock, tmp_path) -> None:
    """What is right is relocked as `relock_checkpoint` does it; the rest is reported, and stops nothing."""
    (tunes / "b" / "model.safetensors").write_bytes(b"\xff" * 100)
    (tunes / "c" / "config.json").write_text("{")
    (tunes / "d" / "model.safetensors").unlink()
    shutil.copytree(made / "other", tunes / "x" / "y")
    seen = []
    summary = zoo.relock_zoo(
        [tunes],
        lock,
        tmp_path / "out",
        2.0,
        base=made / "tune1",
        workers=2,
        on_result=lambda result, total: seen.append((result, total)),
    )
    right = ("a", "e", "f")
    expected = dict.fromkeys(right, "relocked") | dict.fromkeys("bcd", "failed") | {"x/y": "skipped"}
    assert statuses(summary) == expected
    assert not summary
    assert {result.name for result in summary.wrong} == set("bcd")
    assert all(str(tunes / result.name) in result.error for result in summary.wrong)
    assert seen == [(result, 7) for result in summary.results]
    reasons = {result.name: result.error for result in summary.results}
    assert reasons["x/y"] == "model_type is gpt2, not llama"
    for name in right:
        assert reasons[name] == ""
        fastlock.relock_checkpoint(tunes / name, lock, tmp_path / "alone" / name, 2.0)
        assert contents(tmp_path / "out" / name) == contents(tmp_path / "alone" / name)
    lines = [json.loads(line) for line in summary.log.read_text().splitlines()]
    assert {line["name"]: line["status"] for line in lines} == expected
    assert lines == [result.to_dict() for result in summary.results]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*right, summary.log.name, summary.report.name}


def test_verify_says_what_is_not_locked(tunes, lock, tmp_path) -> None:
    zoo.relock_zoo([tunes / "a", tunes / "b"], lock, tmp_path / "out", workers=2)
    assert zoo.verify_zoo([tmp_path / "out"], lock, workers=2).counts == {"locked": 2}
    (tunes / "c" / "config.json").write_text("[]")
    summary = zoo.verify_zoo([tmp_path / "out", tunes / "c", tunes / "d"], lock, workers=2)
    assert statuses(summary) == {"a": "locked", "b": "locked", "c": "failed", "d": "not locked"}
    assert not summary
    assert all(result.error for result in summary.wrong)


def test_another_geometry_is_skipped(tunes, made, lock, tmp_path) -> None:
    tiny_model("llama", num_hidden_layers=2).save_pretrained(tunes / "g")
    base = tmp_path / "base.json"
    shutil.copy(made / "tune1" / "config.json", base)
    summary = zoo.relock_zoo([tunes / "a", tunes / "g"], lock, tmp_path / "out", base=base, workers=1)
    assert statuses(summary) == {"a": "relocked", "g": "skipped"}
    assert summary
    assert summary.results[1].error == "num_hidden_layers is 2, not 3"
    for text in ("{}", "{", "[]", '{"model_type": "no such"}'):
        base.write_text(text)
        with pytest.raises(fastlock.FastlockError, match=r"base\.json"):
            zoo.relock_zoo([tunes / "a"], lock, tmp_path / "more", base=base)


def test_again(tunes, lock, tmp_path) -> None:
    """Run again it does what is left, and takes nothing else for done."""
    out = tmp_path / "out"
    zoo.relock_zoo([tunes], lock, out, workers=2)
    shutil.rmtree(out / "b")
    shutil.rmtree(out / "c")
    shutil.copytree(tunes / "c", out / "c")
    shutil.rmtree(out / "d")
    (out / "d").mkdir()
    with (out / "fastlock-zoo.jsonl").open("a") as log:
        log.write('{"half')
    before = contents(out / "a")
    summary = zoo.relock_zoo([tunes], lock, out, workers=2)
    expected = dict.fromkeys("aef", "done already") | {"b": "relocked", "c": "failed", "d": "failed"}
    assert statuses(summary) == expected
    assert all(str(out / result.name) in result.error for result in summary.wrong)
    assert contents(out / "a") == before
    lines = summary.log.read_text().splitlines()
    assert lines[6] == '{"half'
    assert [json.loads(line)["name"] for line in lines[7:]] == [result.name for result in summary.results]
    stronger = zoo.relock_zoo([tunes / "a"], lock, out, 7.0, workers=1)
    assert "strength 6" in stronger.wrong[0].error
    other = zoo.relock_zoo([tunes / "a"], dataclasses.replace(lock, scales=lock.scales * 2), out, workers=1)
    assert "another lock" in other.wrong[0].error


def test_ranks_divide_the_zoo(tunes, lock, tmp_path) -> None:
    done = [
        statuses(zoo.relock_zoo([tunes], lock, tmp_path / "out", workers=1, rank=rank, world_size=4))
        for rank in range(4)
    ]
    assert [sorted(part) for part in done] == [["a", "e"], ["b", "f"], ["c"], ["d"]]
    assert all(status == "relocked" for part in done for status in part.values())
    assert len((tmp_path / "out" / "fastlock-zoo.1.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "out" / "fastlock-zoo.3.html").exists()
    assert len(zoo.verify_zoo([tunes], lock, rank=9, world_size=10).results) == 0
    for rank, world_size in [(1, None), (None, 2), (2, 2), (-1, 2)]:
        with pytest.raises(fastlock.FastlockError, match="rank"):
            zoo.relock_zoo([tunes], lock, tmp_path / "no", rank=rank, world_size=world_size)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("strength", -1, "negative strength"),
        ("workers", 0, "workers is 0; it must be an integer of at least 1."),
        ("lock", "x", "lock is a str"),
        ("out", None, "None is not a path"),
        ("stacks", ["x"], "stacks"),
        ("stacks", "vllm", "stacks"),
        ("sources", [], "nowhere to search"),
    ],
)
def test_wrong_arguments_begin_nothing(name: str, value: object, message: str, tunes, lock, tmp_path) -> None:
    arguments = {"sources": [tunes], "lock": lock, "out": tmp_path / "out", "workers": 1, name: value}
    with pytest.raises(fastlock.FastlockError, match=message):
        zoo.relock_zoo(**arguments)
    assert not (tmp_path / "out").exists()


def test_results_do_not_go_into_a_source_or_a_checkpoint(tunes, made, lock, tmp_path) -> None:
    shutil.copytree(made / "other", tmp_path / "other")
    before = contents(tmp_path)
    for out in (tmp_path / "other", tunes / "a"):
        for sources in ([tunes], [tunes / "a"], [tunes / "a", tunes / "b"]):
            with pytest.raises(fastlock.FastlockError, match=f"{out}: is a checkpoint itself.*--out"):
                zoo.relock_zoo(sources, lock, out, workers=1)
    (tmp_path / "link").symlink_to(tunes)
    for sources, out in (([tunes], tunes), ([tunes / "a", tmp_path / "link"], tunes), ([tunes], tmp_path / "link")):
        with pytest.raises(fastlock.FastlockError, match=f"{sources[-1]}: is --out itself, which is never searched"):
            zoo.relock_zoo(sources, lock, out, workers=1)
    (tmp_path / "link").unlink()
    assert contents(tmp_path) == before
    assert zoo.relock_zoo([tunes], lock, tunes / "relocked", workers=1).counts == {"relocked": 6}


def test_a_place_that_cannot_be_written(tunes, lock, tmp_path, monkeypatch) -> None:
    """It is known once there are workers, which are not left behind."""
    pools = []
    open_pool = zoo._pool
    monkeypatch.setattr(zoo, "_pool", lambda *arguments: pools.append(open_pool(*arguments)) or pools[-1])
    (tmp_path / "file").write_text("x")
    with pytest.raises(fastlock.FastlockError, match="cannot be written"):
        zoo.relock_zoo([tunes], lock, tmp_path / "file" / "out", workers=1)
    assert not pools[0]._pool.active


def test_names_that_cannot_stand_side_by_side(tmp_path, lock) -> None:
    for name in ("one/a", "two/a", "three/a/b"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    one, two, three = f"{tmp_path}/one/a", f"{tmp_path}/two/a", f"{tmp_path}/three/a/b"
    for other, message in {
        "two": f"{one} and {two}: both would be named a. Rename one",
        "three": f"{three}: would be named a/b, which is inside a, the name of {one}.",
    }.items():
        with pytest.raises(fastlock.FastlockError, match=message):
            zoo.relock_zoo([tmp_path / "one", tmp_path / other], lock, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_done_already_but_not_for_this_stack(tmp_path) -> None:
    model = tiny_model("granite")
    model.save_pretrained(tmp_path / "zoo" / "a")
    lock = random_lock(model)
    first = zoo.relock_zoo([tmp_path / "zoo"], lock, tmp_path / "out", workers=1)
    again = zoo.relock_zoo([tmp_path / "zoo"], lock, tmp_path / "out", workers=1, stacks=["sglang"])
    assert first
    assert not again
    assert "in a form that sglang would drop" in again.wrong[0].error
