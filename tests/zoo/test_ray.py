"""The same work on a Ray cluster of two nodes, with a worker killed in the middle."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fastlock
from fastlock.zoo import pools, tasks
from fastlock.zoo import run as zoo
from tests.helpers.families import random_lock, tiny_model


@pytest.fixture
def zoo_of(tmp_path):
    """A directory of eight checkpoints, and a lock that fits."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "zoo" / "0")
    for number in range(1, 8):
        shutil.copytree(tmp_path / "zoo" / "0", tmp_path / "zoo" / str(number))
    return tmp_path / "zoo", random_lock(model)


@pytest.fixture
def cluster(monkeypatch):
    """A Ray cluster of two nodes with one CPU each, whose workers find this module; its address."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    node = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        del node["include_dashboard"]
        cluster.add_node(**node)
        cluster.wait_for_nodes()
        yield cluster.address
    finally:
        ray.shutdown()
        cluster.shutdown()


def dying(job: tasks.Job, task: tasks.Task) -> tasks.Done:
    """`relock_one`, noting its node; killed at checkpoints with a marker: "once", or always."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    with (Path(task.out).parent.parent / "nodes.jsonl").open("a") as file:
        file.write(json.dumps([task.name, node]) + "\n")
    marker = Path(task.source, "die")
    if marker.exists():
        if marker.read_text() == "once":
            marker.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return tasks.relock_one(job, task)


def test_two_nodes_and_a_worker_killed_in_the_middle(zoo_of, cluster, tmp_path, monkeypatch) -> None:
    source, lock = zoo_of
    (source / "7" / "model.safetensors").unlink()
    os.link(source / "0" / "model.safetensors", source / "7" / "model.safetensors")
    (source / "2" / "die").write_text("once")
    (source / "4" / "die").write_text("always")
    (source / "5" / "config.json").write_text("{")
    monkeypatch.setattr(zoo, "relock_one", dying)
    seen = []
    summary = zoo.relock_zoo(
        [source], lock, tmp_path / "out", ray=cluster, on_result=lambda result, total: seen.append((result, total))
    )
    statuses = {result.name: result.status for result in summary.results}
    assert statuses == dict.fromkeys("012367", "relocked") | {"4": "failed", "5": "failed"}
    assert len(seen) == 8
    reasons = {result.name: result.error for result in summary.wrong}
    assert "WorkerCrashedError" in reasons["4"]
    assert str(source / "5") in reasons["5"]
    ran = [json.loads(line) for line in (tmp_path / "nodes.jsonl").read_text().splitlines()]
    assert len({node for _, node in ran}) == 2
    times = {name: [ran_name for ran_name, _ in ran].count(name) for name in statuses}
    assert times == dict.fromkeys("013567", 1) | {"2": 2, "4": 1 + pools.RAY_RETRIES}
    monkeypatch.setattr(zoo, "relock_one", tasks.relock_one)
    (source / "4" / "die").unlink()
    shutil.rmtree(source / "5")
    again = zoo.relock_zoo([source], lock, tmp_path / "out", ray=cluster, workers=2)
    assert again.counts == {"done already": 6, "relocked": 1}
    assert zoo.verify_zoo([tmp_path / "out"], lock, ray=cluster).counts == {"locked": 7}


def test_stopped_by_ctrl_c(zoo_of, cluster, tmp_path) -> None:
    source, lock = zoo_of
    for number in range(8, 200):
        shutil.copytree(source / "0", source / str(number))
    lock.save(tmp_path / "lock.safetensors")
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "fastlock",
        "zoo",
        "relock",
        str(source),
        "--lock",
        str(tmp_path / "lock.safetensors"),
    ]
    running = subprocess.Popen([*command, "--out", str(out), "--ray", cluster], stderr=subprocess.PIPE, text=True)
    log = out / "fastlock-zoo.jsonl"
    while running.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 130, said[-3000:]
    assert "run the same command again to resume" in said
    there = [path for path in out.iterdir() if path.is_dir()]
    assert 0 < len(there) < 200
    assert not [path.name for path in there if path.name.startswith(".")]  # those at work cleaned up
    assert zoo.verify_zoo(there, lock, ray=cluster).counts == {"locked": len(there)}
    again = zoo.relock_zoo([source], lock, out, ray=cluster)
    assert again.counts["relocked"] + again.counts["done already"] == 200
    assert again.counts["done already"] >= len(there)


def test_no_cluster_there(zoo_of, tmp_path, monkeypatch) -> None:
    ray = pytest.importorskip("ray")
    # Ray's "auto" joins any cluster of this machine, such as that of another test process.
    monkeypatch.setattr(ray._private.services.psutil, "process_iter", lambda *_, **__: iter(()))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    source, lock = zoo_of
    with pytest.raises(fastlock.FastlockError, match="auto: no Ray cluster"):
        zoo.relock_zoo([source], lock, tmp_path / "out", ray="auto")
    assert not (tmp_path / "out").exists()


def test_without_ray_the_error_says_what_to_install(zoo_of, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    source, lock = zoo_of
    with pytest.raises(fastlock.FastlockError, match=r"pip install 'fastlock\[ray\]'"):
        zoo.relock_zoo([source], lock, tmp_path / "out", ray="local")
    assert not (tmp_path / "out").exists()
