"""Reading in batches: as one text at a time, in bounded memory, and on again after an interruption."""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch

from fastlock import DamagedError, FastlockError
from fastlock.models.sites import sites
from fastlock.recipes import activations
from fastlock.recipes.activations import Activations, ReadText, activations_of
from tests.helpers.families import CONFIGS, tiny_gemma3, tiny_model, tokens

LENGTHS = (3, 3, 7, 12, 25, 40)


def texts(lengths: Sequence[int] = LENGTHS) -> list[ReadText]:
    return [
        ReadText(tokens(length, seed=n)[0].tolist(), min(length, 5), f"text {n}") for n, length in enumerate(lengths, 1)
    ]


def plain(items: Sequence[Any], _description: str) -> Sequence[Any]:
    return items


def read(model: Any, given: Sequence[ReadText], progress: Any = plain, work: Any = None) -> Any:
    """Every vector, [layers, heads, vectors, head_dim]."""
    with activations_of(model, sites(model), given, progress, work) as found:
        return found.read(slice(None), slice(None))


def one_at_a_time(model: Any, given: Sequence[ReadText]) -> Any:
    """The same, by hooks on the layers' own projections, each text alone with a mask of ones."""
    parts = []
    for text in given:
        seen: list[torch.Tensor] = []
        handles = [
            site.module.register_forward_hook(lambda _m, args, _out, seen=seen: seen.append(args[0]))
            for site in sites(model)
        ]
        with torch.no_grad():
            ids = torch.tensor([text.ids])
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
        for handle in handles:
            handle.remove()
        kept = torch.stack([x[0, -text.kept :] for x in seen]).float()
        parts.append(kept.reshape(*kept.shape[:2], sites(model)[0].num_heads, -1).transpose(1, 2))
    return torch.cat(parts, dim=2).numpy()


def assert_close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("kind", [*CONFIGS, "gemma3"])
def test_a_batch_is_read_as_each_text_alone(kind: str) -> None:
    """In float64, in which a mask over padding would make NaN of it: eager attention, some with a window of 4.

    Many families compute their norms in float32 all the same, whence the tolerance.
    """
    model = tiny_gemma3(torch.float64) if kind == "gemma3" else tiny_model(kind, torch.float64)
    assert len(activations._batches(texts())) == 1
    assert_close(read(model, texts()), one_at_a_time(model, texts()))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_in_the_dtypes_and_attentions_that_are_used(attention: str) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        model: Any = tiny_model("llama", dtype)
        model.set_attn_implementation(attention)
        assert_close(read(model, texts()), one_at_a_time(model, texts()), tolerance)


def test_batches_hold_so_many_tokens_or_one_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "BATCH_TOKENS", 24)
    given = texts()
    batches = activations._batches(given)
    assert [list(batch) for batch in batches] == [[0, 1, 2], [3], [4], [5]]
    assert [list(batch) for batch in activations._batches(texts([12, 12, 12]))] == [[0, 1], [2]]
    model = tiny_model("llama", torch.float64)
    assert_close(read(model, given), one_at_a_time(model, given))


class Memory:
    """A model whose memory runs out with more than so many texts at once."""

    def __init__(self, model: Any, most: int, error: Callable[[], Exception]) -> None:
        self.model, self.most, self.error, self.sizes = model, most, error, list[int]()

    def __enter__(self) -> list[int]:
        def check(_module: Any, _args: Any, keywords: dict[str, Any]) -> None:
            self.sizes.append(len(keywords["input_ids"]))
            if self.sizes[-1] > self.most:
                raise self.error()

        self.handle = self.model.base_model.register_forward_pre_hook(check, with_kwargs=True)
        return self.sizes

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def test_a_batch_is_halved_as_often_as_memory_runs_out() -> None:
    def out_of_memory() -> Exception:
        return torch.OutOfMemoryError("CUDA out of memory")

    model = tiny_model("llama", torch.float64)
    with Memory(model, 2, out_of_memory) as sizes:
        found = read(model, texts())
    assert sizes == [6, 3, 1, 2, 3, 1, 2]
    assert_close(found, one_at_a_time(model, texts()))
    with Memory(model, 1, out_of_memory):
        assert_close(read(model, texts()), one_at_a_time(model, texts()))
    with (
        Memory(model, 0, out_of_memory) as sizes,
        pytest.raises(FastlockError, match=r"memory runs out with text 1 \(3 tokens\) alone"),
    ):
        read(model, texts())
    assert sizes == [6, 3, 1]


def test_nan_is_reported_with_its_layer_and_its_text() -> None:
    model: Any = tiny_model("llama")
    given = texts()
    odd = [ReadText([*given[3].ids[:-1], 120], 5, "the odd one")]
    model.get_input_embeddings().weight.data[120] = float("inf")
    with pytest.raises(DamagedError, match=r"model\.layers\.0\.self_attn\.o_proj: NaN.* in reading the odd one\. "):
        read(model, given[:3] + odd + given[4:])
    read(model, given)


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


def stopping(after: int) -> Callable[[Sequence[Any], str], Iterator[Any]]:
    """Ctrl-C after so many batches."""

    def progress(items: Sequence[Any], _description: str) -> Iterator[Any]:
        for n, item in enumerate(items):
            if n == after:
                raise KeyboardInterrupt
            yield item

    return progress


def test_nothing_temporary_stays(scratch: Path) -> None:
    model = tiny_model("llama")
    with activations_of(model, sites(model), texts(), plain) as found:
        assert scratch in found.path.parents
        assert found.path.stat().st_size == found.nbytes == 4 * 3 * 4 * 26 * 32
    assert not list(scratch.iterdir())
    with pytest.raises(KeyboardInterrupt):
        read(model, texts(), stopping(after=0))
    assert not list(scratch.iterdir())


def test_too_small_a_disk_is_noticed_before_the_reading(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    size = 4 * 3 * 4 * 26 * 32
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(0, 0, size - 1))
    with Memory(model, 9, MemoryError) as sizes, pytest.raises(FastlockError, match=r"0\.0 GB are free.*TMPDIR"):
        read(model, texts())
    assert sizes == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(0, 0, size))
    read(model, texts())


def test_memory_does_not_grow_with_the_texts() -> None:
    """What NumPy and Python hold at most: a batch. The file grows fourfold."""
    model = tiny_model("llama", max_position_embeddings=64)
    peaks = []
    for count in (200, 200, 800):
        given = texts([30] * count)
        tracemalloc.start()
        with activations_of(model, sites(model), given, plain) as found:
            peaks.append(tracemalloc.get_traced_memory()[1])
            assert found.nbytes == 4 * 3 * 4 * 32 * 5 * count
        tracemalloc.stop()
    assert peaks[2] < 1.2 * peaks[1] < found.nbytes / 2


def test_layers_that_are_offloaded(tmp_path: Path) -> None:
    expected = read(tiny_model("llama"), texts())
    offloaded = accelerate.cpu_offload(tiny_model("llama"), execution_device=torch.device("cpu"))
    np.testing.assert_array_equal(read(offloaded, texts()), expected)
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    mapped = accelerate.dispatch_model(
        tiny_model("llama"), device_map, main_device="cpu", offload_dir=str(tmp_path / "offload")
    )
    np.testing.assert_array_equal(read(mapped, texts()), expected)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "BATCH_TOKENS", 24)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_interrupted_reading_goes_on(tmp_path: Path, after: int) -> None:
    model = tiny_model("llama")
    expected = read(model, texts())
    with pytest.raises(KeyboardInterrupt):
        read(model, texts(), stopping(after), tmp_path / "work")
    with Memory(model, 9, MemoryError) as sizes:
        np.testing.assert_array_equal(read(model, texts(), plain, tmp_path / "work"), expected)
    # The first batch is read again, to see that it is the same model; all of it is read where nothing was.
    assert sizes == ([3] if after else []) + [3, 1, 1, 1][after:]
    with Memory(model, 9, MemoryError) as sizes:
        np.testing.assert_array_equal(read(model, texts(), plain, tmp_path / "work"), expected)
    assert sizes == [3]


@pytest.mark.usefixtures("small_batches")
def test_a_batch_half_written_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, write = tiny_model("llama"), Activations.write

    def full(self: Activations, start: int, block: Any) -> None:
        write(self, start, block if start == 0 else block * 0)
        if start:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Activations, "write", full)
    with pytest.raises(OSError, match="No space left"):
        read(model, texts(), plain, tmp_path)
    monkeypatch.setattr(Activations, "write", write)
    np.testing.assert_array_equal(read(model, texts(), plain, tmp_path), read(model, texts()))


@pytest.mark.usefixtures("small_batches")
def test_a_directory_with_other_files_is_refused(tmp_path: Path) -> None:
    """What a killed write leaves, and other hidden files, are no hindrance to going on."""
    model = tiny_model("llama")
    expected = read(model, texts(), plain, tmp_path / "work")
    (tmp_path / "work" / ".index.json.0f0f0f0f.tmp").write_text("{")
    np.testing.assert_array_equal(read(model, texts(), plain, tmp_path / "work"), expected)
    for name in ("config.json", "empty"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        with pytest.raises(FastlockError, match=r"it holds other files \(config\.json\)\. Give a new directory"):
            read(model, texts(), plain, tmp_path / name)
        assert [path.name for path in (tmp_path / name).iterdir()] == ["config.json"]


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    model = tiny_model("llama")
    for work, message in {"file": "is not a directory", "file/work": "cannot be written"}.items():
        with pytest.raises(FastlockError, match=f"{work}: .*{message}.*Give another directory"):
            read(model, texts(), plain, tmp_path / work)


def damaged(work: Path, **changes: Any) -> None:
    index = json.loads((work / "index.json").read_text())
    (work / "index.json").write_text(json.dumps(index | changes))


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda work: (work / "index.json").write_text("{"), "fastlock did not write its index.json"),
        (lambda work: (work / "index.json").write_text("[]"), "fastlock did not write its index.json"),
        (lambda work: (work / "index.json").write_text("[" * 4000), "fastlock did not write its index.json"),
        (lambda work: (work / "index.json").write_bytes(b"\xff"), "fastlock did not write its index.json"),
        (lambda work: (work / "index.json").write_text(" " * 5000), "larger than"),
        (lambda work: (work / "index.json").unlink(), "index.json: does not exist"),
        (lambda work: damaged(work, format="other"), "made with other texts, by another model"),
        (lambda work: damaged(work, digest=None), "made with other texts, by another model"),
        (lambda work: damaged(work, texts=2), "its index.json is damaged"),
        (lambda work: damaged(work, texts=-1), "its index.json is damaged"),
        (lambda work: damaged(work, texts=[]), "its index.json is damaged"),
        (lambda work: (work / "activations.bin").unlink(), "its activations.bin is damaged"),
        (lambda work: (work / "activations.bin").write_bytes(b"short"), "its activations.bin is damaged"),
        (lambda work: (work / "activations.bin").write_bytes(bytes(39936)), "computes other activations now"),
    ],
)
def test_a_damaged_directory_is_refused(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    model = tiny_model("llama")
    read(model, texts(), plain, tmp_path)
    damage(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FastlockError, match=message) as error:
        read(model, texts(), plain, tmp_path)
    if "is damaged" in message or "did not write" in message:
        assert isinstance(error.value, DamagedError)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.usefixtures("small_batches")
def test_a_directory_of_another_reading_is_refused(tmp_path: Path) -> None:
    read(tiny_model("llama"), texts(), plain, tmp_path)
    others: dict[str, tuple[Any, list[ReadText], str]] = {
        "weights": (tiny_model("llama", seed=1), texts(), "computes other activations now"),
        "dtype": (tiny_model("llama", torch.bfloat16), texts(), "computes other activations now|by another model"),
        "family": (tiny_model("qwen3"), texts(), "by another model"),
        "texts": (tiny_model("llama"), texts((3, 3, 7, 12, 25, 39)), "other texts"),
        "kept": (tiny_model("llama"), [ReadText(t.ids, 2, t.name) for t in texts()], "other texts"),
    }
    for model, given, message in others.values():
        with pytest.raises(FastlockError, match=message):
            read(model, given, plain, tmp_path)
