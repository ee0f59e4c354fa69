"""Checkpoints in an object store: a real server on this machine, whose own record of the requests is looked at."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastlock
from fastlock.checkpoints.diagnosis import doctor
from fastlock.checkpoints.relocked import NEW_SHARD, read_receipt
from fastlock.errors import FastlockError
from fastlock.storage.files import with_patches
from fastlock.storage.remote import MARKER
from fastlock.zoo.find import find_sources
from fastlock.zoo.run import relock_zoo, verify_zoo
from tests.helpers.command import run_command
from tests.helpers.families import random_lock, tiny_model
from tests.helpers.s3 import BUCKET, ENVIRONMENT, Bucket, Server

TRANSFORMERS = {"stacks": ["transformers"]}
S3 = f"s3://{BUCKET}"
KILLS = 30


@pytest.fixture(scope="module")
def running():
    server = Server()
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        for key, value in (ENVIRONMENT | {"AWS_ENDPOINT_URL": server.url}).items():
            patch.setenv(key, value)
        yield server, Bucket(server.url)
    server.stop()


@pytest.fixture
def s3(running):
    """The server and its bucket, empty."""
    server, bucket = running
    for prefix in ("in", "out", "zoo"):
        bucket.remove(prefix)
    server.requests.clear()
    yield running
    server.hook = lambda method, key: None


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def prepared(tmp_path: Path, kind: str = "llama", shard: str = "5GB"):
    """A checkpoint here, its lock, and what relocking it gives here."""
    model = tiny_model(kind, torch.bfloat16)
    lock, source = random_lock(model), tmp_path / "source"
    model.save_pretrained(source, max_shard_size=shard)
    (source / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (source / "original").mkdir()
    (source / "original" / "params.json").write_text("{}")
    fastlock.relock_checkpoint(source, lock, tmp_path / "locked", **TRANSFORMERS)
    return lock, source, contents(tmp_path / "locked")


@pytest.mark.parametrize(("kind", "shard"), [("llama", "5GB"), ("llama", "60KB"), ("gpt2", "5GB"), ("qwen2", "60KB")])
def test_relocked_and_unlocked_there_as_here(kind: str, shard: str, s3, tmp_path) -> None:
    _, bucket = s3
    lock, source, locked = prepared(tmp_path, kind, shard)
    bucket.upload(source, "in/m")
    receipt = fastlock.relock_checkpoint(f"{S3}/in/m", lock, f"{S3}/out/m", **TRANSFORMERS)
    assert bucket.contents("out/m") == locked
    assert bucket.contents("in/m") == contents(source)
    assert read_receipt(f"{S3}/out/m").to_dict() == receipt.to_dict()
    fastlock.unlock_checkpoint(f"{S3}/out/m", f"{S3}/out/back")
    assert bucket.contents("out/back") == contents(source)


def test_to_there_and_from_there(s3, tmp_path) -> None:
    _, bucket = s3
    lock, source, locked = prepared(tmp_path, shard="60KB")
    fastlock.relock_checkpoint(source, lock, f"{S3}/out/up", **TRANSFORMERS)
    assert bucket.contents("out/up") == locked
    bucket.upload(source, "in/m")
    fastlock.relock_checkpoint(f"{S3}/in/m", lock, tmp_path / "down", **TRANSFORMERS)
    assert contents(tmp_path / "down") == locked
    assert (tmp_path / "down").stat().st_mode == tmp_path.stat().st_mode
    fastlock.unlock_checkpoint(f"{S3}/out/up", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)


@pytest.mark.parametrize("shard", ["5GB", "60KB"])
def test_only_headers_configs_and_locked_projections_are_fetched(shard: str, s3, tmp_path) -> None:
    server, bucket = s3
    lock, source, locked = prepared(tmp_path, shard=shard)
    bucket.upload(source, "in/m")
    server.requests.clear()
    fastlock.relock_checkpoint(f"{S3}/in/m", lock, f"{S3}/out/m", **TRANSFORMERS)
    of_tensors = [r for r in server.requests if r.method == "GET" and r.key.endswith(".safetensors")]
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in source.glob("*.safetensors"))
    assert all(request.ranged for request in of_tensors)
    assert sum(r.sent for r in of_tensors) == headers + 2 * 64 * 128 * 2  # two layers of [64, 4 * 32] bfloat16
    others = {r.key.removeprefix("in/m/"): r.sent for r in server.requests if r.method == "GET" and r.key}
    small = {"config.json", "README.md"} | {name for name in contents(source) if name.endswith("index.json")}
    assert {name for name in others if not name.endswith(".safetensors")} == small
    put = {r.key.removeprefix("out/m/"): r.received for r in server.requests if r.method == "PUT" and not r.copied}
    written = {"config.json", "README.md", "model.safetensors.index.json", NEW_SHARD}
    assert put == {name: len(locked[name]) for name in written} | {MARKER: 64}
    assert {r.method for r in server.requests if r.key.startswith("in/")} <= {"GET", "HEAD"}


def test_the_config_comes_last(s3, tmp_path) -> None:
    server, bucket = s3
    lock, source, locked = prepared(tmp_path, "qwen2", "60KB")
    bucket.upload(source, "in/m")
    for work, wanted in [
        (lambda: fastlock.relock_checkpoint(f"{S3}/in/m", lock, f"{S3}/out/m", **TRANSFORMERS), set(locked)),
        (lambda: fastlock.unlock_checkpoint(f"{S3}/out/m", f"{S3}/out/back"), set(contents(source))),
    ]:
        server.requests.clear()
        work()
        put = [r.key.split("/", 2)[2] for r in server.requests if r.method == "PUT"]
        assert put[0] == MARKER
        assert put[-1] == "config.json"
        assert set(put[1:]) == wanted


def test_relocking_what_is_relocked_there(s3, tmp_path) -> None:
    _, bucket = s3
    _, _, locked = prepared(tmp_path)
    bucket.upload(tmp_path / "locked", "in/m")
    other = random_lock(tiny_model("llama"), seed=5)
    fastlock.relock_checkpoint(f"{S3}/in/m", other, f"{S3}/out/m", **TRANSFORMERS)
    fastlock.relock_checkpoint(tmp_path / "source", other, tmp_path / "other", **TRANSFORMERS)
    assert bucket.contents("out/m") == contents(tmp_path / "other")
    assert locked != contents(tmp_path / "other")


def test_verify_and_doctor_there(s3, tmp_path) -> None:
    _, bucket = s3
    lock, source, locked = prepared(tmp_path)
    bucket.upload(source, "in/m")
    bucket.upload(tmp_path / "locked", "out/m")
    assert fastlock.verify(f"{S3}/out/m", lock).to_dict() == fastlock.verify(tmp_path / "locked", lock).to_dict()
    assert fastlock.verify(f"{S3}/in/m", lock).state == "not locked"
    assert [finding.acts for finding in doctor(f"{S3}/out/m")] == [True, True]
    biases = safetensors.torch.load(locked[NEW_SHARD])
    biases["model.layers.0.self_attn.o_proj.bias"][5] += 1
    bucket.put(f"out/m/{NEW_SHARD}", safetensors.torch.save(biases))
    assert fastlock.verify(f"{S3}/out/m", lock).state == "altered"


def test_a_band_there(s3, tmp_path) -> None:
    """Against its base, whichever of them lies there, relocked or not; only the band's bytes are read."""
    server, bucket = s3
    lock, source, _ = prepared(tmp_path)
    bucket.upload(source, "in/m")
    bucket.upload(tmp_path / "locked", "out/m")
    band, there, here = fastlock.Band(1, 1), f"{S3}/in/m", tmp_path / "locked"
    plain = fastlock.verify(source, base=source, band=band)
    for directory, base in ((there, source), (source, there), (there, there)):
        assert fastlock.verify(directory, base=base, band=band) == plain
    for directory, base in ((f"{S3}/out/m", there), (f"{S3}/out/m", source), (here, there)):
        found = fastlock.verify(directory, lock, base=base, band=band)
        assert (found.state, found.digest, found.lock.state) == ("unchanged", plain.digest, "locked")
        assert not fastlock.verify(directory, base=base, band=band)
    server.requests.clear()
    fastlock.verify(there, base=source, band=band)
    of_tensors = [r for r in server.requests if r.method == "GET" and r.key.endswith(".safetensors")]
    tensors = safetensors.torch.load((source / "model.safetensors").read_bytes())
    of_band = sum(x.numel() * x.element_size() for name, x in tensors.items() if ".layers.1." in name)
    header = 8 + int.from_bytes((source / "model.safetensors").read_bytes()[:8], "little")
    assert all(request.ranged for request in of_tensors)
    assert sum(r.sent for r in of_tensors) == header + of_band
    with torch.no_grad():
        tensors["model.layers.1.mlp.up_proj.weight"][2, 2] += 1
    bucket.put("in/m/model.safetensors", safetensors.torch.save(tensors))
    found = fastlock.verify(there, base=source, band=band)
    assert [one.what for one in found.differences] == ["has other bytes"]
    with pytest.raises(FastlockError):
        fastlock.verify(there, base=f"{S3}/in/nothing", band=band)


def test_the_command_takes_urls(s3, tmp_path) -> None:
    _, bucket = s3
    lock, source, locked = prepared(tmp_path)
    lock.save(tmp_path / "lock.safetensors")
    bucket.upload(source, "in/m")
    lock_of = ["--lock", str(tmp_path / "lock.safetensors")]
    relocked = ["relock", f"{S3}/in/m/", *lock_of, "--out", f"{S3}/out/m", "--for", "transformers", "--json"]
    assert json.loads(run_command(*relocked).out)["out"] == f"{S3}/out/m"
    assert bucket.contents("out/m") == locked
    inspected = json.loads(run_command("inspect", f"{S3}/out/m", "--json").out)
    assert inspected["receipt"]["lock_digest"] == lock.digest
    assert json.loads(run_command("verify", f"{S3}/out/m", *lock_of, "--json").out)["state"] == "locked"
    assert "uses the biases" in run_command("doctor", f"{S3}/out/m").out
    run_command("unlock", f"{S3}/out/m", "--out", f"{S3}/out/back")
    assert bucket.contents("out/back") == contents(source)


@pytest.mark.parametrize("url", ["memory://models", "local://{tmp_path}/store"])
def test_other_file_systems(url: str, tmp_path) -> None:
    lock, source, locked = prepared(tmp_path)
    url = url.format(tmp_path=tmp_path)
    fs, root = fsspec.core.url_to_fs(url)
    fs.put(str(source), f"{root}/m", recursive=True)
    fastlock.relock_checkpoint(f"{url}/m", lock, f"{url}/out", **TRANSFORMERS)
    assert {name.removeprefix(f"{root}/out/"): fs.cat_file(name) for name in fs.find(f"{root}/out")} == locked
    fastlock.unlock_checkpoint(f"{url}/out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)
    fs.rm(root, recursive=True)


# What may go wrong


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_write_refused_once(kind: str, s3, tmp_path) -> None:
    server, bucket = s3
    lock, source, locked = prepared(tmp_path, kind)
    bucket.upload(source, "in/m")
    writes = 0
    for fails_at in range(100):
        writes = 0

        def refuse(method: str, key: str, fails_at: int = fails_at) -> str | None:
            nonlocal writes
            writes += method in ("PUT", "POST")
            return "403 Forbidden" if method in ("PUT", "POST") and writes == fails_at + 1 else None

        server.hook = refuse
        try:
            fastlock.relock_checkpoint(f"{S3}/in/m", lock, f"{S3}/out/m", **TRANSFORMERS)
        except fastlock.FastlockError as error:
            assert "cannot be reached (PermissionError" in str(error)  # noqa: PT017 - it may also not be raised
        server.hook = lambda method, key: None
        if writes <= fails_at:
            break
        assert "config.json" not in bucket.contents("out/m")
        assert bucket.contents("in/m") == contents(source)
        fastlock.relock_checkpoint(f"{S3}/in/m", lock, f"{S3}/out/m", **TRANSFORMERS)
        assert bucket.contents("out/m") == locked
        bucket.remove("out/m")
    assert fails_at == len(locked) + 1  # each file, and the marker
    assert bucket.contents("out/m") == locked


def test_a_marker_that_cannot_be_removed(s3, tmp_path) -> None:
    """The checkpoint is complete by then."""
    server, bucket = s3
    lock, source, locked = prepared(tmp_path)
    bucket.upload(source, "in/m")
    server.hook = lambda method, key: "403 Forbidden" if method == "DELETE" else None
    with pytest.warns(RuntimeWarning, match=f"{S3}/out/m: is complete, .*PermissionError.*Remove {S3}/out/m/{MARKER}"):
        fastlock.relock_checkpoint(f"{S3}/in/m", lock, f"{S3}/out/m", **TRANSFORMERS)
    left = bucket.contents("out/m")
    assert MARKER in left
    assert {name: data for name, data in left.items() if name != MARKER} == locked
    server.hook = lambda method, key: None
    fastlock.unlock_checkpoint(f"{S3}/out/m", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)


def test_another_run_on_the_same_target(s3, tmp_path) -> None:
    server, bucket = s3
    lock, source, locked = prepared(tmp_path)
    bucket.upload(source, "in/m")
    server.hook = lambda method, key: "403 Forbidden" if method == "PUT" and key.endswith(NEW_SHARD) else None
    with pytest.raises(fastlock.FastlockError):
        fastlock.relock_checkpoint(f"{S3}/in/m", lock, f"{S3}/out/m", **TRANSFORMERS)
    server.hook = lambda method, key: None
    left = bucket.contents("out/m")
    assert MARKER in left
    for work in (
        lambda: fastlock.relock_checkpoint(f"{S3}/in/m", lock, f"{S3}/out/m", 2.0, **TRANSFORMERS),
        lambda: fastlock.unlock_checkpoint(tmp_path / "locked", f"{S3}/out/m"),
    ):
        with pytest.raises(fastlock.FastlockError, match="another run is making something else there"):
            work()
        assert bucket.contents("out/m") == left
    fastlock.relock_checkpoint(f"{S3}/in/m", lock, f"{S3}/out/m", **TRANSFORMERS)
    assert bucket.contents("out/m") == locked


def test_another_run_is_done_between_the_first_look_and_the_claim(s3, tmp_path) -> None:
    server, bucket = s3
    lock, source, locked = prepared(tmp_path)
    bucket.upload(source, "in/m")
    raced = False

    def race(method: str, key: str) -> None:
        nonlocal raced
        if method == "PUT" and key == f"out/m/{MARKER}" and not raced:
            raced = True
            bucket.upload(tmp_path / "locked", "out/m")

    server.hook = race
    with pytest.raises(fastlock.FastlockError, match="already exists"):
        fastlock.relock_checkpoint(f"{S3}/in/m", lock, f"{S3}/out/m", 2.0, **TRANSFORMERS)
    assert bucket.contents("out/m") == locked


@pytest.mark.parametrize("to", ["there", "here"])
def test_a_source_that_changes_while_it_is_read(to: str, s3, tmp_path) -> None:
    server, bucket = s3
    lock, source, _ = prepared(tmp_path)
    bucket.upload(source, "in/m")
    changed = bytearray((source / "model.safetensors").read_bytes())
    changed[-1] ^= 1
    done = False

    def change(method: str, key: str) -> None:
        nonlocal done
        if method == "GET" and key == "in/m/README.md" and not done:  # after all columns were fetched
            done = True
            bucket.put("in/m/model.safetensors", bytes(changed))

    server.hook = change
    out = f"{S3}/out/m" if to == "there" else tmp_path / "out"
    with pytest.raises(fastlock.DamagedError, match="was changed while it was being read"):
        fastlock.relock_checkpoint(f"{S3}/in/m", lock, out, **TRANSFORMERS)
    assert done
    assert bucket.contents("out/m") == {}
    assert not (tmp_path / "out").exists()


def test_a_source_that_changes_while_it_is_copied(s3, tmp_path) -> None:
    server, bucket = s3
    lock, source, _ = prepared(tmp_path)
    bucket.upload(source, "in/m")

    def change(method: str, key: str) -> None:
        if method == "PUT" and key == f"out/m/{MARKER}":
            server.hook = lambda method, key: None
            bucket.put("in/m/model.safetensors", (source / "model.safetensors").read_bytes()[:-1] + b"x")

    server.hook = change
    with pytest.raises(fastlock.DamagedError, match="was changed while it was being read"):
        fastlock.relock_checkpoint(f"{S3}/in/m", lock, f"{S3}/out/m", **TRANSFORMERS)
    assert "config.json" not in bucket.contents("out/m")


@pytest.mark.parametrize("name", ["../up.txt", "a/../../up.txt", "a//b.txt", "/abs.txt", "a\\b.txt", "."])
def test_names_that_lead_out_of_it(name: str, s3, tmp_path) -> None:
    _, bucket = s3
    lock, source, _ = prepared(tmp_path)
    bucket.upload(source, "in/m")
    bucket.put(f"in/m/{name}", b"x")
    assert name in bucket.contents("in/m")
    before = contents(tmp_path)
    with pytest.raises(fastlock.DamagedError, match="leads out of it"):
        fastlock.relock_checkpoint(f"{S3}/in/m", lock, tmp_path / "deep" / "out", **TRANSFORMERS)
    assert contents(tmp_path) == before
    bucket.remove("in")


def test_empty_directories_of_a_console_are_no_files(s3, tmp_path) -> None:
    _, bucket = s3
    lock, source, locked = prepared(tmp_path)
    bucket.upload(source, "in/m")
    bucket.put("in/m/", b"")
    bucket.put("in/m/empty/", b"")
    fastlock.relock_checkpoint(f"{S3}/in/m", lock, tmp_path / "out", **TRANSFORMERS)
    assert contents(tmp_path / "out") == locked


def test_refusals(s3, tmp_path) -> None:
    _, bucket = s3
    lock, source, _ = prepared(tmp_path)
    bucket.upload(source, "in/m")
    bucket.put("out/taken/notes.txt", b"mine")
    here, there = f"{S3}/in/m", f"{S3}/out/m"
    for message, arguments, options in [
        ("already exists", (here, lock, f"{S3}/out/taken"), {}),
        ("already exists", (here, lock, here), {}),
        ("is inside the checkpoint itself", (here, lock, f"{here}/out"), {}),
        ("is inside the checkpoint itself", (here, lock, f"s3://{BUCKET}//in/m/out".replace("//in", "/in")), {}),
        ("cannot be changed in place", (here, lock, here), {"in_place": True}),
        ("holds no config.json", (f"{S3}/in", lock, there), {}),
        ("holds no config.json", ("s3://nobody/m", lock, there), {}),
        ("does not exist. Create it first", (here, lock, "s3://nobody/m"), {}),
        ("Protocol not known", ("nowhere://a/b", lock, there), {}),
        ("has lost a slash", (Path(here), lock, there), {}),
    ]:
        with pytest.raises(fastlock.FastlockError, match=message):
            fastlock.relock_checkpoint(*arguments, **options, **TRANSFORMERS)
    assert bucket.contents("out") == {"taken/notes.txt": b"mine"}
    assert bucket.contents("in/m") == contents(source)
    assert bucket.buckets() == [BUCKET]


def test_what_has_to_be_loaded_is_not_relocked_there(s3, tmp_path) -> None:
    _, bucket = s3
    model = tiny_model("llama", torch.bfloat16)
    lock = random_lock(model)
    fastlock.relock(model, lock)
    model.save_pretrained(tmp_path / "saved")
    bucket.upload(tmp_path / "saved", "in/m")
    with pytest.raises(fastlock.UnsupportedError, match="Download it"):
        fastlock.relock_checkpoint(f"{S3}/in/m", lock, f"{S3}/out/m", **TRANSFORMERS)
    with pytest.raises(fastlock.UnsupportedError, match="Download it"):
        fastlock.unlock_checkpoint(f"{S3}/in/m", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_server_that_is_away_and_a_package_that_is_missing(s3, tmp_path, monkeypatch) -> None:
    lock, source, _ = prepared(tmp_path)
    server, _ = s3
    server.hook = lambda method, key: "403 Forbidden"
    with pytest.raises(fastlock.FastlockError, match="Check the address, your credentials"):
        fastlock.verify(f"{S3}/in/m", lock)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3")
    with pytest.raises(fastlock.FastlockError, match=r"pip install 'fastlock\[s3\]'"):
        fastlock.relock_checkpoint(source, lock, "s3://elsewhere/m", **TRANSFORMERS)


@given(
    st.binary(max_size=40),
    st.lists(st.tuples(st.integers(0, 40), st.binary(max_size=10)), max_size=3),
    st.integers(1, 12),
)
def test_patches_that_lie_across_pieces(data: bytes, patches, piece: int) -> None:
    patches = [(start, patch) for start, patch in patches if start + len(patch) <= len(data)]
    expected = bytearray(data)
    for start, patch in patches:
        expected[start : start + len(patch)] = patch
    pieces = [with_patches(data[start : start + piece], start, patches) for start in range(0, len(data), piece)]
    assert b"".join(pieces) == bytes(expected)


# Many


def zoo_of(bucket: Bucket, source: Path, names: list[str]) -> None:
    for name in names:
        bucket.upload(source, f"zoo/{name}")


def test_a_zoo_there(s3, tmp_path) -> None:
    _, bucket = s3
    lock, source, locked = prepared(tmp_path)
    zoo_of(bucket, source, ["a", "b", "team/c", ".hidden/d"])
    bucket.put("zoo/a/nested/config.json", b"{}")
    bucket.put("zoo/broken/config.json", b"{")
    bucket.put("zoo/notes.txt", b"")
    other = tiny_model("llama", torch.bfloat16, num_hidden_layers=2)
    other.save_pretrained(tmp_path / "other")
    bucket.upload(tmp_path / "other", "zoo/other")
    options = {"stacks": ["transformers"], "base": f"{S3}/zoo/b", "workers": 2}
    summary = relock_zoo([f"{S3}/zoo"], lock, f"{S3}/out", **options)
    statuses = {result.name: result.status for result in summary.results}
    assert statuses == {"a": "relocked", "b": "relocked", "team/c": "relocked", "broken": "failed", "other": "skipped"}
    for name in ("b", "team/c"):
        assert bucket.contents(f"out/{name}") == locked
    logged = bucket.contents("out")
    assert {json.loads(line)["name"] for line in logged["fastlock-zoo.jsonl"].splitlines()} == set(statuses)
    assert b"<h1>fastlock zoo: 5 checkpoints</h1>" in logged["fastlock-zoo.html"]
    relocked = next(result for result in summary.results if result.name == "b")
    columns = 2 * 64 * 128 * 2
    assert relocked.bytes_read >= columns
    assert relocked.bytes_written >= len(locked[NEW_SHARD])

    again = relock_zoo([f"{S3}/zoo"], lock, f"{S3}/out", **options)
    assert again.counts == {"done already": 3, "failed": 1, "skipped": 1}
    assert len(bucket.contents("out")["fastlock-zoo.jsonl"].splitlines()) == 10
    assert verify_zoo([f"{S3}/out"], lock, workers=1).counts == {"locked": 3}


def test_sources_of_a_zoo_there(s3, tmp_path) -> None:
    _, bucket = s3
    lock, source, _ = prepared(tmp_path)
    zoo_of(bucket, source, ["x/final", "y/final", "y/other"])
    found = find_sources([f"{S3}/zoo/*/final", source])
    assert [(c.place, c.name) for c in found][-1] == (str(source), "source")
    assert {c.place for c in found} >= {f"{S3}/zoo/x/final", f"{S3}/zoo/y/final"}
    with pytest.raises(fastlock.FastlockError, match="both would be named final"):
        relock_zoo([f"{S3}/zoo/*/final"], lock, tmp_path / "out", workers=1)
    (tmp_path / "list.txt").write_text(f"{S3}/zoo/x/final\nsource  \n# no\n")
    found = find_sources([tmp_path / "list.txt", f"{S3}/zoo/x/final/"])
    assert [c.place for c in found] == [f"{S3}/zoo/x/final", str(source)]
    names = [c.name for c in find_sources([f"{S3}/zoo"], f"{S3}/zoo/y")]
    assert names == ["x/final"]
    with pytest.raises(fastlock.FastlockError, match="no checkpoint is there"):
        find_sources([f"{S3}/nothing"])


# Killed


def test_killed_at_any_moment(tmp_path) -> None:
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["absent"] > KILLS // 4
    assert counts["absent"] + counts["complete"] == KILLS


def forked(work) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except BaseException:
        os._exit(4)
    os._exit(0)


def kill_many(tmp_path: Path) -> dict[str, int]:
    """Relock there, killed after a random time, and again; the server is a process of its own."""
    lock, source, locked = prepared(tmp_path)
    server = Server()
    os.environ["AWS_ENDPOINT_URL"] = server.url
    serving = forked(server.run)
    bucket = Bucket(server.url)
    bucket.upload(source, "in/m")

    def work() -> None:
        fastlock.relock_checkpoint(f"{S3}/in/m", lock, f"{S3}/out/m", **TRANSFORMERS)

    generator, longest, counts = random.Random(0), 1.0, {"absent": 0, "complete": 0}
    try:
        for run in range(KILLS):
            started, pid = time.perf_counter(), forked(work)
            time.sleep(generator.uniform(0.2, 1) * longest)
            os.kill(pid, signal.SIGKILL)
            killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            assert killed in (0, -signal.SIGKILL)
            longest = longest * 1.1 if killed else 0.5 * (longest + time.perf_counter() - started)
            found = bucket.contents("out/m")
            found.pop(MARKER, None)
            complete = "config.json" in found
            assert not complete or found == locked, f"run {run}: {sorted(found)}"
            assert bucket.contents("in/m") == contents(source)
            counts["complete" if complete else "absent"] += 1
            if not complete:
                again = forked(work)
                assert os.waitstatus_to_exitcode(os.waitpid(again, 0)[1]) == 0
                assert bucket.contents("out/m") == locked
            bucket.remove("out/m")
    finally:
        os.kill(serving, signal.SIGKILL)
        os.waitpid(serving, 0)
    return counts


if __name__ == "__main__":
    print(json.dumps(kill_many(Path(sys.argv[1]))))
