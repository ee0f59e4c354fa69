"""How many checkpoints a second `relock_zoo` relocks, against as many lone processes, and how much memory it takes.

1,000 tiny checkpoints, and 50 of Llama-3-8B's shape (files with holes).
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from bench.lib.printed import PrintedTable, say
from bench.lib.shares import rate_of_shares
from bench.lib.sparse_checkpoints import sparse_checkpoint
from fastlock import Lock, relock_checkpoint
from fastlock.zoo.run import Summary, relock_zoo

HEADS, SAMPLE_SECONDS = 24, 0.1
GEOMETRY = {"tiny": (3, 4, 32), "8b": (32, 32, 128)}  # layers, heads, head_dim


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", type=int, default=1000, help="how many tiny checkpoints")
    parser.add_argument("--large", type=int, default=50, help="how many of Llama-3-8B's shape")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--directory", type=Path, help="where to work; default: a temporary directory")
    options = parser.parse_args()
    for shape, count in (("tiny", options.tiny), ("8b", options.large)):
        if count:
            with tempfile.TemporaryDirectory(dir=options.directory) as folder:
                measure(Path(folder), shape, count, options.workers)
    return 0


def measure(folder: Path, shape: str, count: int, workers: int) -> None:
    """Make a zoo, relock it alone, side by side and with `relock_zoo`, and say what came out."""
    lock = random_lock(shape)
    for number in range(count):
        make(folder / "zoo" / f"{number:04d}", shape, lock, number)
    rate_of(workers, folder, lock, count)  # brings the files into memory
    alone = rate_of(1, folder, lock, count)
    beside = rate_of(workers, folder, lock, count)
    with Memory() as memory:
        start = time.perf_counter()
        summary = relock_zoo([folder / "zoo"], lock, folder / "out", workers=workers)
        whole = count / (time.perf_counter() - start)
    if not summary:
        raise RuntimeError(f"relock_zoo failed: {summary.to_dict()}")
    steady = count / span(summary)
    say(f"{count} checkpoints, {shape}, {workers} workers:")
    rates = PrintedTable(["", "checkpoints/s", "of workers × alone"])
    rates.row("one process alone", f"{alone:.1f}", "")
    for who, rate in {
        f"{workers} processes side by side, without zoo": beside,
        "zoo, once the workers are there": steady,
        "zoo, from call to return": whole,
    }.items():
        rates.row(who, f"{rate:.1f}", f"{rate / alone / workers:.0%}")
    sizes = PrintedTable(["memory (RSS, MB) at", "25 %", "50 %", "75 %", "100 % of the run"])
    for who, quarters in memory.quarters().items():
        sizes.row(who, *(f"{size / 1e6:.0f}" for size in quarters))


def random_lock(shape: str) -> Lock:
    layers, heads, head_dim = GEOMETRY[shape]
    chosen = torch.randperm(layers * heads)[:HEADS]
    directions = torch.randn(len(chosen), head_dim)
    return Lock(
        layers=chosen // heads,
        heads=chosen % heads,
        directions=directions / directions.norm(dim=1, keepdim=True),
        scales=torch.rand(len(chosen)) + 0.1,
    )


def make(directory: Path, shape: str, lock: Lock, seed: int) -> None:
    """A checkpoint of random weights; of the tiny ones, only the first is computed."""
    first = directory.with_name("0000")
    if shape == "tiny" and directory != first:
        shutil.copytree(first, directory)
    elif shape == "tiny":
        from transformers import LlamaConfig, LlamaForCausalLM

        layers, heads, head_dim = GEOMETRY[shape]
        config = LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=2,
            head_dim=head_dim,
        )
        LlamaForCausalLM(config).save_pretrained(directory)
    else:
        sparse_checkpoint(directory, shape=shape, lock=lock, seed=seed)


def rate_of(processes: int, folder: Path, lock: Lock, count: int) -> float:
    """Checkpoints per second of that many processes that relock their share one after the other."""
    lock.save(folder / "lock.safetensors")
    ready = multiprocessing.get_context("spawn").Barrier(processes)
    rate = rate_of_shares(relock_share, (folder, count, ready), processes, count)
    shutil.rmtree(folder / "alone")
    return rate


def relock_share(folder: Path, count: int, ready: Any, rank: int, processes: int, results: Any) -> None:
    torch.set_num_threads(1)
    lock = Lock.load(folder / "lock.safetensors")
    relock_checkpoint(folder / "zoo" / "0000", lock, folder / "alone" / f"warm{rank}")
    ready.wait()
    start = time.time()
    for number in range(rank, count, processes):
        relock_checkpoint(folder / "zoo" / f"{number:04d}", lock, folder / "alone" / f"{number:04d}")
    results.put((start, time.time()))


def span(summary: Summary) -> float:
    """Seconds from the first task's beginning to the last one's end."""
    return max(r.time for r in summary.results) - min(r.time - r.seconds for r in summary.results)


class Memory:
    """Samples the memory of this process, and of the largest of those that it started."""

    def __enter__(self) -> Memory:
        self.samples: list[tuple[int, int]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            others = [resident(pid) for pid in descendants(os.getpid())]
            self.samples.append((resident(os.getpid()), max(others, default=0)))

    def quarters(self) -> dict[str, list[int]]:
        """The most in each quarter of the run."""
        ends = [len(self.samples) * part // 4 for part in range(5)]
        parts = [self.samples[a : max(b, a + 1)] for a, b in itertools.pairwise(ends)]
        return {
            "main process": [max(main for main, _ in part) for part in parts],
            "largest worker": [max(worker for _, worker in part) for part in parts],
        }


def descendants(pid: int) -> list[int]:
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []
    return children + [below for child in children for below in descendants(child)]


def resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


if __name__ == "__main__":
    sys.exit(main())
