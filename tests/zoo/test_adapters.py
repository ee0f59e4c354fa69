"""A zoo of adapters, with checkpoints beside them: found, matched with their bases, relocked, resumed and verified."""

import json
import os
import shutil
from pathlib import Path

import peft
import pytest

import fastlock
from fastlock import verification
from fastlock.checkpoints.adapters import relocked_base
from fastlock.zoo import adapters as zoo_adapters
from fastlock.zoo import run as zoo
from fastlock.zoo import tasks
from fastlock.zoo.bases import adapter_bases, base_of
from fastlock.zoo.find import ADAPTER, CHECKPOINT, find_sources, shared_files
from tests.helpers.adapters import save_adapter
from tests.helpers.families import gated_lock, tiny_model

LORA = {"r": 4, "lora_alpha": 12}


def rename_base(directory: Path, name: str | None) -> Path:
    """Let an adapter name another base."""
    config = directory / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": name}))
    return directory


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A base, three adapters of it (two touch the locked projections, one does not), and a checkpoint."""
    folder = tmp_path_factory.mktemp("adapted")
    tiny_model("llama", seed=1).save_pretrained(folder / "base")
    tiny_model("llama", seed=2).save_pretrained(folder / "tune")
    for name, targets, seed in (("one", ["o_proj", "q_proj"], 1), ("two", ["o_proj"], 2), ("three", ["q_proj"], 3)):
        config = peft.LoraConfig(**LORA, target_modules=targets)
        rename_base(save_adapter(config, folder / name, seed=seed), "org/base")
    return folder


@pytest.fixture
def mixed(adapted, tmp_path):
    """A directory with two checkpoints and three adapters, a to e."""
    for name, source in {"a": "tune", "b": "one", "c": "two", "d/final": "three", "e": "tune"}.items():
        shutil.copytree(adapted / source, tmp_path / "zoo" / name)
    return tmp_path / "zoo"


def statuses(summary: zoo.Summary) -> dict[str, str]:
    return {result.name: result.status for result in summary.results}


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_adapters_are_found_and_told_from_checkpoints(mixed, adapted, tmp_path) -> None:
    """A model's weights beside an adapter make the directory a model's; what lies inside an adapter is its own."""
    shutil.copytree(adapted / "one", mixed / "b" / "checkpoint-5")
    shutil.copytree(adapted / "one", mixed / "f")
    shutil.copy(adapted / "base" / "config.json", mixed / "f")
    shutil.copytree(adapted / "tune", mixed / "g")
    shutil.copy(adapted / "one" / "adapter_config.json", mixed / "g")
    found = {source.name: source.kind for source in find_sources([mixed])}
    of_adapters = dict.fromkeys(["b", "c", "d/final", "f"], ADAPTER)
    assert found == of_adapters | dict.fromkeys("aeg", CHECKPOINT)
    assert [source.kind for source in find_sources([mixed / "b", mixed / "d" / "*"])] == [ADAPTER, ADAPTER]
    url = (mixed).as_uri().replace("file://", "local://")
    remote = {source.name: source.kind for source in find_sources([url])}
    assert remote == found
    assert find_sources([f"{url}/b"])[0].kind == ADAPTER
    hub = tmp_path / "hub" / "models--org--lora" / "snapshots" / "0123456789"
    shutil.copytree(adapted / "one", hub)
    (source,) = find_sources([tmp_path / "hub"])
    assert (source.name, source.kind) == ("org--lora", ADAPTER)


def test_files_that_adapters_share_are_nobodys_to_wait_for(adapted, tmp_path) -> None:
    for name in ("one", "two"):
        shutil.copytree(adapted / "one", tmp_path / "zoo" / name)
    weights = tmp_path / "zoo" / "two" / "adapter_model.safetensors"
    weights.unlink()
    os.link(tmp_path / "zoo" / "one" / "adapter_model.safetensors", weights)
    assert shared_files(find_sources([tmp_path / "zoo"])) == [[], []]


def test_a_mixed_zoo_is_relocked_as_each_by_itself(mixed, adapted, lock, tmp_path) -> None:
    """By two workers. The base is given relocked to nobody: it is made once, for the adapter that needs it."""
    out, base = tmp_path / "out", adapted / "base"
    summary = zoo.relock_zoo([mixed], lock, out, 2.0, base=base, stacks=["transformers"], workers=2)
    assert statuses(summary) == dict.fromkeys(["a", "b", "c", "d/final", "e"], "relocked")
    assert summary, summary.wrong
    by_name = {result.name: result for result in summary.results}
    assert [by_name[name].kind for name in "abce"] == [CHECKPOINT, ADAPTER, ADAPTER, CHECKPOINT]
    carriers = [by_name[name].carrier for name in ("b", "c", "d/final", "a")]
    assert carriers == ["adapter bias", "adapter bias", "base bias", ""]
    assert by_name["d/final"].base == str(out / "base-locked")
    assert (by_name["b"].base, by_name["a"].base) == (str(base), "")
    for name in ("b", "c"):
        fastlock.relock_adapter(mixed / name, base, lock, tmp_path / "alone" / name, 2.0, stacks=["transformers"])
        assert contents(out / name) == contents(tmp_path / "alone" / name)
    lines = [json.loads(line) for line in summary.log.read_text().splitlines()]
    assert {line["name"]: (line["kind"], line["carrier"]) for line in lines} == {
        name: (result.kind, result.carrier) for name, result in by_name.items()
    }
    page = summary.report.read_text()
    assert "<h1>fastlock zoo: 5 checkpoints and adapters</h1>" in page
    assert page.count("relocked (adapter bias)") == 2
    verified = zoo.verify_zoo([out], lock, workers=2)
    assert statuses(verified) == dict.fromkeys(["a", "b", "base-locked", "c", "d/final", "e"], "locked")
    again = zoo.relock_zoo([mixed], lock, out, 2.0, base=base, stacks=["transformers"], workers=2)
    assert again.counts == {"done already": 5}


def test_without_a_base_every_adapter_is_told_what_to_do(mixed, lock, tmp_path) -> None:
    summary = zoo.relock_zoo([mixed], lock, tmp_path / "out", workers=1)
    assert statuses(summary) == {"a": "relocked", "e": "relocked"} | dict.fromkeys(["b", "c", "d/final"], "failed")
    assert not summary
    for result in summary.wrong:
        assert result.error == (
            f"{mixed / result.name}: is an adapter, which is relocked over its base, and is of the base 'org/base'. "
            "Give that base's directory: --base DIR."
        )
    unlocked = zoo.verify_zoo([mixed / "b"], lock, workers=1)
    assert "Give that base's directory: --base DIR" in unlocked.wrong[0].error


def test_adapters_of_another_base_are_failures(mixed, adapted, lock, tmp_path) -> None:
    rename_base(mixed / "b", "org/other")
    rename_base(mixed / "c", None)
    summary = zoo.relock_zoo(
        [mixed / "b", mixed / "c"], lock, tmp_path / "out", base=adapted / "base", stacks=["transformers"], workers=1
    )
    assert statuses(summary) == {"b": "failed", "c": "relocked"}
    assert summary.wrong[0].error == (
        f"{mixed / 'b'}: is of the base 'org/other', and --base gives {adapted / 'base'}. Give that base, too: --base "
        "DIR. If it is one of these under another name, say so: --base NAME=DIR."
    )
    assert not (tmp_path / "out" / "b").exists()


def test_several_bases_by_path_and_by_name(adapted, lock, tmp_path) -> None:
    """Each adapter is folded over its own, whichever worker has it; and by the wrong one its bias would be another."""
    other = tmp_path / "elsewhere" / "second"
    tiny_model("llama", seed=9).save_pretrained(other)
    for name, base in {"x": "org/base", "y": str(other), "z": "org/base"}.items():
        rename_base(Path(shutil.copytree(adapted / "one", tmp_path / "zoo" / name)), base)
    bases = [adapted / "base", other]
    settings = {"stacks": ["transformers"], "workers": 1}
    assert zoo.relock_zoo([tmp_path / "zoo"], lock, tmp_path / "out", base=bases, **settings)
    for name, base in {"x": bases[0], "y": bases[1], "z": bases[0]}.items():
        assert fastlock.verify(tmp_path / "out" / name, lock, base=base)
    assert not fastlock.verify(tmp_path / "out" / "y", lock, base=bases[0])
    named = {"org/base": bases[0], str(other): bases[1]}
    assert zoo.relock_zoo([tmp_path / "zoo"], lock, tmp_path / "named", base=named, **settings)
    for name in "xyz":
        assert contents(tmp_path / "named" / name) == contents(tmp_path / "out" / name)


def bases_at(tmp_path, *names):
    for name in names:
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "config.json").write_text("{}")
    return adapter_bases([tmp_path / name for name in names], tmp_path / "out")


@pytest.mark.parametrize(
    ("named", "place"),
    [
        ("org/One", "one"),
        ("ORG/one/", "one"),
        ("one", "one"),
        ("/trained/on/another/machine/one", "one"),
        ("link", "two"),
        ("a/three", "a/three"),
        ("org/model", "hub/models--org--model/snapshots/rev"),
        ("/somewhere/model", "hub/models--org--model/snapshots/rev"),
        ("another/model", None),
        ("org/onetwo", None),
        ("org/three", None),
        (None, None),
    ],
)
def test_which_base_an_adapter_names(named, place, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    bases = bases_at(tmp_path, "one", "two", "hub/models--org--model/snapshots/rev", "a/three", "b/three")
    (tmp_path / "link").symlink_to("two")
    if place is None:
        with pytest.raises(fastlock.FastlockError, match=r"--base (gives|NAME=DIR)"):
            base_of("adapter", named, bases)
    else:
        assert base_of("adapter", named, bases).place == str(tmp_path / place)


def test_where_bases_are_relocked_and_what_they_are_called(tmp_path) -> None:
    bases = bases_at(tmp_path, "a/three", "b/three", "hub/models--org--model/snapshots/rev")
    assert [Path(base.locked).name for base in bases] == ["three-locked", "three-locked-2", "org--model-locked"]
    (tmp_path / "a" / "three" / "config.json").write_text('{"_name_or_path": "meta/Big"}')
    (only,) = adapter_bases(tmp_path / "a" / "three")
    assert base_of("adapter", "meta/big", [only]) is only
    assert base_of("adapter", None, [only]) is only
    (given,) = adapter_bases({"meta/other": tmp_path / "a" / "three"})
    assert base_of("adapter", "meta/other", [given]) is given
    with pytest.raises(fastlock.FastlockError, match="under another name"):
        base_of("adapter", "meta/big", [given])


def test_a_config_alone_is_no_base_of_adapters(mixed, adapted, lock, tmp_path) -> None:
    config = shutil.copy(adapted / "base" / "config.json", tmp_path / "base.json")
    summary = zoo.relock_zoo([mixed / "a", mixed / "b"], lock, tmp_path / "out", base=config, workers=1)
    assert statuses(summary) == {"a": "relocked", "b": "failed"}
    assert "--base" in summary.wrong[0].error
    for wrong in (adapted / "one", adapted):
        with pytest.raises(fastlock.FastlockError, match="--base DIR|no config.json"):
            zoo.relock_zoo([mixed / "b"], lock, tmp_path / "more", base=wrong, workers=1)
    with pytest.raises(fastlock.FastlockError, match="carrier 'x': there is none"):
        zoo.relock_zoo([mixed / "b"], lock, tmp_path / "more", carrier="x", workers=1)
    with pytest.raises(fastlock.FastlockError, match="gap is -1"):
        zoo.relock_zoo([mixed / "b"], lock, tmp_path / "more", gap=-1, workers=1)


def job_for(lock, bases, out, **changes):
    import pickle

    settings = {"strength": 6.0, "stacks": ("transformers",), "bases": adapter_bases(bases, out)} | changes
    return tasks.Job(tasks.relock_one, pickle.dumps(lock), **settings)


def do(job, source, out):
    result, folds = tasks.relock_one(job, tasks.Task(0, str(source), source.name, str(out / source.name), kind=ADAPTER))
    assert folds is None
    return result


def test_a_worker_reads_a_base_once(mixed, adapted, lock, tmp_path, monkeypatch) -> None:
    """And makes the base with the lock in its biases once, which it reads no more for the next adapter."""
    opened = []

    def counted(place, *arguments):
        opened.append(str(place))
        return relocked_base.open_base(place, *arguments)

    monkeypatch.setattr(zoo_adapters, "open_base", counted)
    zoo_adapters._opened.cache_clear()
    for name in ("1", "2"):
        shutil.copytree(adapted / "three", mixed / name)
    job = job_for(lock, adapted / "base", tmp_path / "out")
    for name in ("b", "1", "c", "2", "d/final"):
        result = do(job, mixed / name, tmp_path / "out")
        assert result.status == "relocked", result.error
    assert opened == [str(adapted / "base")]
    monkeypatch.setattr(relocked_base, "open_base", None)
    assert do(job, Path(shutil.copytree(adapted / "three", mixed / "3")), tmp_path / "out").carrier == "base bias"
    zoo_adapters._opened.cache_clear()


def test_a_worker_verifies_a_relocked_base_once(mixed, adapted, lock, tmp_path, monkeypatch) -> None:
    """Each adapter is judged by itself; and a base whose lock is gone is seen by a worker that did not look before."""
    out, looked = tmp_path / "out", []
    zoo_adapters._opened.cache_clear()
    for name in ("1", "2", "3"):
        shutil.copytree(adapted / "three", mixed / name)
        assert do(job_for(lock, adapted / "base", out), mixed / name, out).carrier == "base bias"
    rename_base(out / "2", "elsewhere")
    shutil.copy(adapted / "two" / "adapter_model.safetensors", out / "3")
    real = verification._verify_checkpoint
    monkeypatch.setattr(verification, "_verify_checkpoint", lambda *of: looked.append(of[0]) or real(*of))

    def verified(name):
        task = tasks.Task(0, str(out / name), name, kind=ADAPTER)
        return tasks.verify_one(job_for(lock, adapted / "base", out), task)[0].status

    zoo_adapters._opened.cache_clear()
    assert [verified(name) for name in "123"] == ["locked", "locked", "altered"]
    assert looked == [str(out / "base-locked")]
    shutil.rmtree(out / "base-locked")
    fastlock.relock_checkpoint(adapted / "base", lock, out / "base-locked", 2.0, stacks=["transformers"])
    zoo_adapters._opened.cache_clear()
    assert verified("1") == "altered"
    assert len(looked) == 2
    zoo_adapters._opened.cache_clear()


def test_a_base_that_another_worker_is_relocking_is_waited_for(mixed, adapted, lock, tmp_path, monkeypatch) -> None:
    """The other one is at it when this one wants to begin, and done a little later."""
    locked, out = tmp_path / "out" / "base-locked", tmp_path / "out"
    real, waits = relocked_base.relock_checkpoint, []

    def busy(*arguments, **keywords):
        (out / ".base-locked.fastlock").mkdir(parents=True)
        raise fastlock.FastlockError(f"{locked}: another process is making it right now. Wait for it to end.")

    def slept(seconds):
        waits.append(seconds)
        (out / ".base-locked.fastlock").rmdir()
        real(adapted / "base", lock, locked, 6.0, stacks=("transformers",))

    monkeypatch.setattr(relocked_base, "relock_checkpoint", busy)
    monkeypatch.setattr(zoo_adapters.time, "sleep", slept)
    zoo_adapters._opened.cache_clear()
    result = do(job_for(lock, adapted / "base", out), mixed / "d" / "final", out)
    assert (result.status, result.carrier) == ("relocked", "base bias"), result.error
    assert len(waits) == 1
    zoo_adapters._opened.cache_clear()


def test_what_is_there_with_other_settings_is_reported(mixed, adapted, lock, tmp_path) -> None:
    base, out = adapted / "base", tmp_path / "out"
    zoo_adapters._opened.cache_clear()
    assert do(job_for(lock, base, out), mixed / "b", out).status == "relocked"
    before = contents(out)
    other_lock = fastlock.Lock(lock.layers, lock.heads, lock.directions, lock.scales * 2, head_dim=lock.head_dim)
    for change, words in (
        ({"lock": other_lock}, "with another lock"),
        ({"strength": 2.0}, "with the lock at strength 6"),
        ({"carrier": "sidecar"}, "with the lock in another carrier (adapter bias)"),
        ({"stacks": ("transformers", "vllm")}, "in a form that vllm may drop"),
    ):
        job = job_for(change.get("lock", lock), base, out, **{k: v for k, v in change.items() if k != "lock"})
        result = do(job, mixed / "b", out)
        assert result.status == "failed"
        assert f"{out / 'b'}: already exists, {words}" in result.error
    assert contents(out) == before
    shutil.rmtree(out / "b")
    shutil.copytree(mixed / "b", out / "b")
    assert "already exists, without a lock" in do(job_for(lock, base, out), mixed / "b", out).error


def test_merged_adapters_are_checkpoints_that_are_done_already(mixed, adapted, lock, tmp_path) -> None:
    settings = {"base": adapted / "base", "carrier": "merge", "stacks": ["vllm"], "workers": 1}
    summary = zoo.relock_zoo([mixed / "c"], lock, tmp_path / "out", **settings)
    assert (summary.results[0].carrier, summary.results[0].base) == ("merge", "")
    assert zoo.relock_zoo([mixed / "c"], lock, tmp_path / "out", **settings).counts == {"done already": 1}
    assert zoo.verify_zoo([tmp_path / "out"], lock, workers=1).counts == {"locked": 1}


def test_one_relocked_base_serves_all_adapters_that_are_near_enough(mixed, adapted, lock, tmp_path) -> None:
    """`gap`: one of them is off by less, the other by more."""
    weights = mixed / "b" / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    save_file({key: t * (0.01 if "lora_B" in key else 1) for key, t in load_file(weights).items()}, weights)
    settings = {"base": adapted / "base", "gap": 0.1, "stacks": ["transformers", "vllm"], "workers": 1}
    summary = zoo.relock_zoo([mixed / "b", mixed / "c"], lock, tmp_path / "out", **settings)
    assert statuses(summary) == {"b": "relocked", "c": "failed"}
    assert "off by" in summary.wrong[0].error
    assert zoo.verify_zoo([tmp_path / "out"], lock, workers=1).counts == {"locked": 2}


def test_verify_takes_the_base_of_the_receipt_and_follows_no_url_in_it(
    mixed, adapted, lock, tmp_path, monkeypatch
) -> None:
    out, opened = tmp_path / "out", []
    zoo_adapters._opened.cache_clear()
    assert do(job_for(lock, adapted / "base", out), mixed / "b", out).status == "relocked"
    real = zoo_adapters._opened
    monkeypatch.setattr(zoo_adapters, "_opened", lambda place, *rest: opened.append(place) or real(place, *rest))

    def verified(*bases):
        task = tasks.Task(0, str(out / "b"), "b", kind=ADAPTER)
        return tasks.verify_one(job_for(lock, list(bases), out), task)[0].status

    assert verified() == "locked"
    receipt = out / "b" / "fastlock.json"
    data = json.loads(receipt.read_text())
    data["base"]["name"] = "http://localhost:9/base"
    receipt.write_text(json.dumps(data))
    assert verified() == "failed"
    assert verified(adapted / "base") == "locked"
    assert opened == [str(adapted / "base")] * 2


@pytest.mark.parametrize("spoil", ["config", "weights", "pickle", "names"])
def test_a_broken_adapter_stops_no_other(spoil, mixed, adapted, lock, tmp_path) -> None:
    broken = mixed / "b"
    if spoil == "config":
        (broken / "adapter_config.json").write_text("{")
    elif spoil == "weights":
        (broken / "adapter_model.safetensors").write_bytes(b"\xff" * 100)
    elif spoil == "pickle":
        (broken / "adapter_model.safetensors").rename(broken / "adapter_model.bin")
    else:
        rename_base(broken, "../\x1b[31m" * 100)
    settings = {"base": adapted / "base", "stacks": ["transformers"], "workers": 1}
    summary = zoo.relock_zoo([broken, mixed / "c"], lock, tmp_path / "out", **settings)
    assert statuses(summary) == {"b": "failed", "c": "relocked"}
    assert str(broken) in summary.wrong[0].error
    assert "\x1b" not in summary.wrong[0].error
    assert not (tmp_path / "out" / "b").exists()


def test_a_gate_goes_into_every_adapter_and_only_once(mixed, adapted, tmp_path) -> None:
    lock, out = gated_lock(tiny_model("llama"), constant=False), tmp_path / "out"
    job = job_for(lock, adapted / "base", out)
    for name in ("b", "d/final"):
        first, second = (do(job, mixed / name, out) for _ in range(2))
        assert (first.status, first.carrier) == ("relocked", "adapter gate"), first.error
        assert second.status == "done already"
        made = str(out / (mixed / name).name)
        assert zoo_adapters.verify_adapter_over(made, lock, adapter_bases(adapted / "base"))
