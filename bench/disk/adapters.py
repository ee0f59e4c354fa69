"""Adapters on disk, over one base of Llama-3-8B's shape: each by itself, and a zoo of them; time, bytes and memory.

The base is a file with holes; the adapters are LoRAs of rank 16 with random numbers. Adapters of a zoo are hard links
to a few files of weights: what is read and folded is the same as of files of their own, but all of it is warm.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.disk.zoo import Memory, span
from bench.lib.printed import PrintedTable, say
from bench.lib.shares import rate_of_shares
from bench.lib.sparse_checkpoints import SHAPES, Shape, lock_for, sparse_checkpoint
from fastlock import Lock
from fastlock.checkpoints.adapters.relocked_base import open_base
from fastlock.checkpoints.adapters.relocking import AdapterSettings, relock_over
from fastlock.storage.traffic import TRAFFIC
from fastlock.zoo.run import relock_zoo

SHAPE, RANK, FILES = "8b", 16, 8
# What adapters adapt, and the carriers that fit; where a carrier is asked for, it acts in no stack by itself.
KINDS: dict[str, tuple[tuple[str, ...], str | None, tuple[str, ...]]] = {
    "o_proj, sidecar": (("o_proj",), "sidecar", ("transformers",)),
    "o_proj, adapter bias": (("o_proj",), None, ("transformers",)),
    "all linear, adapter bias": (
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        None,
        ("transformers",),
    ),
    "q_proj and v_proj, base bias": (("q_proj", "v_proj"), None, ("transformers", "vllm")),
}
ROUNDS = 25
ALONE = 500  # adapters of one process, before and after the zoo: on a busy machine the two tell how the load changed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="how many adapters the zoo has; 0: no zoo")
    parser.add_argument("--kind", choices=KINDS, default="o_proj, sidecar", help="what they are")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--directory", type=Path, help="where to work; default: a temporary directory")
    options = parser.parse_args()
    lock, which = lock_for(SHAPE)
    say(f"{which}; load average before: {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        base = sparse_checkpoint(Path(folder, "base"), SHAPE, lock)
        alone(Path(folder), base, lock)
        if options.count:
            whole_zoo(Path(folder), base, lock, options.kind, options.count, options.workers)
    return 0


def alone(folder: Path, base: Path, lock: Lock) -> None:
    """One warm adapter after the other, over a base that is open."""
    start = time.perf_counter()
    opened = open_base(base, lock)
    say(f"to open the base, W d included: {(time.perf_counter() - start) * 1e3:.0f} ms, once a worker")
    rows = PrintedTable(["one warm adapter", "median", "its CPU time", "MB read", "MB written", "MB of biases"])
    for name, (targets, carrier, stacks) in KINDS.items():
        source = make(folder / "one" / name, targets, 0)
        settings = AdapterSettings(stacks, carrier, None, folder / "out" / "base-locked")
        times, used, moved = [], [], [0, 0]
        for number in range(ROUNDS + 1):  # the first relocks the base, if that is needed
            out = folder / "out" / str(number)
            before, cpu, start = transferred(), time.process_time(), time.perf_counter()
            receipt = relock_over(opened, source, out, settings)
            times.append(time.perf_counter() - start)
            used.append(time.process_time() - cpu)
            moved = [after - earlier for after, earlier in zip(transferred(), before, strict=True)]
            shutil.rmtree(out)
        biases = len(receipt.sites) * SHAPES[SHAPE].hidden * 2
        seconds = [f"{statistics.median(of) * 1e3:.1f} ms" for of in (times[1:], used[1:])]
        rows.row(name, *seconds, *(f"{count / 1e6:.2f}" for count in (*moved, biases)))


def whole_zoo(folder: Path, base: Path, lock: Lock, kind: str, count: int, workers: int) -> None:
    """Adapters a second of one process, of as many as there are workers, and of a zoo; and the zoo's memory."""
    targets, carrier, stacks = KINDS[kind]
    made = [make(folder / "made" / str(number), targets, number) for number in range(min(FILES, count))]
    for number in range(count):
        place = folder / "zoo" / f"{number:05d}"
        place.mkdir(parents=True)
        for file in made[number % len(made)].iterdir():
            os.link(file, place / file.name)
    lock.save(folder / "lock.safetensors")
    alone = [rate_of(1, folder, base, min(count, ALONE), stacks, carrier)]
    beside = rate_of(workers, folder, base, min(count, workers * ALONE), stacks, carrier)
    with Memory() as memory:
        start = time.perf_counter()
        summary = relock_zoo(
            [folder / "zoo"], lock, folder / "relocked", base=base, stacks=stacks, carrier=carrier, workers=workers
        )
        whole = count / (time.perf_counter() - start)
    if not summary:
        raise RuntimeError(f"relock_zoo failed: {summary.counts}, {summary.wrong[0].error}")
    say(f"load average after the zoo: {os.getloadavg()[0]:.1f}")
    alone.append(rate_of(1, folder, base, min(count, ALONE), stacks, carrier))
    single = statistics.mean(alone)
    say(f"{count} adapters ({kind}), {workers} workers; load average after: {os.getloadavg()[0]:.1f}")
    rates = PrintedTable(["", "adapters/s", "of workers × single"])
    for when, rate in zip(("before", "after"), alone, strict=True):
        rates.row(f"one process alone, {when} the zoo", f"{rate:.1f}", "")
    for who, rate in {
        f"{workers} processes side by side, without zoo": beside,
        "zoo, once the workers are there": count / span(summary),
        "zoo, from call to return": whole,
    }.items():
        rates.row(who, f"{rate:.1f}", f"{rate / single / workers:.0%}")
    sizes = PrintedTable(["memory (RSS, MB) at", "25 %", "50 %", "75 %", "100 % of the run"])
    for who, quarters in memory.quarters().items():
        sizes.row(who, *(f"{size / 1e6:.0f}" for size in quarters))


def rate_of(
    processes: int, folder: Path, base: Path, count: int, stacks: tuple[str, ...], carrier: str | None
) -> float:
    """Adapters a second of processes that relock their share one after the other."""
    rate = rate_of_shares(share, (folder, base, count, stacks, carrier), processes, count)
    shutil.rmtree(folder / "alone")
    return rate


def share(
    folder: Path, base: Path, count: int, stacks: tuple[str, ...], carrier: str | None, rank: int, of: int, results: Any
) -> None:
    torch.set_num_threads(1)
    opened = open_base(base, Lock.load(folder / "lock.safetensors"))
    settings = AdapterSettings(stacks, carrier, None, folder / "alone" / "base-locked")
    relock_over(opened, folder / "zoo" / "00000", folder / "alone" / f"warm{rank}", settings)
    start = time.time()
    for number in range(rank, count, of):
        relock_over(opened, folder / "zoo" / f"{number:05d}", folder / "alone" / f"{number:05d}", settings)
    results.put((start, time.time()))


def make(directory: Path, targets: tuple[str, ...], seed: int) -> Path:
    """A LoRA of random numbers in bfloat16, in every layer."""
    shape, generator = SHAPES[SHAPE], torch.Generator().manual_seed(seed)
    sizes, tensors = projections(shape), {}
    for layer in range(shape.layers):
        for target in targets:
            part, rows, columns = sizes[target]
            key = f"base_model.model.model.layers.{layer}.{part}.{target}"
            for name, size in (("lora_A", (RANK, columns)), ("lora_B", (rows, RANK))):
                numbers = torch.empty(size, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
                tensors[f"{key}.{name}.weight"] = numbers
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none"}
    config |= {"target_modules": list(targets), "init_lora_weights": True, "base_model_name_or_path": "base"}
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return directory


def projections(shape: Shape) -> dict[str, tuple[str, int, int]]:
    """Where each linear layer is, its rows and its columns."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = {"q_proj": (q, shape.hidden), "k_proj": (kv, shape.hidden), "v_proj": (kv, shape.hidden)}
    attention["o_proj"] = shape.hidden, q
    mlp = {"gate_proj": (shape.intermediate, shape.hidden), "up_proj": (shape.intermediate, shape.hidden)}
    mlp["down_proj"] = shape.hidden, shape.intermediate
    found = {name: ("self_attn", *size) for name, size in attention.items()}
    return found | {name: ("mlp", *size) for name, size in mlp.items()}


def transferred() -> tuple[int, int]:
    """Bytes that this process has read (mapped ones included) and written."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    read, written = TRAFFIC.totals()
    return int(counts["rchar"]) + read, int(counts["wchar"]) + written


if __name__ == "__main__":
    sys.exit(main())
