"""What enters each attention output projection while a model reads texts: computed in batches, kept on disk.

It is one file of float32: memory holds one batch of texts, and later one group of heads, however many texts there are.
In a directory of the user's it outlasts the process, and an interrupted reading resumes there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fastlock.errors import DamagedError, FastlockError
from fastlock.inference.batching import Progress, in_halves
from fastlock.inference.generation import evaluating, input_device
from fastlock.models.sites import Site
from fastlock.storage.files import read_bounded, write_atomic
from fastlock.storage.places import as_path, writable_directory

# How many tokens are read together, padding included: some 25 short texts. A longer text is read alone, also because a
# model with longrope uses other frequencies for a whole batch once one of its texts is beyond 4096 tokens or so.
BATCH_TOKENS = 1024
INDEX, VECTORS = "index.json", "activations.bin"
_FORMAT = "fastlock-activations 1"
_MAX_INDEX_BYTES = 4096


def work_directory(directory: str | os.PathLike[str]) -> Path:
    """A directory for a reading, made where there is none; it may hold nothing but what a reading leaves there.

    Raises:
        FastlockError: it cannot be written, or holds other files.
    """
    path = writable_directory(directory)
    for file in sorted(path.iterdir()):
        if file.name not in (INDEX, VECTORS) and not file.name.startswith("."):  # a killed write leaves hidden files
            raise FastlockError(f"{path}: it holds other files ({file.name}). Give a new directory, or an empty one.")
    return path


@dataclass(frozen=True)
class ReadText:
    """Tokens to read.

    Attributes:
        ids: the tokens.
        kept: at how many tokens, counted from the end, the activations are kept: the text's vectors.
        name: what messages call it, such as "pair 3".
    """

    ids: Sequence[int]
    kept: int
    name: str


T = TypeVar("T", bound=ReadText)


@dataclass(frozen=True)
class Activations:
    """The vectors of all texts, in a file in which those of one head lie together.

    Attributes:
        path: the file.
        shape: (num_layers, num_heads, vectors, head_dim), float32 in the machine's byte order.
    """

    path: Path
    shape: tuple[int, int, int, int]

    @property
    def nbytes(self) -> int:
        """The size of the whole file."""
        return 4 * math.prod(self.shape)

    def read(self, layer: slice | int, heads: slice, vectors: slice = slice(None)) -> npt.NDArray[np.float32]:
        """Some of the vectors, in memory: [layers, heads, vectors, head_dim], without the first for a single layer."""
        return np.array(np.memmap(self.path, np.float32, "r", shape=self.shape)[layer, heads, vectors])

    def write(self, start: int, block: npt.NDArray[np.float32]) -> None:
        """Write a block, [num_layers, num_heads, some vectors, head_dim], from the vector `start` on."""
        _, num_heads, vectors, head_dim = self.shape
        with self.path.open("r+b") as file:  # not through a memory map, which kills the process on a full disk
            for layer, head in np.ndindex(block.shape[:2]):
                file.seek(4 * head_dim * ((layer * num_heads + head) * vectors + start))
                file.write(block[layer, head].tobytes())


@contextlib.contextmanager
def activations_of(
    model: nn.Module,
    all_sites: Sequence[Site],
    texts: Sequence[ReadText],
    progress: Progress,
    work: str | os.PathLike[str] | None = None,
) -> Iterator[Activations]:
    """The activations at the kept tokens of all texts, one text after the other.

    Args:
        model: a transformers model; afterwards it is as it was.
        all_sites: its sites.
        texts: sorted by length, which saves padding.
        progress: wraps the batches.
        work: a directory that keeps what was read, and where a reading of the same texts by the same model resumes; by
            default a temporary one, removed at the end.

    Raises:
        DamagedError: an activation is NaN or infinite, or `work` is damaged.
        FastlockError: memory runs out with one text, there is too little room on the disk, or `work` is of another
            reading, holds other files or cannot be written.
    """
    kept = None if work is None else work_directory(work)
    starts = [0, *np.cumsum([text.kept for text in texts]).tolist()]
    shape = (len(all_sites), all_sites[0].num_heads, starts[-1], all_sites[0].head_dim)
    batches = _batches(texts)
    with contextlib.nullcontext(kept) if kept else tempfile.TemporaryDirectory(prefix="fastlock-") as directory:
        activations = Activations(as_path(directory) / VECTORS, shape)
        index = None if work is None else _Index(activations, _digest(model, shape, texts))
        done = index.texts_read([0, *(batch.stop for batch in batches)]) if index else 0
        _check_room(activations, shape[2] - starts[done])
        if not done:
            _make(activations)
        with evaluating(model):
            if index and done:
                index.check_same(_read(model, all_sites, [texts[i] for i in batches[0]]))
            for batch in progress([batch for batch in batches if batch.start >= done], "Reading answers"):
                activations.write(starts[batch.start], _read(model, all_sites, [texts[i] for i in batch]))
                if index:
                    index.record(batch.stop)
        yield activations


def read_in_batches(
    model: nn.Module, some_sites: Sequence[Site], texts: Sequence[T], progress: Progress
) -> Iterator[tuple[list[T], npt.NDArray[np.float32]]]:
    """Some texts after others, and what entered the projections at their kept tokens; nothing is stored.

    Args:
        model: a transformers model; afterwards it is as it was.
        some_sites: those of its sites that are read.
        texts: sorted by length, which saves padding.
        progress: wraps the batches.

    Yields:
        The texts of a batch, and their vectors, [sites, num_heads, vectors, head_dim].

    Raises:
        DamagedError: an activation is NaN or infinite.
        FastlockError: memory runs out with one text.
    """
    with evaluating(model):
        for batch in progress(_batches(texts), "Reading texts"):
            some = [texts[i] for i in batch]
            yield some, _read(model, some_sites, some)


def _batches(texts: Sequence[ReadText]) -> list[range]:
    """Which neighbouring texts are read together: up to `BATCH_TOKENS` tokens, or a single text."""
    batches, start = [], 0
    for stop in range(1, len(texts) + 1):
        if stop == len(texts) or (stop - start + 1) * max(len(t.ids) for t in texts[start : stop + 1]) > BATCH_TOKENS:
            batches.append(range(start, stop))
            start = stop
    return batches


def _read(model: nn.Module, all_sites: Sequence[Site], batch: Sequence[ReadText]) -> npt.NDArray[np.float32]:
    """The vectors of a batch's texts, [num_layers, num_heads, vectors, head_dim]; read in halves if memory runs out."""

    def work(half: Sequence[ReadText]) -> list[npt.NDArray[np.float32]]:
        return [_read_at_once(model, all_sites, half)]

    blocks = in_halves(batch, work, lambda text: f"{text.name} ({len(text.ids)} tokens)")
    return np.concatenate(blocks, axis=2)


def _read_at_once(model: nn.Module, all_sites: Sequence[Site], batch: Sequence[ReadText]) -> npt.NDArray[np.float32]:
    """The vectors of a batch's texts, in one forward pass.

    Shorter texts are padded with their own last token. No attention mask is needed: in a causal model, what follows a
    token does not act on it. Nor would one do: the padding's rows could become NaN, and spread in the next layers.
    """
    width = max(len(text.ids) for text in batch)
    padded = [[*text.ids, *[text.ids[-1]] * (width - len(text.ids))] for text in batch]
    rows = torch.tensor([row for row, text in enumerate(batch) for _ in range(text.kept)], device="cpu")
    ends = [range(len(text.ids) - text.kept, len(text.ids)) for text in batch]
    positions = torch.tensor([position for end in ends for position in end], device="cpu")
    num_heads, head_dim = all_sites[0].num_heads, all_sites[0].head_dim
    block = np.empty((len(all_sites), num_heads, len(rows), head_dim), dtype=np.float32)
    reader: Any = model.base_model  # without the logits: a fifth of the work in a small model
    with _inputs_of(all_sites, rows, positions) as inputs:
        reader(input_ids=torch.tensor(padded, device=input_device(model)), use_cache=False)
        for number, site in enumerate(all_sites):
            kept = inputs[site.layer].float().cpu().numpy()
            finite = np.isfinite(kept).all(axis=1)
            if not finite.all():
                raise DamagedError(
                    f"{site.name}: NaN or infinite activations in reading {batch[int(rows[finite.argmin()])].name}. "
                    "The weights are damaged, or overflow in this dtype: load the model in bfloat16 or float32."
                )
            block[number] = kept.reshape(-1, num_heads, head_dim).transpose(1, 0, 2)
    return block


@contextlib.contextmanager
def _inputs_of(
    all_sites: Sequence[Site], rows: torch.Tensor, positions: torch.Tensor
) -> Iterator[dict[int, torch.Tensor]]:
    """A dictionary that a forward pass fills: for each layer, what enters its projection at some tokens, [n, width]."""
    inputs: dict[int, torch.Tensor] = {}
    with contextlib.ExitStack() as hooks:
        for site in all_sites:

            def keep(_module: nn.Module, args: tuple[torch.Tensor, ...], layer: int = site.layer) -> None:
                inputs[layer] = args[0][rows.to(args[0].device), positions.to(args[0].device)]

            hooks.callback(site.outer.register_forward_pre_hook(keep).remove)
        yield inputs


def _make(activations: Activations) -> None:
    with activations.path.open("wb") as file:
        file.truncate(activations.nbytes)


def _check_room(activations: Activations, vectors: int) -> None:
    """Refuse a disk without room for so many more vectors."""
    needed = activations.nbytes // activations.shape[2] * vectors
    free = shutil.disk_usage(activations.path.parent).free
    if needed > free:
        raise FastlockError(
            f"{activations.path.parent}: the activations take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free. "
            "Choose a directory on a larger disk (`work`, or the environment variable TMPDIR), or give fewer pairs."
        )


def _digest(model: nn.Module, shape: Sequence[int], texts: Sequence[ReadText]) -> str:
    """SHA-256 (hex) of what is to be read, and of the model's config; its weights do not count."""
    config: Any = model.config
    facts = [config.to_dict(), list(shape), BATCH_TOKENS, [[list(text.ids), text.kept] for text in texts]]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


class _Index:
    """How far a reading in a directory of the user's has come."""

    def __init__(self, activations: Activations, digest: str) -> None:
        self.activations = activations
        self.digest = digest
        self.path = activations.path.with_name(INDEX)

    def texts_read(self, possible: Sequence[int]) -> int:
        """How many texts were read before, one of `possible`; where there is no index, it is made.

        Raises:
            DamagedError: the directory is damaged.
            FastlockError: it is of another reading.
        """
        if not self.path.exists() and not self.activations.path.exists():
            self.record(0)
        try:
            index = json.loads(read_bounded(self.path, _MAX_INDEX_BYTES))
            same = index["format"] == _FORMAT and index["digest"] == self.digest
            done = index["texts"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DamagedError(self._refusal(f"fastlock did not write its {INDEX} ({type(error).__name__})")) from None
        if not same:
            raise FastlockError(
                self._refusal("it was made with other texts, by another model, or with another version of fastlock")
            )
        if done not in possible:
            raise DamagedError(self._refusal(f"its {INDEX} is damaged"))
        file = self.activations.path
        if done and not (file.is_file() and file.stat().st_size == self.activations.nbytes):
            raise DamagedError(self._refusal(f"its {VECTORS} is damaged"))
        return int(done)

    def record(self, texts: int) -> None:
        """Note that so many texts have been read and are on the disk."""
        if texts:
            with self.activations.path.open("rb") as file:
                os.fsync(file.fileno())
        index = {"format": _FORMAT, "digest": self.digest, "texts": texts}
        write_atomic(self.path, json.dumps(index).encode())

    def check_same(self, block: npt.NDArray[np.float32]) -> None:
        """Refuse a model that reads the first batch differently, by a single bit, from what is in the file.

        Raises:
            FastlockError: it does.
        """
        before = self.activations.read(slice(None), slice(None), slice(block.shape[2]))
        if not np.array_equal(before, block):
            raise FastlockError(
                self._refusal("the model computes other activations now: its weights, its dtype or the machine differ")
            )

    def _refusal(self, reason: str) -> str:
        return f"{self.path.parent}: {reason}. Give another directory, or remove this one and start again."
