"""What a checkpoint on disk is folded from, in however many threads, and the digest of it."""

import hashlib
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save, save_file

import fastlock
from fastlock.checkpoints import folding
from fastlock.checkpoints.checkpoint import Checkpoint, StoredColumns
from fastlock.checkpoints.relocked import read_receipt
from fastlock.checkpoints.tensor_index import shard_with
from tests.helpers.families import random_lock, tiny_model


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest):
    """As many threads as torch is allowed."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def source(tmp_path):
    """A checkpoint of six layers, its model, and a lock of all of them."""
    model = tiny_model("llama", torch.bfloat16, num_hidden_layers=6)
    model.save_pretrained(tmp_path / "source")
    lock = random_lock(model, [(layer, head) for layer in range(6) for head in ((1, 3) if layer % 2 else (2,))])
    return tmp_path / "source", model, lock


def written(directory) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("batch_bytes", [1, 2**25])
def test_the_files_are_the_same_however_many_threads_and_batches(source, threads, batch_bytes, tmp_path, monkeypatch):
    directory, _, lock = source
    torch.set_num_threads(1)
    fastlock.relock_checkpoint(directory, lock, tmp_path / "alone")
    torch.set_num_threads(threads)
    monkeypatch.setattr(folding, "_BATCH_BYTES", batch_bytes)
    fastlock.relock_checkpoint(directory, lock, tmp_path / "shared")
    assert written(tmp_path / "shared") == written(tmp_path / "alone")


def test_the_digest_is_of_the_locked_columns_by_layer(source, threads, tmp_path) -> None:
    """As docs/receipt-format.md defines it, from the weights as safetensors reads them."""
    directory, _, lock = source
    receipt = fastlock.relock_checkpoint(directory, lock, tmp_path / "out")
    weights, whole = load_file(directory / "model.safetensors"), hashlib.sha256()
    head_dim = lock.head_dim
    for layer in sorted(set(lock.layers.tolist())):
        weight = weights[f"model.layers.{layer}.self_attn.o_proj.weight"]
        heads = sorted(head for at, head in zip(lock.layers.tolist(), lock.heads.tolist(), strict=True) if at == layer)
        columns = torch.cat([weight[:, head * head_dim : (head + 1) * head_dim] for head in heads], dim=1)
        whole.update(hashlib.sha256(columns.contiguous().view(torch.uint8).numpy().tobytes()).digest())
    assert receipt.weights_digest == whole.hexdigest()
    assert read_receipt(tmp_path / "out").to_dict() == receipt.to_dict()


def test_the_columns_of_one_batch_are_kept_at_a_time(source, tmp_path, monkeypatch) -> None:
    """Before another batch is read, the digests of the earlier one are taken."""
    directory, _, lock = source
    kept, most, guard = 0, 0, threading.Lock()
    read, digest = Checkpoint.read_columns, StoredColumns

    def counted_read(self, site, heads, room=None):
        nonlocal kept, most
        with guard:
            kept += 1
            most = max(most, kept)
        columns = read(self, site, heads, room)

        def counted_digest() -> bytes:
            nonlocal kept
            time.sleep(0.03)  # in which whoever does not wait for it would read on
            with guard:
                kept -= 1
            return columns.digest()

        return digest(columns.stored, counted_digest)

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    monkeypatch.setattr(Checkpoint, "read_columns", counted_read)
    monkeypatch.setattr(folding, "_BATCH_BYTES", 1)
    try:
        fastlock.relock_checkpoint(directory, lock, tmp_path / "out")
    finally:
        torch.set_num_threads(before)
    assert (kept, most) == (0, 1)


def test_the_longest_are_begun_first_and_no_fold_waits_for_a_digest(source, tmp_path, monkeypatch) -> None:
    """No thread ends with the longest site, alone."""
    directory, _, lock = source
    begun, done = list[int](), list[str]()
    read, begin = Checkpoint.read_columns, folding._Folding.begin

    def noted_begin(self, function, *arguments):
        if arguments:
            begun.append(len(self.displacements[arguments[0].layer].heads))
        return begin(self, function, *arguments)

    def noted_read(self, site, heads, room=None):
        columns = read(self, site, heads, room)
        done.append("read")
        return StoredColumns(columns.stored, lambda: done.append("digest") or columns.digest())

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(Checkpoint, "read_columns", noted_read)
    monkeypatch.setattr(folding._Folding, "begin", noted_begin)
    try:
        fastlock.relock_checkpoint(directory, lock, tmp_path / "out")
    finally:
        torch.set_num_threads(before)
    assert begun == [2, 2, 2, 1, 1, 1]
    assert done[:5] == ["read"] * 5  # the other thread may be at the sixth
    assert sorted(done) == ["digest"] * 6 + ["read"] * 6


@pytest.mark.parametrize("where", ["read_columns", "digest"])
def test_what_goes_wrong_in_another_thread_leaves_nothing(source, threads, where, tmp_path, monkeypatch) -> None:
    directory, _, lock = source
    read = Checkpoint.read_columns

    def broken(self, site, heads, room=None):
        def no_digest() -> bytes:
            raise MemoryError("no memory here")

        if where == "read_columns" and site.layer == 4:
            no_digest()
        columns = read(self, site, heads, room)
        return StoredColumns(columns.stored, no_digest if site.layer == 4 else columns.digest)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "read_columns", broken)
        with pytest.raises(MemoryError, match="no memory here"):
            fastlock.relock_checkpoint(directory, lock, tmp_path / "parent" / "out")
    assert not (tmp_path / "parent" / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "parent") == ["source"]
    assert torch.get_num_threads() == threads
    fastlock.relock_checkpoint(directory, lock, tmp_path / "parent" / "out")
    assert fastlock.verify(tmp_path / "parent" / "out", lock)


def test_weights_that_are_not_finite_are_named_by_layer(source, threads, tmp_path) -> None:
    directory, _, lock = source
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.3.self_attn.o_proj.weight"][5, 3 * lock.head_dim] = torch.nan
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(fastlock.DamagedError, match=r"layers\.3\.self_attn\.o_proj: its fold is not finite"):
        fastlock.relock_checkpoint(directory, lock, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_shard_is_what_safetensors_writes() -> None:
    """Names with what JSON escapes, of every dtype that a bias can have, some of the same memory."""
    zeros = torch.zeros(40, dtype=torch.bfloat16)
    tensors = {f'b{i}.é"\\\n': torch.randn(3 * i + 1).to(dtype) for i, dtype in enumerate(3 * DTYPES)}
    tensors |= {"model.layers.0.bias": zeros[:8], "a": zeros[:40]}
    assert shard_with(tensors) == save({name: t.clone() for name, t in tensors.items()}, metadata={"format": "pt"})


DTYPES = [torch.float32, torch.float16, torch.float64, torch.bfloat16]
