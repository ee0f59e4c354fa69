"""`relock_checkpoint` against a plain script that does the least: map, fold in float32 on two threads, write, sync.

On a sparse checkpoint of Llama-3 8B's shape with the released lock, the page cache warm, both of two threads. The plain
script writes the same shard of biases, an index and a config, and syncs them. It links no weights, keeps nothing aside,
checks nothing, takes no digest and writes no receipt. The two take turns; who begins changes from round to round. CPU
time is that of all threads of the process: on busy cores, it changes less than the time that passes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from bench.disk.checkpoints import Disk, fill_cache, sync
from bench.lib.children import run_module
from bench.lib.figures import interval_of_median, span_text
from bench.lib.printed import PrintedTable, say
from bench.lib.sparse_checkpoints import SHAPES, lock_for, sparse_checkpoint
from bench.lib.workloads import STRENGTH
from fastlock import Lock, relock_checkpoint

THREADS = 2
SHARD, INDEX, CONFIG = "model-fastlock.safetensors", "model.safetensors.index.json", "config.json"
# bfloat16 has 8 bits: a sum in float32 may come out on the other side of a middle.
CLOSE = 2**-7
COLUMNS = (
    "relock_checkpoint (95 %)",
    "plain script (95 %)",
    "relock over plain (95 %)",
    "its CPU time (95 %)",
    "plain CPU time (95 %)",
    "CPU over CPU (95 %)",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="8b", choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=31, help="of the warm comparison")
    parser.add_argument("--processes", type=int, default=7, help="fresh processes each, for the first relock")
    parser.add_argument("--first", choices=["plain", "ours"], help="(for the fresh processes)")
    parser.add_argument("--directory", type=Path, help="(for the fresh processes)")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    if options.first:
        print(json.dumps(first(options.first, options.directory)))
        return 0
    with tempfile.TemporaryDirectory(prefix="fastlock-bench-") as folder:
        lock, source = lock_for(options.shape)
        disk = Disk(options.shape, Path(folder), lock, source)
        sparse_checkpoint(disk.source, options.shape, lock)
        lock.save(disk.folder / "lock.safetensors")
        say(f"{__doc__.strip()}\n\nLock: {source}. {load_text()}")
        warm(disk, options.rounds)
        fresh(disk, options.processes)
    return 0


@dataclass(frozen=True)
class Took:
    """How long something took: seconds that passed, and seconds of all of the process's threads."""

    seconds: float
    cpu: float


def warm(disk: Disk, rounds: int) -> None:
    """Both in one process, in turns."""
    times = PrintedTable(["page cache", *COLUMNS, "rounds"])
    for pages in ("large", "small"):
        fill_cache(disk, pages)
        times.row(pages, *cells(*in_turns(lambda: ours_on(disk), lambda: plain_on(disk), rounds)), str(rounds))
    say(load_text())


def fresh(disk: Disk, processes: int) -> None:
    """The first relock of a process, everything imported before, and the second one."""
    runs: dict[str, list[dict[str, Took]]] = {"ours": [], "plain": []}
    for _ in range(processes):
        for who, of_process in runs.items():
            printed = run_module("bench.disk.against_plain", "--first", who, "--directory", str(disk.folder))
            of_process.append({which: Took(**took) for which, took in json.loads(printed).items()})
    times = PrintedTable(["in a fresh process", *COLUMNS])
    for which in ("first", "second"):
        times.row(which, *cells(*([run[which] for run in runs[who]] for who in ("ours", "plain"))))
    say(load_text())


def first(who: str, folder: Path) -> dict[str, Any]:
    """What the first and the second relock of this process took."""
    disk = Disk("", folder, Lock.load(folder / "lock.safetensors"), "", itertools.count(os.getpid() * 10))
    run = {"ours": ours_on, "plain": plain_on}[who]
    return {which: asdict(timed(lambda: run(disk))) for which in ("first", "second")}


def in_turns(ours: Callable[[], Path], theirs: Callable[[], Path], rounds: int) -> tuple[list[Took], list[Took]]:
    """What each took in each round; one round before them is not counted, but what came out is compared."""
    check(ours(), theirs())
    took: tuple[list[Took], list[Took]] = ([], [])
    for number in range(rounds):
        for who in (0, 1) if number % 2 else (1, 0):
            took[who].append(timed((ours, theirs)[who]))
    return took


def timed(run: Callable[[], Path]) -> Took:
    """How long it is until all is on disk; what was written is removed, untimed."""
    start, cpu = time.perf_counter(), time.process_time()
    out = run()
    took = Took(time.perf_counter() - start, time.process_time() - cpu)
    shutil.rmtree(out)
    return took


def check(ours: Path, theirs: Path) -> None:
    """Raise if the biases that the two wrote are not about the same."""
    a, b = load_file(ours / SHARD), load_file(theirs / SHARD)
    near = a.keys() == b.keys() and all(torch.allclose(a[name], b[name], rtol=CLOSE, atol=1e-3) for name in a)
    if not near or not any(bias.count_nonzero() for bias in a.values()):
        raise RuntimeError("the plain script and relock_checkpoint wrote different biases")
    shutil.rmtree(ours)
    shutil.rmtree(theirs)


def ours_on(disk: Disk) -> Path:
    out = disk.new()
    relock_checkpoint(disk.source, disk.lock, out, STRENGTH)
    return out


def plain_on(disk: Disk) -> Path:
    out = disk.new()
    plain(disk.source, disk.lock, out)
    return out


def plain(source: Path, lock: Lock, out: Path) -> None:
    """The plain script."""
    index: dict[str, Any] = json.loads((source / INDEX).read_text())
    config: dict[str, Any] = json.loads((source / CONFIG).read_text())
    shards: dict[str, Any] = {
        name: safe_open(source / name, framework="pt") for name in set(index["weight_map"].values())
    }
    displacements = lock.displacement(STRENGTH)

    def fold(layer: int) -> torch.Tensor:
        name, d = f"model.layers.{layer}.self_attn.o_proj.weight", displacements[layer]
        weight = shards[index["weight_map"][name]].get_tensor(name)  # mapped, not read
        b = torch.zeros(weight.shape[0])
        for head, values in zip(d.heads, d.values.float(), strict=True):
            b += weight[:, head * d.head_dim : (head + 1) * d.head_dim].float() @ values
        return b.to(weight.dtype)

    with ThreadPoolExecutor(THREADS, initializer=torch.set_num_threads, initargs=(1,)) as threads:
        folds = dict(zip(displacements, threads.map(fold, displacements), strict=True))
    torch.set_num_threads(THREADS)
    biases = {f"model.layers.{layer}.self_attn.o_proj.bias": b for layer, b in folds.items()}
    width = config["head_dim"] * config["num_key_value_heads"]
    for layer in range(config["num_hidden_layers"]):
        for name, length in (("q", config["head_dim"] * config["num_attention_heads"]), ("k", width), ("v", width)):
            biases[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = torch.zeros(length, dtype=torch.bfloat16)
        biases.setdefault(
            f"model.layers.{layer}.self_attn.o_proj.bias", torch.zeros(config["hidden_size"], dtype=torch.bfloat16)
        )
    index["weight_map"] |= dict.fromkeys(biases, SHARD)
    index["metadata"]["total_size"] += sum(bias.nbytes for bias in biases.values())
    out.mkdir()
    write_synced(out / SHARD, save(biases, metadata={"format": "pt"}))
    write_synced(out / INDEX, (json.dumps(index, indent=2) + "\n").encode())
    write_synced(out / CONFIG, (json.dumps(config | {"attention_bias": True}, indent=2) + "\n").encode())
    sync(out)
    sync(out.parent)


def write_synced(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def cells(ours: list[Took], theirs: list[Took]) -> list[str]:
    """Of `COLUMNS`."""
    spans = [span([took.seconds for took in each]) for each in (ours, theirs)]
    cpu = [span([took.cpu for took in each]) for each in (ours, theirs)]
    return [
        *spans,
        over([took.seconds for took in ours], [took.seconds for took in theirs]),
        *cpu,
        over([took.cpu for took in ours], [took.cpu for took in theirs]),
    ]


def span(seconds: list[float]) -> str:
    return span_text(interval(seconds))


def interval(seconds: list[float]) -> list[float]:
    return interval_of_median(seconds) or []


def over(ours: list[float], theirs: list[float]) -> str:
    """Ours over theirs of the same round: the median, and its 95 % interval."""
    median, low, high = interval([a / b for a, b in zip(ours, theirs, strict=True)])
    return f"{median:.2f} ({low:.2f}–{high:.2f})"


def load_text() -> str:
    return f"Load average: {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores."


if __name__ == "__main__":
    sys.exit(main())
