"""Hostile and damaged checkpoints: a clear error of the right kind, little work, bounded memory, nothing written."""

import json
import os
import resource
import shutil
import struct
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import fastlock
from fastlock import DamagedError, FastlockError, UnsupportedError
from tests.helpers.families import random_lock, tiny_model

CPU_SECONDS = 20
BYTES = 2**30
WEIGHT = "model.layers.0.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A checkpoint of two shards, and a lock that fits."""
    model = tiny_model("llama", torch.bfloat16)
    directory = tmp_path_factory.mktemp("plain") / "source"
    model.save_pretrained(directory, max_shard_size="90KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    lock = random_lock(model)
    fastlock.relock_checkpoint(directory, lock, directory.parent / "warm")  # imports transformers' classes
    return directory, lock


@pytest.fixture
def source(plain, tmp_path):
    shutil.copytree(plain[0], tmp_path / "source")
    return tmp_path / "source", plain[1]


def bounded(work: Callable[[], None], report: Path) -> None:
    """Do it in a process that gets no more than so much memory and time of the processor."""
    pid = os.fork()
    if pid:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code == 0, f"{code}\n{report.read_text() if report.exists() else ''}"
        return
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES,) * 2)
        used = resource.getrusage(resource.RUSAGE_SELF)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + CPU_SECONDS,) * 2)
        work()
        os._exit(0)
    except BaseException:
        report.write_text(traceback.format_exc())
        os._exit(1)


def refused(directory: Path, lock, match: str | None = None, kind: type[FastlockError] = DamagedError) -> None:
    """Every way in refuses, with an error of exactly this kind, little work and memory, and writes nothing."""
    out = directory.parent / "out"

    def work() -> None:
        with pytest.raises(FastlockError, match=match) as raised:
            fastlock.relock_checkpoint(directory, lock, out)
        assert raised.type is kind, raised.value
        assert not out.exists()
        assert not list(directory.parent.glob(".*"))
        for look in (lambda: fastlock.verify(directory, lock), lambda: fastlock.doctor(directory)):
            with pytest.raises(FastlockError) as raised:
                look()
            assert raised.type is kind, raised.value

    bounded(work, directory.parent / "report")


def shard_of(directory: Path, name: str = WEIGHT) -> Path:
    return directory / json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"][name]


def header(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewrite_header(path: Path, change, body: bytes | None = None) -> None:
    found, data = header(path)
    encoded = change(found)
    encoded = json.dumps(found).encode() if encoded is None else encoded
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + (data if body is None else body))


def rewrite_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "place", ["../outside.safetensors", "/etc/passwd", "a/../b.safetensors", "x\\y.safetensors", "config.json", 3, None]
)
def test_an_index_that_points_elsewhere(place: object, source) -> None:
    directory, lock = source
    index = directory / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    (directory.parent / "outside.safetensors").write_bytes(shard_of(directory).read_bytes())
    rewrite_json(index, weight_map=weight_map | {WEIGHT: place})
    refused(directory, lock, "not the name of a file beside it")


@pytest.mark.parametrize("weight_map", [{}, [], None, 3, {"a": "missing.safetensors"}])
def test_an_index_without_sense(weight_map: object, source) -> None:
    directory, lock = source
    rewrite_json(directory / "model.safetensors.index.json", weight_map=weight_map)
    refused(directory, lock, "weight_map|which is not there")


def overlap(found: dict) -> None:
    names = [name for name in found if name != "__metadata__"]
    found[names[0]]["data_offsets"] = found[names[1]]["data_offsets"]
    found[names[0]]["shape"] = found[names[1]]["shape"]


def gap(found: dict) -> None:
    found.pop(next(name for name in found if name not in ("__metadata__", WEIGHT)))


def beyond(found: dict) -> None:
    for entry in found.values():
        if "data_offsets" in entry:
            entry["data_offsets"] = [n + 10**15 for n in entry["data_offsets"]]


def set_weight(**changes):
    return lambda found: found[WEIGHT].update(changes)


def twice(found: dict) -> bytes:
    text = json.dumps(found)
    return (text[:-1] + f', "{WEIGHT}": ' + json.dumps(found[WEIGHT]) + "}").encode()


@pytest.mark.parametrize(
    "change",
    [
        overlap,
        gap,
        beyond,
        twice,
        set_weight(shape=[64, 129]),
        set_weight(shape=[-64, -128]),
        set_weight(shape=[2**40, 2**40]),
        set_weight(shape=[10**4000] * 2),
        set_weight(shape=[1] * 10**5),
        set_weight(shape="64x128"),
        set_weight(shape=None),
        set_weight(data_offsets=[5]),
        set_weight(data_offsets=[0.5, 7]),
        set_weight(dtype=7),
        set_weight(dtype=["BF16"]),
        lambda found: found[WEIGHT].update(shape=[float(n) for n in found[WEIGHT]["shape"]]),
        lambda found: found[WEIGHT].update(data_offsets=[float(n) for n in found[WEIGHT]["data_offsets"]]),
        lambda found: found.update({WEIGHT: 3}),
        lambda found: b"[" * 10**6,
        lambda found: b"[1, 2]",
        lambda found: b"\xff\xfe",
        lambda found: b" " * (16 * 2**20 + 1),
    ],
)
def test_headers_that_lie(change, source) -> None:
    directory, lock = source
    rewrite_header(shard_of(directory), change)
    refused(directory, lock, "damaged|not JSON")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100 * 10**9, 10**9, 7])
def test_a_header_as_long_as_it_likes(length: int, source) -> None:
    """In a file that has holes, so that the length can be true."""
    directory, lock = source
    with shard_of(directory).open("r+b") as file:
        file.write(struct.pack("<Q", length))
        file.truncate(max(1000, min(length + 8, 2**43)))
    refused(directory, lock, "damaged|not JSON")


@pytest.mark.parametrize("change", [-1, 1, -5000, 10**9])
def test_a_file_of_another_length_than_its_header_says(change: int, source) -> None:
    directory, lock = source
    path = shard_of(directory)
    os.truncate(path, path.stat().st_size + change)
    refused(directory, lock, "where its header says")


def test_a_projection_of_terabytes(source) -> None:
    directory, lock = source
    rows = 2**30
    path = shard_of(directory)
    encoded = json.dumps({WEIGHT: {"dtype": "BF16", "shape": [rows, 128], "data_offsets": [0, rows * 256]}}).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded)
    os.truncate(path, 8 + len(encoded) + rows * 256)
    refused(directory, lock)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": "3"},
        {"num_hidden_layers": 4},
        {"num_attention_heads": 0},
        {"num_attention_heads": 8},
        {"head_dim": 16},
        {"hidden_size": 10**9},
        {"hidden_size": 128},
        {"hidden_size": None},
        {"model_type": 3},
        {"model_type": None},
        {"layer_types": "x"},
        {"rope_parameters": 3},
    ],
)
def test_a_config_that_disagrees_with_the_tensors(changes: dict, source) -> None:
    directory, lock = source
    rewrite_json(directory / "config.json", **changes)
    refused(directory, lock)


def test_a_config_of_millions_of_lists(source) -> None:
    directory, lock = source
    text = (directory / "config.json").read_text()
    (directory / "config.json").write_text(text.replace("{", '{"x": [' + "[]," * (6 * 2**20) + "0],", 1))
    refused(directory, lock, "larger than 16 MiB")


@pytest.mark.parametrize("depth", [70, 480, 900])
def test_a_config_that_nests(depth: int, source) -> None:
    directory, lock = source
    text = (directory / "config.json").read_text()
    (directory / "config.json").write_text(text.replace("{", '{"x": ' + "[" * depth + "]" * depth + ",", 1))
    refused(directory, lock, "nested more than 64 deep")


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("../llama", "Known families: apertus"),
        ("not-a-model", "Known families: apertus"),
        ("bert", "fastlock does not know the family bert"),
        ("mamba", "has no attention heads. It cannot be relocked exactly"),
        ("deepseek_v3", "multi-head latent attention"),
    ],
)
def test_families_that_cannot_be_relocked(model_type: str, message: str, source) -> None:
    directory, lock = source
    rewrite_json(directory / "config.json", model_type=model_type)
    refused(directory, lock, message, UnsupportedError)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "shard", "extra"])
@pytest.mark.parametrize("what", ["fifo", "directory", "device", "loop", "broken", "missing"])
def test_things_that_are_no_files(name: str, what: str, source) -> None:
    directory, lock = source
    path = shard_of(directory) if name == "shard" else directory / name
    path.unlink(missing_ok=True)
    if what == "fifo":
        os.mkfifo(path)
    elif what == "directory":
        path.mkdir()
    elif what != "missing":
        path.symlink_to({"device": "/dev/zero", "loop": path, "broken": "nowhere"}[what])
    if name == "extra" and what in ("directory", "missing"):
        return
    if what in ("directory", "missing") and name != "shard":  # it is not taken for a checkpoint
        refused(directory, lock, "Give a checkpoint's directory", FastlockError)
    else:
        refused(directory, lock)


def test_a_loop_of_directories(source) -> None:
    directory, lock = source
    (directory / "loop").symlink_to(directory)
    refused(directory, lock, "not a regular file")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float, source) -> None:
    """In a locked column they are refused; anywhere else they are none of the lock's business."""
    directory, lock = source
    path = shard_of(directory)
    for column, bad in ((0, False), (1 * 32 + 5, True)):
        tensors = load_file(path)
        tensors[WEIGHT][7, column] = value
        save_file(tensors, path, metadata={"format": "pt"})
        if bad:
            with pytest.raises(FastlockError, match="not finite"):
                fastlock.relock_checkpoint(directory, lock, directory.parent / "out")
            assert not (directory.parent / "out").exists()
        else:
            fastlock.relock_checkpoint(directory, lock, directory.parent / "fine")
            assert fastlock.verify(directory.parent / "fine", lock)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int32])
def test_weights_of_a_quantised_dtype(dtype: torch.dtype, source) -> None:
    directory, lock = source
    path = shard_of(directory)
    tensors = load_file(path)
    tensors[WEIGHT] = torch.zeros(64, 128).to(dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UnsupportedError, match="float16, bfloat16, float32 and float64. fastlock reads GPTQ"):
        fastlock.relock_checkpoint(directory, lock, directory.parent / "out")


@pytest.mark.parametrize("form", ["packed", "renamed"])
def test_quantised_weights_of_another_shape_or_name(form: str, source) -> None:
    """As bitsandbytes packs them, and as GPTQ names them."""
    directory, lock = source
    index = directory / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    path = shard_of(directory)
    tensors = load_file(path)
    weight = tensors.pop(WEIGHT)
    name = WEIGHT if form == "packed" else WEIGHT.removesuffix("weight") + "qweight"
    tensors[name] = torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)
    save_file(tensors, path, metadata={"format": "pt"})
    shard = weight_map.pop(WEIGHT)
    rewrite_json(index, weight_map=weight_map | {name: shard})
    if form == "packed":
        refused(directory, lock, "They do not belong together")
    else:
        refused(directory, lock, "is quantised, and its tensors are of no format that fastlock knows", UnsupportedError)
    rewrite_json(directory / "config.json", quantization_config={"quant_method": "gptq"})
    message = "is quantised, as its config says" if form == "packed" else "of no format that fastlock knows"
    refused(directory, lock, message, UnsupportedError)


def test_the_same_fault_has_the_same_words_here_and_at_a_url(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    messages = []
    for place in (tmp_path / "empty", "memory://nobody/there"):
        with pytest.raises(FastlockError) as raised:
            fastlock.doctor(place)
        messages.append(str(raised.value).removeprefix(str(place)))
    assert messages[0] == messages[1]
    assert messages[0].startswith(": holds no config.json. Give a checkpoint's directory")


def lies(note: dict) -> list:
    return [
        lambda: note.update(strength=-3.0),
        lambda: note.update(strength=float("1e999")),
        lambda: note.update(sites=[{"layer": 10**9, "name": "x", "heads": [0], "had_bias": False}]),
        lambda: note.update(sites=[]),
        lambda: note["sites"][0].update(had_bias=True),
        lambda: note["sites"][0].update(layer="0"),
        lambda: note.update(carrier=None),
        lambda: note["carrier"].update(stacks=7),
        lambda: note["carrier"].update(original_biases="x"),
        lambda: note["carrier"].update(config_digest=None),
        note.clear,
    ]


@pytest.mark.parametrize("which", range(11))
def test_receipts_that_lie(which: int, source) -> None:
    """Nothing breaks, nothing is called locked that is not, and `unlock` gives the original or refuses."""
    directory, lock = source
    locked = directory.parent / "locked"
    fastlock.relock_checkpoint(directory, lock, locked)
    config = json.loads((locked / "config.json").read_text())
    lies(config["fastlock"])[which]()
    (locked / "config.json").write_text(json.dumps(config))
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    for look in (lambda: fastlock.verify(locked, lock), lambda: fastlock.doctor(locked)):
        try:
            look()
        except FastlockError:
            continue
    try:
        fastlock.unlock_checkpoint(locked, directory.parent / "back")
    except FastlockError:
        assert not (directory.parent / "back").exists()
    else:
        assert {path.name: path.read_bytes() for path in (directory.parent / "back").iterdir()} == before


# Seeds are kept: the same examples each time.
FUZZ = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def try_it(directory: Path, lock) -> None:
    out = directory.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    try:
        fastlock.relock_checkpoint(directory, lock, out)
    except FastlockError:
        assert not out.exists()
    else:
        assert fastlock.verify(out, lock)
    try:
        fastlock.verify(directory, lock)
        fastlock.doctor(directory)
    except FastlockError:
        pass


@FUZZ
@given(data=st.data())
def test_any_byte_changed(data, plain, tmp_path_factory) -> None:
    directory = tmp_path_factory.mktemp("fuzz") / "source"
    shutil.copytree(plain[0], directory)
    path = data.draw(st.sampled_from(sorted(directory.glob("*.json")) + sorted(directory.glob("*.safetensors"))))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content), 3000) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try_it(directory, plain[1])
    shutil.rmtree(directory.parent)


@FUZZ
@given(data=st.data())
def test_any_json_value_changed(data, plain, tmp_path_factory) -> None:
    directory = tmp_path_factory.mktemp("fuzz") / "source"
    shutil.copytree(plain[0], directory)
    name = data.draw(st.sampled_from(["config.json", "model.safetensors.index.json", "header"]))
    value = data.draw(JSON)
    if name == "header":

        def change(found: dict) -> None:
            entry = found[data.draw(st.sampled_from(sorted(found)))]
            entry[data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = value

        rewrite_header(shard_of(directory), change)
    else:
        content = json.loads((directory / name).read_text())
        content[data.draw(st.sampled_from(sorted(content)))] = value
        (directory / name).write_text(json.dumps(content))
    try_it(directory, plain[1])
    shutil.rmtree(directory.parent)
