"""Many checkpoints at once: finding them, sharing folds, workers that die, stops and new starts, logs and reports."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fastlock
from fastlock.cli import zoo as zoo_cli
from fastlock.zoo import find as zoo_find
from fastlock.zoo import pools as zoo_workers
from fastlock.zoo import report as zoo_report
from fastlock.zoo import run as zoo
from fastlock.zoo import schedule, tasks
from fastlock.zoo.find import Source, find_checkpoints, shared_files
from tests.helpers.families import random_lock, tiny_model

REVISIONS = ("0123456789abcdef", "fedcba9876543210")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two tiny checkpoints with different weights, one of another family, and a lock."""
    folder = tmp_path_factory.mktemp("made")
    for seed in (1, 2):
        tiny_model("llama", seed=seed).save_pretrained(folder / f"tune{seed}")
    tiny_model("gpt2").save_pretrained(folder / "other")
    random_lock(tiny_model("llama")).save(folder / "lock.safetensors")
    return folder


@pytest.fixture
def lock(made):
    return fastlock.Lock.load(made / "lock.safetensors")


@pytest.fixture
def tunes(made, tmp_path):
    """A directory of six checkpoints, a to f."""
    for number, name in enumerate("abcdef"):
        shutil.copytree(made / f"tune{1 + number % 2}", tmp_path / "zoo" / name)
    return tmp_path / "zoo"


def empty_checkpoint(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    return directory


def names(*sources, out=None) -> list[str]:
    return [checkpoint.name for checkpoint in find_checkpoints(sources, out)]


def statuses(summary: zoo.Summary) -> dict[str, str]:
    return {result.name: result.status for result in summary.results}


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# Finding


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
    assert find_checkpoints(["."])[0].source == str(tmp_path / "alone")


def test_a_hugging_face_cache(tmp_path) -> None:
    for model, revisions in {"org--one": REVISIONS[:1], "org--main": REVISIONS, "org--two": REVISIONS}.items():
        for revision in revisions:
            empty_checkpoint(tmp_path / "hub" / f"models--{model}" / "snapshots" / revision)
    refs = tmp_path / "hub" / "models--org--main" / "refs"
    refs.mkdir()
    (refs / "main").write_text(REVISIONS[1])
    (tmp_path / "hub" / "datasets--org--x" / "snapshots" / "1").mkdir(parents=True)
    (tmp_path / "hub" / "models--org--none" / "snapshots" / "1").mkdir(parents=True)
    found = find_checkpoints([tmp_path])
    assert [checkpoint.name for checkpoint in found] == [
        "org--main",
        "org--one",
        "org--two@01234567",
        "org--two@fedcba98",
    ]
    assert found[0].source.endswith(REVISIONS[1])
    assert names(tmp_path / "hub" / "models--org--main") == ["org--main"]
    assert names(tmp_path / "hub" / "models--*") == [checkpoint.name for checkpoint in found]


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
        (["nested.txt"], "line 2: file.txt is a list itself"),
        (["binary.txt"], "binary.txt: no list"),
        (["wrong.txt"], "missing: does not exist"),
        (["nowhere://bucket/zoo"], "nowhere://bucket/zoo: cannot be reached"),
        (["a\0b"], "a.b"),
        ([], "no sources"),
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
        find_checkpoints(sources)


def test_names_that_cannot_stand_side_by_side(tmp_path, lock) -> None:
    for name in ("one/a", "two/a", "three/a/b"):
        empty_checkpoint(tmp_path / name)
    for other in ("two", "three"):
        with pytest.raises(fastlock.FastlockError, match=f"{tmp_path}/{other}/a"):
            zoo.relock_zoo([tmp_path / "one", tmp_path / other], lock, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Sharing


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
    a, b, c, _, e = shared_files(find_checkpoints([tmp_path]))
    status = (tmp_path / "a" / "1.safetensors").stat()
    assert a == b == c == e == [(status.st_dev, status.st_ino)]
    monkeypatch.setattr(os, "stat", None)  # what can't be shared is not even opened
    assert zoo_find._linked_files(str(tmp_path / "d"), False) == set()


def test_a_checkpoint_that_is_linked_as_a_whole(tmp_path) -> None:
    empty_checkpoint(tmp_path / "a")
    (tmp_path / "a" / "1.safetensors").write_text("x")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    one, two = shared_files(find_checkpoints([tmp_path]))
    assert one == two
    assert len(one) == 1


@pytest.mark.parametrize("seed", range(30))
def test_the_plan_folds_each_shared_file_once(seed: int) -> None:
    """Random files, failures and orders of finishing: all end, and nothing that is known is folded again."""
    chance = random.Random(seed)
    count, kinds = 40, 12
    files = [sorted({(0, chance.randrange(kinds)) for _ in range(chance.randrange(4))}) for _ in range(count)]
    plan = schedule.Schedule([Source(f"/{i}", str(i)) for i in range(count)], files)
    running, done, known = [], [], {}
    while len(done) < count:
        while len(running) < 5 and (task := plan.next_task()) is not None:
            running.append(task)
        task = running.pop(chance.randrange(len(running)))
        given = {tuple(file) for folds in task.folds for file in json.loads(folds)}
        assert all(file in given for file in files[task.index] if file in known)
        missing = [file for file in files[task.index] if file not in given]
        assert task.returns_folds == bool(missing)
        fails = chance.random() < 0.2
        if not fails:
            known.update(dict.fromkeys(missing))
        plan.finished(task.index, None if fails or not missing else json.dumps(missing).encode())
        done.append(task.index)
    assert sorted(done) == list(range(count))
    assert plan.next_task() is None
    assert not plan._folds


def recording(job: tasks.Job, task: tasks.Task) -> tasks.Done:
    """`relock_one`, noting beside `out` how many folds it was given and how many it made."""
    original = zoo_workers.relock_checkpoint

    def recorded(source, lock, out, strength, *, folds, **keywords):
        given = len(folds)
        receipt = original(source, lock, out, strength, folds=folds, **keywords)
        with (Path(out).parent.parent / "folds.jsonl").open("a") as file:
            file.write(json.dumps([task.name, given, len(folds) - given]) + "\n")
        return receipt

    zoo_workers.relock_checkpoint = recorded
    try:
        return tasks.relock_one(job, task)
    finally:
        zoo_workers.relock_checkpoint = original


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


# Relocking and verifying


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
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {*right, "x", summary.log.name, summary.report.name}


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
    ("name", "value"), [("strength", -1), ("workers", 0), ("lock", "x"), ("out", None), ("stacks", ["x"])]
)
def test_wrong_arguments_begin_nothing(name: str, value: object, tunes, lock, tmp_path) -> None:
    arguments = {"sources": [tunes], "lock": lock, "out": tmp_path / "out", "workers": 1, name: value}
    with pytest.raises(fastlock.FastlockError):
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


def test_a_place_that_cannot_be_written(tunes, lock, tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(fastlock.FastlockError, match="can't be written"):
        zoo.relock_zoo([tunes], lock, tmp_path / "file" / "out", workers=1)


# Workers that die, and stops


def dying(job: tasks.Job, task: tasks.Task) -> tasks.Done:
    """`relock_one` in a worker that is killed at checkpoints with a marker: "once", or always."""
    marker = Path(task.source, "die")
    if marker.exists():
        if marker.read_text() == "once":
            marker.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return tasks.relock_one(job, task)


def test_a_worker_that_dies_takes_only_its_checkpoint_with_it(tunes, lock, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(zoo, "relock_one", dying)
    (tunes / "b" / "die").write_text("once")
    (tunes / "d" / "die").write_text("always")
    summary = zoo.relock_zoo([tunes], lock, tmp_path / "out", workers=2)
    assert statuses(summary) == dict.fromkeys("abcef", "relocked") | {"d": "failed"}
    assert "SIGKILL" in summary.wrong[0].error
    assert zoo.verify_zoo([tmp_path / "out"], lock)


def killing_all(job: tasks.Job, task: tasks.Task) -> tasks.Done:
    """`relock_one`, after the first of which all other workers are killed while they wait for work."""
    marker = Path(task.source, "die")
    if marker.exists():
        marker.unlink()
        for child in Path(f"/proc/{os.getppid()}/task/{os.getppid()}/children").read_text().split():
            if int(child) != os.getpid():
                os.kill(int(child), signal.SIGKILL)
        time.sleep(1)
    return tasks.relock_one(job, task)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_workers_that_die_idle_are_replaced(tunes, lock, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(zoo, "relock_one", killing_all)
    (tunes / "f" / "die").write_text("")
    summary = zoo.relock_zoo([tunes], lock, tmp_path / "out", workers=3)
    # A worker may be killed after its last checkpoint is there and before it has said so: that one is done already.
    assert statuses(summary).keys() == set("abcdef")
    assert set(statuses(summary).values()) <= {"relocked", "done already"}
    assert zoo.verify_zoo([tmp_path / "out"], lock)


def failing_start(job: tasks.Job, environment: dict[str, str]) -> None:
    os._exit(1)


def test_workers_that_cannot_start(tunes, lock, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(zoo_workers, "_start_worker", failing_start)
    with pytest.raises(fastlock.FastlockError, match="__main__"):
        zoo.relock_zoo([tunes], lock, tmp_path / "out", workers=1)


def broken(job: tasks.Job, task: tasks.Task) -> tasks.Done:
    raise ZeroDivisionError(task.name)


def test_a_fault_of_the_worker_itself(tunes, lock, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(zoo, "relock_one", broken)
    summary = zoo.relock_zoo([tunes / "a"], lock, tmp_path / "out", workers=1)
    assert summary.wrong[0].error == f"{tunes / 'a'}: ZeroDivisionError: a"


def slow(job: tasks.Job, task: tasks.Task) -> tasks.Done:
    """`relock_one`, which at checkpoint b waits with something half made, and cleans up."""
    if task.name == "b":
        half = Path(task.out).parent / ".half"
        half.write_text(str(os.getpid()))
        try:
            time.sleep(60)
        finally:
            half.unlink()
    return tasks.relock_one(job, task)


def begun(tunes: Path, lock: Path, out: Path) -> subprocess.Popen:
    """`fastlock zoo relock` with the slow worker, in a process group of its own."""
    code = (
        "from fastlock.cli import zoo as command; from fastlock.zoo import run; from tests.zoo import test_run; "
        "run.relock_one = test_run.slow; command.app()"
    )
    arguments = ["relock", str(tunes), "--lock", str(lock), "--out", str(out), "--workers", "2"]
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def command(tunes: Path, lock: Path, out: Path) -> subprocess.Popen:
    """The same, once it is at work on b."""
    process = begun(tunes, lock, out)
    log = out / "fastlock-zoo.jsonl"
    until(lambda: (out / ".half").exists() and log.exists() and len(log.read_text().splitlines()) == 5)
    return process


def until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_stopped_by_ctrl_c_and_begun_again(tunes, made, lock, tmp_path) -> None:
    out = tmp_path / "out"
    process = command(tunes, made / "lock.safetensors", out)
    os.killpg(process.pid, signal.SIGINT)
    _, printed = process.communicate(timeout=20)
    assert process.returncode == zoo_cli.STOPPED
    assert "run the same command again" in printed
    assert sorted(path.name for path in out.iterdir()) == [*"acdef", "fastlock-zoo.html", "fastlock-zoo.jsonl"]
    assert "Stopped early: 1 of 6" in (out / "fastlock-zoo.html").read_text()
    summary = zoo.relock_zoo([tunes], lock, out, workers=1)
    assert statuses(summary) == dict.fromkeys("acdef", "done already") | {"b": "relocked"}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_stopped_by_ctrl_c_while_it_starts(tunes, made, tmp_path) -> None:
    """While the process that workers are forked from imports what they need, which takes longer."""
    process = begun(tunes, made / "lock.safetensors", tmp_path / "out")

    def its_processes() -> list[str]:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return [Path(f"/proc/{child}/cmdline").read_text() for child in children]

    until(lambda: any("forkserver" in line for line in its_processes()))
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == zoo_cli.STOPPED
    assert "stopped after 0 checkpoints" in printed
    assert "Error" not in printed
    assert "Traceback" not in printed


def test_killed_and_begun_again(tunes, made, lock, tmp_path) -> None:
    out = tmp_path / "out"
    process = command(tunes, made / "lock.safetensors", out)
    worker = int((out / ".half").read_text())
    process.kill()
    process.wait()
    os.kill(worker, signal.SIGKILL)
    process.communicate(timeout=20)  # ends when the other workers have ended: they have its standard error
    (out / ".half").unlink()
    summary = zoo.relock_zoo([tunes], lock, out, workers=1)
    assert statuses(summary) == dict.fromkeys("acdef", "done already") | {"b": "relocked"}


# The command


@pytest.fixture
def run():
    def run(*arguments: object, code: int = 0):
        done = CliRunner().invoke(zoo_cli.app, [*map(str, arguments)])
        assert done.exit_code == code, (done.output, done.exception)
        return done

    return run


def test_the_command(tunes, made, tmp_path, run) -> None:
    lock, out = ["--lock", made / "lock.safetensors"], tmp_path / "out"
    done = run("relock", tunes / "[ab]", *lock, "--out", out, "--strength", "2", "--workers", "2")
    assert "2 relocked" in done.stdout
    assert "2/2" in done.stderr
    done = run("relock", tunes, *lock, "--out", out, "--strength", "2", "--workers", "2", "--json")
    assert json.loads(done.stdout)["counts"] == {"relocked": 4, "done already": 2}
    assert done.stderr == ""
    assert "6 locked" in run("verify", out, *lock).stdout
    (out / "a" / "config.json").write_text("{")
    (tunes / "b").rename(tunes / "\x1b[31m[red]b")
    done = run("verify", tunes / "*b", out / "*", *lock, code=1)
    assert "[red]b: not locked: " in done.stdout
    assert "\x1b" not in done.stdout
    assert "a: failed: " in done.stdout
    wrong = json.loads(run("verify", out, *lock, "--json", code=1).stdout)["wrong"]
    assert [result["name"] for result in wrong] == ["a"]
    assert "failed: " in run("relock", tunes / "a", *lock, "--out", out, code=1).stdout


def test_the_options_reach_the_function(tunes, made, tmp_path, run, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(zoo_cli, "relock_zoo", lambda *given, **keywords: asked.append(keywords) or zoo.Summary())
    given = ["relock", tunes, "--lock", made / "lock.safetensors", "--out", tmp_path / "out"]
    run(*given)
    run(*given, "--for", "vllm, a", "--for", "b", *"--copy --base x --ray auto --rank 1 --world-size 3".split())
    for keywords in asked:
        del keywords["on_result"]
    default = {"base": None, "workers": None, "ray": None, "rank": None, "world_size": None, "copy": False}
    assert asked[0] == {**default, "stacks": ["transformers", "vllm"]}
    stated = {"base": "x", "ray": "auto", "rank": 1, "world_size": 3, "copy": True}
    assert asked[1] == {**default, **stated, "stacks": ["vllm", "a", "b"]}
    for wrong in (["--rank", "1"], ["--world-size", "2"], ["--rank", "2", "--world-size", "2"], ["--workers", "0"]):
        run(*given, *wrong, code=2)


# The page


class Page(HTMLParser):
    """A page's text, and its tags and attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data):
        self.text += data


def page(results: list, total: int | None = None, seconds: float = 3.0, **facts: str) -> Page:
    return Page(zoo_report.report_page(results, len(results) if total is None else total, seconds, facts))


def result(name: str, status: str = "relocked", error: str = "", at: float = 0.0) -> tasks.Result:
    return tasks.Result(f"/zoo/{name}", name, f"/out/{name}", status, error, 0.5, 10, 2000, 1e9 + at)


def test_nothing_in_the_page_is_taken_for_markup() -> None:
    bad = '<script src="//x">"\'&lt;\x1b\udcff'
    plain = page([result("x", "failed", "x")], fact="x")
    shown = page([result(bad, "failed", bad)], **{bad: bad})
    assert shown.tags == plain.tags
    assert shown.attributes == plain.attributes
    assert shown.text.count(bad.replace("\x1b", "\\x1b").replace("\udcff", "\\udcff")) == 6
    assert not {"script", "link", "img", "iframe"} & set(shown.tags)
    assert not {"src", "href"} & set(shown.attributes)


def test_the_page_shows_failures_first_and_not_too_many_rows() -> None:
    results = [result(f"n{number}", at=number / 1000) for number in range(zoo_report.MAX_ROWS + 100)]
    shown = page([*results, result("zz", "failed", "because")])
    assert shown.text.index("because") < shown.text.index("n0")
    assert f"The first {zoo_report.MAX_ROWS:,} of {zoo_report.MAX_ROWS + 101:,}" in shown.text
    assert shown.tags.count("tr") == zoo_report.MAX_ROWS + 3
    assert "Stopped" not in shown.text
    assert "Stopped early: 1 of 3 " in page([result("a"), result("b")], 3).text
    assert "0 checkpoints" in page([]).text


@pytest.mark.parametrize("span", [0.0, 1.0, 5000.0, 500_000.0])
def test_the_throughput_adds_up(span: float) -> None:
    kinds = ["failed", *["relocked"] * 4] * 10
    results = [result(str(number), kind, at=span * number / 49) for number, kind in enumerate(kinds)]
    assert page(results, seconds=span + 1).tags.count("rect") >= 2
    titles = zoo_report._throughput(results).split("<title>")[1:]
    assert sum(int(title.split(": ")[1].split(" ")[0]) for title in titles) == 40
    assert sum(int(title.split(", ")[1].split(" ")[0]) for title in titles) == 10


def test_round_numbers() -> None:
    assert [zoo_report._round_up(value) for value in (0.03, 1.0, 1.1, 21, 499)] == [0.04, 1.0, 2.0, 40.0, 600.0]
    assert [zoo_report._bytes(value) for value in (0, 999, 1000, 12345678, 1e15)] == [
        "0 B",
        "999 B",
        "1 kB",
        "12.3 MB",
        "1,000 TB",
    ]
    assert [zoo_report._duration(value) for value in (0.5, 59.94, 61, 7322)] == [
        "0.5 s",
        "59.9 s",
        "1 min 1 s",
        "2 h 2 min",
    ]


def test_done_already_but_not_for_this_stack(tmp_path) -> None:
    model = tiny_model("granite")
    model.save_pretrained(tmp_path / "zoo" / "a")
    lock = random_lock(model)
    first = zoo.relock_zoo([tmp_path / "zoo"], lock, tmp_path / "out", workers=1)
    again = zoo.relock_zoo([tmp_path / "zoo"], lock, tmp_path / "out", workers=1, stacks=["sglang"])
    assert first
    assert not again
    assert "in a form that sglang would drop" in again.wrong[0].error
