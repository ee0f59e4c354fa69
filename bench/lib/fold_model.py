"""A queue model of the fold on a GPU: what a launch would take if latency, bandwidth and bytes in flight were all.

It was written before any GPU ran the kernel, to choose between kinds of it; its numbers are assumptions about an H200,
and the benchmark of the fold puts what was measured beside what it says. `python -m bench.lib.fold_model` prints it.

What it knows: a multiprocessor runs as many programs as fit it; a program waits for its row of the table, then asks for
W, a step at a time or some heads ahead; memory answers one after the other at its bandwidth, each a latency after its
turn; a head takes a program some time of its own; when a program ends, the next one starts. What it does not know:
barriers, how rows lie in DRAM, and what a cache keeps of W.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from bench.lib.tables import table
from fastlock.kernels.fold.variants import KINDS, Variant

# The sites of the released locks, layer by layer: how many locked heads each has; and the rows of all.
LLAMA_8B, LLAMA_70B, NEMO = "8B", "70B", "Nemo"
LOCKS = {
    LLAMA_8B: ((1, 1, 2, 4, 2, 2, 4, 2, 1, 1, 1, 3), 4096),
    LLAMA_70B: ((1, 1, 3, 2, 2, 2, 2, 4, 4, 1, 4, 5, 1, 2, 1, 2, 2, 3, 3, 1, 2), 8192),
    NEMO: ((1, 1, 3, 3, 1, 7, 1, 1, 1, 1, 1, 3), 5120),
}
# What is timed, and estimated: locks, and how many models in one launch.
WORKLOADS = ((LLAMA_8B, 1), (LLAMA_70B, 1), (NEMO, 1), (LLAMA_8B, 8), (LLAMA_8B, 64))
# Of all of them, in bfloat16.
HEAD_DIM, BYTES = 128, 2
REGISTERS = 65536


@dataclass(frozen=True)
class Gpu:
    """What the model assumes of a GPU; the defaults are for an H200.

    Attributes:
        bandwidth: bytes a second of a copy, read plus written.
        latency: seconds from a load to its data, from memory; `near`: from the L2.
        start: seconds until the first program runs, and after the last one.
        instructions: seconds that a program's own take for each head, between its data and what it asks for next.
        multiprocessors: of the GPU.
    """

    bandwidth: float = 4.3e12
    latency: float = 0.65e-6
    near: float = 0.3e-6
    start: float = 1.0e-6
    instructions: float = 0.1e-6
    multiprocessors: int = 132


@dataclass(frozen=True)
class Launched:
    """How a kernel reads, which `kernels/fold` says of its variants.

    Attributes:
        programs: that run on a multiprocessor at once.
        rows: of one program.
        bytes_a_head: of W, that one program reads of one head.
        together: how many heads it asks for in one step, before it waits.
        ahead: how many heads it keeps asked for, in a loop that does not wait for what it asked for last; 0: it waits.
        table_loads: how many loads from the table, each for the next, come before its first load of W.
        heavy_first: whether the sites with most heads come first, else they come as the layers do.
        rows_fastest: whether neighbouring programs share a site, else a block of rows.
    """

    programs: int
    rows: int
    bytes_a_head: int
    together: int = 1
    ahead: int = 0
    table_loads: int = 1
    heavy_first: bool = True
    rows_fastest: bool = True


# The kernel as it was before there were kinds: serial, with three loads one after the other before the first of W.
BEFORE = Launched(4, 32, 8192, table_loads=3, heavy_first=False, rows_fastest=False)


def launched(variant: Variant) -> Launched:
    """How a variant reads, as many programs at once as its registers let in."""
    return Launched(
        programs=REGISTERS // (variant.most_registers * 32 * variant.num_warps),
        rows=variant.block_rows,
        bytes_a_head=variant.bytes_a_head,
        together=variant.heads,
        ahead=variant.stages - 1,
    )


# Seconds of one launch, by lock, number of models and kind of kernel ("before" for BEFORE).
Estimates: TypeAlias = dict[tuple[str, int, str], float]


def estimates(latency: float) -> Estimates:
    """What the model says of every kind and of all WORKLOADS.

    Args:
        latency: as in `Gpu`.
    """
    import torch

    kinds = {"before": BEFORE}
    for kind in KINDS:
        kinds[kind] = launched(Variant(torch.bfloat16, torch.bfloat16, HEAD_DIM, False, True, kind))
    found = {}
    for name, models in WORKLOADS:
        heads, hidden = LOCKS[name]
        for kind, how in kinds.items():
            found[name, models, kind] = seconds(heads * models, hidden, how, Gpu(latency=latency))
    return found


def share_of_copy(name: str, models: int, duration: float) -> float:
    """Bytes of locked columns a second, over the bandwidth that the model assumes."""
    heads, hidden = LOCKS[name]
    return models * sum(heads) * hidden * HEAD_DIM * BYTES / duration / Gpu.bandwidth


def lines(fast: Estimates, slow: Estimates) -> list[str]:
    """The table of docs/fold-kernel.md, of estimates with a Gpu's latency and with SLOW; nothing was measured yet."""
    cells = []
    for name, models, kind in fast:
        said = [
            f"{each[name, models, kind] * 1e6:.1f} µs, {share_of_copy(name, models, each[name, models, kind]):.0%}"
            for each in (fast, slow)
        ]
        cells.append([f"{name} × {models}", kind, *said, "not measured on a GPU"])
    latencies = [f"latency {latency * 1e6:.2g} µs" for latency in (Gpu.latency, SLOW)]
    return table(["models", "kind", *latencies, "measured"], cells)


# A latency under load, in seconds, for which the table has another column.
SLOW = 1e-6


def seconds(heads: Sequence[int], hidden: int, launched: Launched, gpu: Gpu | None = None) -> float:
    """What the model says one launch takes, on the device.

    Args:
        heads: how many locked heads each site has, in the order of the sites.
        hidden: rows of each site.
    """
    gpu = gpu or Gpu()
    memory = _Memory(gpu)
    waiting = _programs(heads, -(-hidden // launched.rows), launched)
    # What happens next: when, a number that tells apart what happens at once, and a program that goes on then.
    happening: list[tuple[float, int, Iterator[float]]] = []
    for number in range(gpu.multiprocessors * launched.programs):
        site = next(waiting, None)
        if site is not None:
            happening.append((0.0, number, _program(0.0, site, heads[site], launched, memory, gpu)))
    end, number = 0.0, len(happening)
    while happening:
        now, _, program = heapq.heappop(happening)
        number += 1
        later = next(program, None)
        if later is None:
            end = max(end, now)
            site = next(waiting, None)
            if site is None:
                continue
            later, program = now, _program(now, site, heads[site], launched, memory, gpu)
        heapq.heappush(happening, (later, number, program))
    return gpu.start + end


class _Memory:
    """Answers in turn, at the GPU's bandwidth, each a latency later; what was read of a table is near from then on."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._free = 0.0
        self._near: dict[tuple[int, int], float] = {}

    def read(self, size: float, now: float) -> float:
        """When what is asked for now is there."""
        self._free = max(self._free, now) + size / self._gpu.bandwidth
        return self._free + self._gpu.latency

    def look_up(self, site: int, load: int, now: float) -> float:
        """When a load from the table of a site is there."""
        there = self._near.setdefault((site, load), now + self._gpu.latency)
        return max(there, now + self._gpu.near)


def _programs(heads: Sequence[int], blocks: int, launched: Launched) -> Iterator[int]:
    """The site of each program, in the order in which they start."""
    order = sorted(range(len(heads)), key=lambda site: -heads[site]) if launched.heavy_first else range(len(heads))
    if launched.rows_fastest:
        return (site for site in order for _ in range(blocks))
    return (site for _ in range(blocks) for site in order)


def _program(now: float, site: int, heads: int, launched: Launched, memory: _Memory, gpu: Gpu) -> Iterator[float]:
    """The times at which one program goes on; each is given before it comes, and the program is resumed when it is."""
    for load in range(launched.table_loads):
        yield (now := memory.look_up(site, load, now))
    there = [memory.read(launched.bytes_a_head, now) for _ in range(min(launched.ahead, heads))]
    for first in range(0, heads, launched.together):
        asked = min(launched.together, heads - first)
        if not launched.ahead:
            there += [memory.read(launched.bytes_a_head, now) for _ in range(asked)]
        now = max(now, there[first + asked - 1])
        yield now
        if launched.ahead and len(there) < heads:
            there.append(memory.read(launched.bytes_a_head, now))
        yield (now := now + asked * gpu.instructions)


if __name__ == "__main__":
    print("\n".join(lines(estimates(Gpu.latency), estimates(SLOW))))
