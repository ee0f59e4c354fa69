"""A zoo of GGUF models, with a checkpoint beside them: relocked, resumed and verified."""

import json
import pickle
import shutil
from pathlib import Path

import pytest

import fastlock
from fastlock.zoo import run as zoo
from fastlock.zoo import tasks
from fastlock.zoo.find import CHECKPOINT, GGUF
from fastlock.zoo.tasks import Job, Result, Task, geometry, relock_one, verify_one
from tests.helpers.families import tiny_model
from tests.helpers.gguf_files import SHAPE, Kind, Tiny, lock_of


@pytest.fixture
def lock() -> fastlock.Lock:
    return lock_of([(0, 3), (2, 1)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("made") / "tune"
    tiny_model("llama", **SHAPE).save_pretrained(directory)
    return directory


def relocked(source: Path | str, lock: fastlock.Lock, out: Path | str, **of_job: object) -> Result:
    """What a worker makes of one GGUF."""
    job = Job(relock_one, pickle.dumps(lock), **{"strength": 2.0, "gguf_stacks": ("llama.cpp",)} | of_job)
    result, _ = relock_one(job, Task(0, str(source), "m", str(out), kind=GGUF))
    return result


def test_a_mixed_zoo_is_relocked_as_each_by_itself(checkpoint, lock, tmp_path) -> None:
    hub, out, alone = tmp_path / "hub", tmp_path / "out", tmp_path / "alone"
    (hub / "org").mkdir(parents=True)
    alone.mkdir()
    shutil.copytree(checkpoint, hub / "tune")
    Tiny(Kind.Q8_0).write(hub / "org" / "m.gguf")
    Tiny(parts=3, seed=1).write(hub / "big.gguf")
    Tiny(metadata={"general.type": "mmproj"}).write(hub / "mmproj.gguf")
    Tiny(architecture="qwen2").write(hub / "qwen.gguf")
    (hub / "short.gguf").write_bytes((hub / "org" / "m.gguf").read_bytes()[:1000])
    (hub / "lone-00002-of-00003.gguf").write_bytes((hub / "big-00002-of-00003.gguf").read_bytes())
    first = "big-00001-of-00003.gguf"

    summary = zoo.relock_zoo([hub], lock, out, 2.0, workers=2)
    found = {result.name: result for result in summary.results}
    assert {name: result.status for name, result in found.items()} == {
        **dict.fromkeys(["tune", first, "org/m.gguf"], "relocked"),
        "mmproj.gguf": "skipped",
        **dict.fromkeys(["qwen.gguf", "short.gguf", "lone-00002-of-00003.gguf"], "failed"),
    }
    assert {name: result.kind for name, result in found.items()} == dict.fromkeys(found, GGUF) | {"tune": CHECKPOINT}
    for name, reason in {
        "mmproj.gguf": "is the part of a model that reads images or sound",
        "qwen.gguf": "is of the architecture qwen2, and cannot be relocked",
        "short.gguf": "ends before its header does",
        "lone-00002-of-00003.gguf": "is part 2 of 3. Give the first part",
    }.items():
        assert reason in found[name].error
        assert str(hub / name) in found[name].error
    for name in ("org/m.gguf", first):
        fastlock.relock_gguf(hub / name, lock, alone / Path(name).name, 2.0)
    for path in alone.iterdir():
        assert path.read_bytes() == (out / "org" / path.name if path.name == "m.gguf" else out / path.name).read_bytes()
    assert sorted(path.name for path in out.glob("**/*.gguf")) == sorted(path.name for path in alone.iterdir())
    lines = [json.loads(line) for line in summary.log.read_text().splitlines()]
    assert {line["name"]: line["kind"] for line in lines} == {name: result.kind for name, result in found.items()}
    assert "<h1>fastlock zoo: 7 checkpoints and GGUF models</h1>" in summary.report.read_text()

    again = zoo.relock_zoo([hub / "org", hub / "tune", hub / first], lock, out, 2.0, workers=2)
    assert {result.name: result.status for result in again.results} == {
        "m.gguf": "relocked",  # of another name, as its source was given itself
        "tune": "done already",
        first: "done already",
    }
    verified = zoo.verify_zoo([out], lock, workers=2)
    assert verified.counts == {"locked": 4}, verified.wrong


def test_what_is_there_already(lock, tmp_path) -> None:
    source, out = Tiny().write(tmp_path / "m.gguf"), tmp_path / "out" / "m.gguf"
    assert relocked(source, lock, out).status == "relocked"
    before = out.read_bytes()
    assert relocked(source, lock, out).status == "done already"
    for other, of_job, state in [
        (lock, {"strength": 3.0}, "with the lock at strength 2"),
        (lock_of([(1, 1)]), {}, "with another lock"),
    ]:
        result = relocked(source, other, out, **of_job)
        assert result.status == "failed"
        assert f"{out}: already exists, {state}" in result.error
    assert out.read_bytes() == before
    shutil.copy(source, out)
    assert "already exists, without a lock" in relocked(source, lock, out).error
    out.write_bytes(before[:5000])
    assert f"{out}: ends " in relocked(source, lock, out).error


def test_a_stack_that_was_asked_for_is_not_passed_over(lock, tmp_path) -> None:
    source, out = Tiny().write(tmp_path / "m.gguf"), tmp_path / "out.gguf"
    for stacks in (("vllm",), ("llama.cpp", "vllm")):
        result = relocked(source, lock, out, gguf_stacks=stacks)
        assert "m.gguf: is a GGUF, in which a lock acts in llama.cpp alone" in result.error
        assert not out.exists()
    relocked(source, lock, out)
    assert relocked(source, lock, out, gguf_stacks=("vllm",)).status == "failed"


def test_a_copy_is_asked_for(lock, tmp_path, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(tasks, "relock_gguf", lambda *_, copy: asked.append(copy))
    source = Tiny().write(tmp_path / "m.gguf")
    for copy in (True, False):
        assert relocked(source, lock, tmp_path / "out.gguf", copy=copy).status == "relocked"
    assert asked == [True, False]


@pytest.mark.parametrize(("stacks", "of_gguf"), [(None, ("llama.cpp",)), (["vllm"], ("vllm",))])
def test_the_stacks_of_a_zoo(stacks, of_gguf, checkpoint, lock, tmp_path, monkeypatch) -> None:
    jobs = []
    monkeypatch.setattr(zoo, "_pool", lambda job, *_: jobs.append(job) or pytest.fail("begun"))
    with pytest.raises(pytest.fail.Exception):
        zoo.relock_zoo([checkpoint], lock, tmp_path / "out", stacks=stacks)
    assert jobs[0].gguf_stacks == of_gguf
    assert jobs[0].stacks == (("transformers", "vllm") if stacks is None else ("vllm",))


def test_what_is_not_of_the_base_is_skipped(checkpoint, lock, tmp_path) -> None:
    bases = (geometry(checkpoint),)
    source = Tiny().write(tmp_path / "m.gguf")
    assert relocked(source, lock, tmp_path / "out.gguf", geometries=bases).status == "relocked"
    other = Tiny(metadata={"llama.attention.value_length": 32, "llama.block_count": 4}).write(tmp_path / "n.gguf")
    result = relocked(other, lock, tmp_path / "n-out.gguf", geometries=bases)
    assert (result.status, result.error) == ("skipped", "num_hidden_layers is 4, not 3, head_dim is 32, not 64")
    gpt2 = Tiny(architecture="gpt2").write(tmp_path / "o.gguf")
    result = relocked(gpt2, lock, tmp_path / "o-out.gguf", geometries=bases)
    assert (result.status, result.error) == ("skipped", "architecture is gpt2, to which no llama is converted")
    gpt2_too = (*bases, bases[0] | {"model_type": "gpt2"})
    assert relocked(gpt2, lock, tmp_path / "o-out.gguf", geometries=gpt2_too).status == "relocked"


def test_urls_are_told_what_to_do(lock, tmp_path) -> None:
    source = Tiny().write(tmp_path / "m.gguf")
    url = tmp_path.as_uri().replace("file://", "local://")
    for result in (
        relocked(f"{url}/m.gguf", lock, tmp_path / "out.gguf"),
        relocked(source, lock, f"{url}/out.gguf"),
        verify_one(Job(verify_one, pickle.dumps(lock)), Task(0, f"{url}/m.gguf", "m", kind=GGUF))[0],
    ):
        assert result.status == "failed"
        assert "a GGUF is read from, and written to, this machine's disks. Download it first" in result.error
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_what_claims_to_be_no_model_is_not_called_locked(lock, tmp_path) -> None:
    """It may be one, whatever its metadata says."""
    source = Tiny(metadata={"general.type": "mmproj"}).write(tmp_path / "m.gguf")
    result, _ = verify_one(Job(verify_one, pickle.dumps(lock)), Task(0, str(source), "m", kind=GGUF))
    assert (result.status, result.is_right) == ("failed", False)
