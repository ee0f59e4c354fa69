"""`relock_checkpoint` on quantised checkpoints of Llama-3 8B's shape against the same in bfloat16, with its lock.

The page cache is warm, and torch has two threads. The formats take turns, one relock each in a round; who begins
changes from round to round. "Over bf16" is the time over that of bfloat16 in the same round. "Columns" is what the
locked columns take, scales and zero points not counted; "read" is all that a relock reads or maps, headers and configs,
too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

from bench.lib.figures import interval_of_median, span_text
from bench.lib.printed import PrintedTable, say
from bench.lib.sparse_checkpoints import SHAPES, lock_for
from bench.lib.sparse_quantised import FORMATS, column_bytes, sparse_quantised
from bench.lib.workloads import STRENGTH
from fastlock import FastlockWarning, Lock, relock_checkpoint
from fastlock.storage.traffic import TRAFFIC

THREADS = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="8b", choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS), help="bf16 is one")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    warnings.simplefilter("ignore", FastlockWarning)  # that the basis was not checked
    formats = list(dict.fromkeys(["bf16", *options.formats]))
    with tempfile.TemporaryDirectory(prefix="fastlock-bench-") as folder:
        lock, source = lock_for(options.shape)
        for layout in formats:
            sparse_quantised(Path(folder) / layout, options.shape, layout, lock)
        say(f"{(__doc__ or '').strip()}\n\nLock: {source}. {load_text()}")
        seconds, read = in_turns(Path(folder), formats, lock, options.rounds)
    table = PrintedTable(["format", "time (95 %)", "over bf16 (95 %)", "columns", "read", "rounds"])
    heads = len(lock)
    for layout in formats:
        ratios = [own / bf16 for own, bf16 in zip(seconds[layout], seconds["bf16"], strict=True)]
        median, low, high = interval_of_median(ratios) or (ratios[0],) * 3
        table.row(
            layout,
            span_text(interval_of_median(seconds[layout]) or seconds[layout][:1] * 3),
            f"{median:.2f} ({low:.2f}–{high:.2f})",
            f"{column_bytes(SHAPES[options.shape], layout, heads) / 1e6:.1f} MB",
            f"{read[layout] / 1e6:.1f} MB",
            str(options.rounds),
        )
    say(load_text())
    return 0


def in_turns(
    folder: Path, formats: list[str], lock: Lock, rounds: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each format in each round, and the bytes that one relock read; a round before them is not counted."""
    seconds: dict[str, list[float]] = {layout: [] for layout in formats}
    read = {}
    for number in range(-1, rounds):
        first = number % len(formats)
        for layout in formats[first:] + formats[:first]:
            before, out = bytes_read(), folder / "out"
            start = time.perf_counter()
            relock_checkpoint(folder / layout, lock, out, STRENGTH)
            taken = time.perf_counter() - start
            read[layout] = bytes_read() - before
            shutil.rmtree(out)
            if number >= 0:
                seconds[layout].append(taken)
    return seconds, read


def bytes_read() -> int:
    """What this process has read so far, from the disk or the page cache: by calls, and by maps."""
    counted = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counted["rchar"]) + TRAFFIC.totals()[0]


def load_text() -> str:
    return f"Load average: {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores."


if __name__ == "__main__":
    sys.exit(main())
