"""Workers that die, and runs that are stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fastlock
from fastlock.cli.commands import STOPPED
from fastlock.zoo import pools, tasks
from fastlock.zoo import run as zoo
from tests.zoo.test_run import statuses


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
    monkeypatch.setattr(pools, "_start_worker", failing_start)
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
        "from fastlock.cli.main import main; from fastlock.zoo import run; from tests.zoo import test_pools; "
        "run.relock_one = test_pools.slow; main()"
    )
    arguments = ["zoo", "relock", str(tunes), "--lock", str(lock), "--out", str(out), "--workers", "2"]
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
    assert process.returncode == STOPPED
    assert "run the same command again to resume" in printed
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
    assert process.returncode == STOPPED
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
