"""Which ways there are for a shape on a device, and which of them is taken."""

import collections
import dataclasses
import functools
import itertools
import math
import re
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from fastlock.kernels.locked_linear import tiles

pytest.importorskip("triton")

from fastlock.errors import UnsupportedError
from fastlock.kernels.locked_linear import launch as locked_linear
from fastlock.kernels.locked_linear.launch import run
from fastlock.kernels.locked_linear.tiles import BY_TORCH, Multiprocessors, Sizes, Tile, Way, ways
from fastlock.kernels.locked_linear.timing import fastest, in_turn
from tests.kernels.locked_linear.truth import (
    ADD,
    AROUND,
    DEVICE,
    DTYPES,
    GATHER,
    SHIFT,
    check,
    make,
)


def test_bucket_is_the_next_power_of_two():
    rows = [1, 15, 16, 17, 32, 33, 64, 4096, 4097, 8192, 100_000]
    assert [tiles.bucket(n) for n in rows] == [16, 16, 16, 32, 32, 64, 64, 4096, 8192, 8192, 8192]


def test_shift_is_inside_one_head():
    def widths(tile, dtype=torch.bfloat16):
        found = {d: tiles.shift_tiles([tile], d, dtype) for d in (64, 80, 96, 112, 128, 192, 256, 20)}
        return {d: [narrow.width for narrow in tiles] for d, tiles in found.items()}

    large = Tile(64, 64, 128, 4, 4)
    assert widths(large) == {64: [64], 80: [16], 96: [32], 112: [16], 128: [128], 192: [64], 256: [128], 20: []}
    # 16 rows of 32 columns are 64 vectors of 8, fewer than there are threads.
    small = Tile(16, 32, 128, 4, 4)
    assert widths(small) == {64: [64], 80: [], 96: [], 112: [], 128: [128], 192: [64], 256: [128], 20: []}
    assert widths(small, torch.float32)[96] == [32]
    twice = [large, dataclasses.replace(large, width=64)]
    assert tiles.shift_tiles(twice, 64, torch.bfloat16) == [twice[1]]


H200 = Multiprocessors(9, 132, 227 * 1024)
REPOSITORY = Path(__file__).parents[3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 17, 64, 100, 4096, 10**6])
@pytest.mark.parametrize(("major", "shared"), [(8, 163), (8, 99), (9, 227), (10, 227), (12, 99)])
def test_there_is_always_a_way_that_fits(dtype, rows, major, shared):
    found = ways(Sizes(dtype, rows, 4096, 4096, 128), Multiprocessors(major, 132, shared * 1024))
    assert len(set(found)) == len(found)
    kinds = {"gather", "shift", "add", "around", "torch"}
    if rows > 64 and dtype != torch.float32 and major in (9, 10):
        kinds -= {"shift"}
    assert {way.kind for way in found} == kinds
    assert all(way.tile is None or way.tile.shared_bytes(dtype) <= shared * 1024 for way in found)
    assert found[0].kind == ("gather" if rows <= 64 else "around")
    assert found[-1] == BY_TORCH
    assert any(way.tile and way.tile.hidden == 256 for way in found) == (
        major in (9, 10) and rows > 512 and dtype != torch.float32
    )


@pytest.mark.parametrize("hidden", [8, 1000, 4096, 8192, 16384])
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 512, 513, 10**6])
def test_how_many_kernels_a_first_call_compiles(rows, hidden):
    """Of Triton's projections on an H200: five, or three for many rows."""
    found = [way for way in ways(Sizes(torch.bfloat16, rows, hidden, 4096, 128), H200) if way.tile]
    assert len(found) <= (5 if rows <= 64 else 3)
    assert {way.kind for way in found} == ({"gather", "shift"} if rows <= 64 else {"gather"})
    if rows <= 64:
        cuts = [(way.kind, dataclasses.replace(way.tile, num_stages=0)) for way in found]
        assert len(set(cuts)) == len(cuts), "tiles of the same cut, with more and with fewer stages"


def test_in_flight_as_counted_by_hand():
    """Of 4096 x 4096 in bfloat16, to 132 multiprocessors of 228 KiB; a program needs 1 KiB besides its tiles."""
    sizes = Sizes(torch.bfloat16, 16, 4096, 4096, 128)
    # 128 programs, each alone: 7 tiles of 32 x 128 numbers. Their 8 stages take 96 + 1 KiB, twice into 228.
    tile = Tile(16, 32, 128, 4, 8)
    assert tiles.programs(tile, sizes) == 128
    assert tiles.at_once(tile, torch.bfloat16, H200.shared_bytes) == 2
    assert tiles.weight_in_flight(tile, sizes, H200) == 128 * 7 * 32 * 128 * 2 / 132
    # 256 programs, two at once on most: 5 tiles of 16 x 256.
    tile = Tile(16, 16, 256, 4, 6)
    assert tiles.at_once(tile, torch.bfloat16, H200.shared_bytes) == 2
    assert tiles.weight_in_flight(tile, sizes, H200) == 256 * 5 * 16 * 256 * 2 / 132
    # 512 of 8192 rows of W; no more than 2 x 132 run at once.
    large = dataclasses.replace(sizes, hidden=8192)
    assert tiles.weight_in_flight(tile, large, H200) == 2 * 5 * 16 * 256 * 2
    # Memory's rate, where enough is on its way; the L2 cache's, where 256 programs read x; else the latency.
    weight = 4096 * 4096 * 2
    times = [(16, Tile(16, 64, 128, 4, 8), weight / tiles.MEMORY_RATE / 132)]
    times += [(16, tile, 2 * weight / tiles.CACHE_RATE / 132)]
    times += [(1, Tile(16, 64, 128, 4, 4), weight / (64 * 3 * 64 * 128 * 2 / tiles.LATENCY))]
    for rows, of, seconds in times:
        found = tiles.modelled_seconds(of, dataclasses.replace(sizes, rows=rows), H200)
        assert math.isclose(found, seconds, rel_tol=1e-12)


@pytest.mark.parametrize("hidden", [4096, 8192])
@pytest.mark.parametrize("kind", ["gather", "shift"])
def test_enough_of_the_weights_is_in_flight(kind, hidden):
    """With at most 16 rows, as many bytes as an H200's memory delivers in the latency, to each multiprocessor."""
    sizes = Sizes(torch.bfloat16, 1, hidden, hidden, 128)
    found = [way.tile for way in ways(sizes, H200) if way.kind == kind]
    assert len(found) == (3 if kind == "gather" else 2)
    assert all(tiles.weight_in_flight(tile, sizes, H200) >= 4.3e12 / 132 * 1.4e-6 for tile in found)


def test_the_docs_say_what_the_model_says():
    """For every way that is compiled for Llama-3 8B and 70B on an H200, and for no other."""
    lines = (REPOSITORY / "docs/per-request.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if re.match(r"\| \d+ \| `", line)]
    said = {(int(row[0]), row[1].strip("`")): [row[4], row[5:8], row[8:11]] for row in cells}
    expected = {}
    for rows, hidden in itertools.product((16, 32, 64), (4096, 8192)):
        sizes = Sizes(torch.bfloat16, rows, hidden, hidden, 128)
        expected |= {(rows, way.name): way.tile for way in ways(sizes, H200) if way.tile}
    assert said.keys() == expected.keys()
    for (rows, name), (at_once, *figures) in said.items():
        tile = expected[rows, name]
        assert int(at_once) == tiles.at_once(tile, torch.bfloat16, H200.shared_bytes)
        for hidden, (programs, kib, microseconds) in zip((4096, 8192), figures, strict=True):
            sizes = Sizes(torch.bfloat16, rows, hidden, hidden, 128)
            assert int(programs) == tiles.programs(tile, sizes)
            assert abs(float(kib) - tiles.weight_in_flight(tile, sizes, H200) / 1024) <= 0.5
            assert abs(float(microseconds) - tiles.modelled_seconds(tile, sizes, H200) * 1e6) <= 0.051


def test_what_cannot_win_is_not_compiled():
    """A tile with a quarter of the bytes in flight, and one for which x is read again by too many programs."""
    thin, fat = Way("gather", Tile(64, 64, 64, 4, 4)), Way("gather", Tile(64, 64, 128, 4, 6))
    sizes = Sizes(torch.bfloat16, 64, 4096, 4096, 128)
    assert tiles.likeliest([thin, fat], sizes, H200, most=2) == [fat]
    assert tiles.likeliest([thin, fat], dataclasses.replace(sizes, rows=65), H200, most=2) == [thin, fat]
    narrow, broad = Way("gather", Tile(16, 16, 256, 4, 6)), Way("gather", Tile(16, 64, 128, 4, 8))
    for rows in (16, 1):  # what is chosen for one row is kept for 16
        assert tiles.likeliest([narrow, broad], dataclasses.replace(sizes, rows=rows), H200, most=2) == [broad]
    assert tiles.likeliest([narrow], sizes, H200, most=2) == [narrow]
    assert tiles.likeliest([], sizes, H200, most=2) == []


def test_the_fastest_way_is_chosen():
    assert fastest({GATHER: 3.0, SHIFT: 1.0, ADD: 1.5, AROUND: 2.0}) == SHIFT
    assert fastest({GATHER: math.inf, AROUND: 1.0}) == AROUND
    assert fastest({GATHER: 1.0}) == GATHER


def test_of_equally_fast_ways_the_plainest_is_chosen():
    """In whatever order they were tried; of one kind, the first."""
    order = [BY_TORCH, ADD, AROUND, GATHER, SHIFT]
    for i, plainest in enumerate(order):
        assert fastest(dict.fromkeys(order[i:], 1.0)) == plainest
        assert fastest(dict.fromkeys(reversed(order[i:]), 1.0)) == plainest
        assert fastest(dict.fromkeys(order[i:], 1.0) | {order[-1]: 0.9}) == SHIFT
    other = Way("gather", Tile(64, 64, 64, 4, 4))
    assert fastest({other: 1.0, GATHER: 1.0}) == other
    assert fastest({GATHER: 1.0, other: 1.0}) == GATHER


class PretendedDevice:
    """A device whose clock rises while it works, over `ramp` seconds, from 345 to 1980 MHz.

    Attributes:
        now: seconds since it was idle.
        of: seconds that each way takes at the full clock.
        runs: how often each has run.
    """

    def __init__(self, monkeypatch, of, ramp):
        self.now, self.of, self.ramp, self.runs = 0.0, of, ramp, collections.Counter()
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.work(cycles / 1980e6))
        monkeypatch.setattr(torch.cuda, "Event", functools.partial(PretendedEvent, self))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
        monkeypatch.setattr(locked_linear, "run", self.run)
        monkeypatch.setattr(locked_linear, "cold", lambda inputs: [inputs] * 10)
        monkeypatch.setattr(locked_linear, "ways_for", lambda inputs: list(of))

    def work(self, seconds):
        self.now += seconds * 1980 / (345 + (1980 - 345) * min(1.0, self.now / self.ramp))

    def run(self, way, inputs):
        self.runs[way] += 1
        self.work(self.of[way])


class PretendedEvent:
    def __init__(self, device, enable_timing):
        self.device = device

    def record(self):
        self.now = self.device.now

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return (end.now - self.now) * 1e3


@pytest.mark.skipif(DEVICE == "cuda", reason="pretends that there is a GPU")
@pytest.mark.parametrize("ramp", [1e-9, 0.03, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("microseconds", [10.0, 400.0])
@pytest.mark.parametrize("best", range(4))
def test_clocks_that_rise_do_not_choose(monkeypatch, best, microseconds, ramp):
    """Whichever of four is 5 % faster than the others is taken, from an idle GPU."""
    of = dict.fromkeys((GATHER, SHIFT, AROUND, ADD), microseconds * 1e-6)
    wanted = list(of)[best]
    of[wanted] *= 0.95
    device = PretendedDevice(monkeypatch, of, ramp)
    monkeypatch.setattr(locked_linear, "_is_right", lambda way, inputs: True)  # this device computes nothing
    choices = locked_linear.Choices()
    assert choices.choose(make(8, 2, 16, 40)) == wanted
    assert len(set(device.runs.values())) == 1, "each had as many turns"


def test_ways_take_turns(monkeypatch):
    """There and back, after 30 ms that do not count; what counts is the median."""
    seen = []

    def turn(way):
        seen.append(way)
        return {GATHER: 2.0, ADD: 1.0}[way] + (100.0 if len(seen) in (1, 2, 3, 4, 7) else 0.0)

    monkeypatch.setattr(time, "perf_counter", lambda: 0.009 * len(seen))
    assert in_turn([GATHER, ADD], turn) == {GATHER: 2.0, ADD: 1.0}
    assert in_turn([], turn) == {}
    assert seen == [GATHER, ADD] * 2 + [GATHER, ADD, ADD, GATHER] * 3


@pytest.fixture
def chooser(monkeypatch):
    """The choice on a pretended GPU: what was timed, and whether a graph is captured there."""
    state = {"timed": [], "capturing": False, "times": {GATHER: 2.0, ADD: 1.0}}

    def seconds(ways, many):
        state["timed"] += ways
        return {way: state["times"][way] for way in ways}

    monkeypatch.setattr(locked_linear, "seconds", seconds)
    monkeypatch.setattr(locked_linear, "cold", lambda inputs: [inputs])
    monkeypatch.setattr(locked_linear, "ways_for", lambda inputs: list(state["times"]))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    locked_linear.CHOICES.forget()
    yield state
    locked_linear.CHOICES.forget()


@pytest.mark.skipif(DEVICE == "cuda", reason="pretends that there is a GPU")
def test_each_shape_is_timed_once(chooser):
    inputs = make(8, 2, 16, 40)
    assert locked_linear.CHOICES.of(inputs) is None
    y = locked_linear.locked_linear(inputs)
    assert chooser["timed"] == [GATHER, ADD]
    assert locked_linear.CHOICES.of(inputs) == ADD
    assert torch.equal(y, run(ADD, inputs))
    locked_linear.locked_linear(make(16, 2, 16, 40))  # as many rows, to the next power of two
    assert len(chooser["timed"]) == 2
    for other in (make(17, 2, 16, 40), make(8, 2, 16, 41), make(8, 2, 16, 40, torch.bfloat16)):
        chooser["timed"].clear()
        locked_linear.locked_linear(other)
        assert len(chooser["timed"]) == 2
    locked_linear.locked_linear(make(8, 2, 16, 40, transposed=True))
    assert len(chooser["timed"]) == 4
    every_other = dataclasses.replace(inputs, weight=torch.randn(80, 64)[::2, ::2])
    locked_linear.locked_linear(every_other)
    assert len(chooser["timed"]) == 6


@pytest.mark.skipif(DEVICE == "cuda", reason="pretends that there is a GPU")
def test_nothing_is_timed_while_a_graph_is_captured(chooser):
    inputs = make(8, 2, 16, 40)
    chooser["capturing"] = True
    y = locked_linear.locked_linear(inputs)
    assert chooser["timed"] == []
    assert locked_linear.CHOICES.of(inputs) is None
    assert torch.equal(y, run(BY_TORCH, inputs))
    chooser["capturing"] = False
    locked_linear.locked_linear(inputs)
    assert locked_linear.CHOICES.of(inputs) == ADD


@pytest.mark.skipif(DEVICE == "cuda", reason="pretends that there is a GPU")
def test_no_rows_decide_nothing(chooser):
    inputs = make(8, 2, 16, 40)
    none = dataclasses.replace(inputs, x=inputs.x[:0], lock_of_row=inputs.lock_of_row[:0])
    assert locked_linear.locked_linear(none).shape == (0, 40)
    assert chooser["timed"] == []
    locked_linear.locked_linear(inputs)  # of the same bucket
    assert chooser["timed"] == [GATHER, ADD]


@pytest.mark.skipif(DEVICE == "cuda", reason="pretends that there is a GPU")
def test_weights_are_copied_only_to_be_timed(chooser, monkeypatch):
    monkeypatch.setattr(locked_linear, "cold", lambda inputs: pytest.fail("there is nothing to choose"))
    chooser["times"] = {BY_TORCH: 1.0}
    locked_linear.locked_linear(make(8, 2, 16, 40))
    assert chooser["timed"] == []


def test_what_does_not_run_is_not_chosen():
    times = {GATHER: math.inf, ADD: math.inf, BY_TORCH: math.inf}
    assert fastest(times) == BY_TORCH


@pytest.mark.parametrize("error", [RuntimeError("Failed to find C compiler"), torch.OutOfMemoryError("no memory")])
def test_a_way_that_fails_costs_no_more_than_a_warning(monkeypatch, error):
    def fails(way, inputs, out=None):
        raise error

    monkeypatch.setattr(locked_linear, "run", fails)
    with pytest.warns(RuntimeWarning, match=f"fastlock goes without {ADD.name} on this device: {error}"):
        assert locked_linear.seconds([ADD], [make(4, 2, 16, 40)]) == {ADD: math.inf}


def test_without_triton_torch_alone_is_left(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastlock.kernels.locked_linear.triton_kernels", None)
    monkeypatch.delattr("fastlock.kernels.locked_linear.triton_kernels", raising=False)
    inputs = make(4, 2, 16, 40)
    with pytest.raises(UnsupportedError, match=r"Triton, .* cannot be imported"):
        run(ADD, inputs)
    locked_linear._has_triton.cache_clear()
    assert locked_linear.ways_for(inputs) == [BY_TORCH]
    locked_linear._has_triton.cache_clear()


@pytest.mark.skipif(DEVICE == "cuda", reason="pretends that there is a GPU")
@pytest.mark.parametrize("transposed", [False, True])
def test_ways_are_timed_on_weights_that_left_the_cache(monkeypatch, transposed):
    inputs = make(8, 2, 16, 40, transposed=transposed)
    size = inputs.weight.numel() * inputs.weight.itemsize
    device = types.SimpleNamespace(L2_cache_size=2 * size - 8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    many = locked_linear.cold(inputs)
    assert len(many) == 10
    assert len({one.weight.data_ptr() for one in many}) == 4
    assert {one.shape() for one in many} == {inputs.shape()}
    assert all(torch.equal(one.weight, inputs.weight) and torch.equal(one.x, inputs.x) for one in many)
    assert inputs.x.data_ptr() not in {one.x.data_ptr() for one in many}


def test_what_no_kernel_takes_goes_by_torch():
    double = make(4, 2, 16, 40, torch.float64)
    assert locked_linear.ways_for(double) == [BY_TORCH]
    strided = make(4, 2, 16, 80)
    strided = dataclasses.replace(strided, weight=strided.weight.repeat_interleave(2, 1)[::2, ::2], bias=None)
    assert locked_linear.ways_for(strided) == [BY_TORCH]
    wide = make(2, 2, 513, 4)
    assert locked_linear.ways_for(wide) == [BY_TORCH]
    check(
        BY_TORCH,
        dataclasses.replace(
            strided, folds=make(4, 2, 16, 40, seed=0).folds * 0, strength_of_row=strided.strength_of_row * 0
        ),
    )
