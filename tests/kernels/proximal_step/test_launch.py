"""The step's kernels against float64: on the GPU where there is one, else in Triton's interpreter."""

import dataclasses
import functools
import itertools
import math

import pytest
import torch

pytest.importorskip("triton")

from fastlock.errors import FastlockError
from fastlock.kernels.ahead_of_time import cubins
from fastlock.kernels.ahead_of_time.ways import NoWayError
from fastlock.kernels.proximal_step import launch, reference, variants
from fastlock.kernels.proximal_step.launch import StepScalars, StepTable
from tests.kernels.proximal_step.tensors import (
    BF16,
    DEVICE,
    FP32,
    KEPT,
    SETTINGS,
    SIZES,
    copied,
    exact,
    make,
    worst,
)

VARIANTS = list(variants.step_variants())


def table_of(tensors, scalars=None):
    (variant,) = {launch.variant_of(one) for one in tensors}
    table = StepTable(variant, torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu"))
    table.update(tensors, scalars or StepScalars())
    return table


def number(x):
    return torch.tensor(float(x), device=DEVICE)


def check(guarded, scalars=None, scale=1.0, clip=1.0):
    """Step them in one launch; each is within its bound of float64, and nothing beside them is written."""
    before = [dataclasses.replace(copied(one.tensors)) for one in guarded]
    table = table_of([one.tensors for one in guarded], scalars)
    table.step()
    for one, old in zip(guarded, before, strict=True):
        errors = worst(one.tensors, old, scale, clip)
        assert max(errors.values()) <= 1, (one.length, errors)
        assert one.is_untouched_outside()
    return table


def same(one, other):
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in KEPT)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_every_variant_at_every_size_in_one_launch(variant) -> None:
    """Of these sizes none is a multiple of a block; and the last one is at an odd address."""
    settings = dataclasses.replace(SETTINGS, anchor_decay=0.3 if variant.anchor else 0.0, pull=0.5)
    settings = dataclasses.replace(settings, seed=11 if variant.stochastic else None)
    shapes = [(size, 0) for size in SIZES] + [(2 * variant.block, 0), (variant.block + 5, 3)]
    guarded = [
        make(size, variant.weight, variant.state, variant.anchor, offset, ordinal=i, settings=settings)
        for i, (size, offset) in enumerate(shapes)
    ]
    assert {launch.variant_of(one.tensors) for one in guarded} == {variant}
    table = check(guarded)
    assert table.programs == sum(-(-size // variant.block) for size, _ in shapes)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_torchs_own_adamw_is_no_nearer_to_float64(dtype) -> None:
    """In float32 both are within the bound, in bfloat16 the kernel alone: it rounds once, and torch each operation."""
    one = make(20_000, dtype, dtype, None).tensors
    before, theirs = copied(one), torch.nn.Parameter(one.weight.clone())
    adamw = torch.optim.AdamW([theirs], lr=SETTINGS.lr, weight_decay=SETTINGS.weight_decay, foreach=False)
    state = {"step": torch.tensor(2.0), "exp_avg": one.exp_avg.clone(), "exp_avg_sq": one.exp_avg_sq.clone()}
    adamw.state[theirs], theirs.grad = state, one.grad.clone()
    adamw.step()
    table_of([one]).step()
    ours = worst(one, before)
    torchs = worst(dataclasses.replace(one, weight=theirs.detach(), **{name: state[name] for name in KEPT[1:]}), before)
    assert max(ours.values()) <= 1
    if dtype == FP32:
        assert max(torchs.values()) <= 1
    else:
        assert all(torchs[name] >= ours[name] for name in KEPT)
        assert min(torchs["weight"], torchs["exp_avg_sq"]) > 1


def test_hundreds_of_tensors_in_one_launch() -> None:
    """As of all-linear adapters in 32 layers; every third without a gradient, which is left as it is."""
    guarded = [make(3 + i % 7, seed=i, ordinal=i) for i in range(448)]
    tensors = [
        dataclasses.replace(one.tensors, grad=None) if i % 3 == 0 else one.tensors for i, one in enumerate(guarded)
    ]
    before = [copied(one) for one in tensors]
    table = table_of(tensors)
    assert table.programs == 448
    table.step()
    for i, (one, old) in enumerate(zip(tensors, before, strict=True)):
        if i % 3 == 0:
            assert same(one, old)
        else:
            assert max(worst(one, old).values()) <= 1
        assert guarded[i].is_untouched_outside()


def test_each_tensor_has_the_numbers_of_its_group_and_step() -> None:
    other = dataclasses.replace(SETTINGS, lr=0.3, beta1=0.5, beta2=0.9, eps=0.1, weight_decay=0.0, pull=0.0)
    check(
        [
            make(1000, seed=1, step=1.0),
            make(1000, seed=2, step=1000.0),
            make(1000, seed=3, step=1.0, settings=dataclasses.replace(other, anchor_decay=0.7)),
            make(1000, seed=4, step=7.0, settings=dataclasses.replace(other, anchor_decay=0.7)),
            *(make(70, seed=5 + step, step=float(step)) for step in range(2, 9)),
        ]
    )


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_partitions_and_odd_addresses_give_the_same_bits(dtype) -> None:
    """Wide loads and narrow ones, whole tensors and pieces of them."""
    whole = make(7186, dtype, dtype, dtype).tensors
    pieces = []
    cuts = [0, 1, 64, 3001, 7186]
    for start, end in itertools.pairwise(cuts):
        fields = {name: getattr(whole, name)[start:end] for name in (*KEPT, "grad", "anchor")}
        pieces.append(dataclasses.replace(whole, **fields))
    pieces = [_elsewhere(piece) for piece in pieces]
    table_of(pieces).step()
    table_of([whole]).step()
    for name in KEPT:
        assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces]), getattr(whole, name))


def _elsewhere(piece):
    return dataclasses.replace(copied(piece), grad=piece.grad.clone(), anchor=piece.anchor.clone())


def test_same_bits_from_run_to_run() -> None:
    one = make(5000).tensors
    again = copied(one)
    table_of([one]).step()
    table_of([again]).step()
    assert same(one, again)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("stochastic", [False, True])
def test_no_gradient_and_no_rate_move_nothing(dtype, stochastic) -> None:
    settings = dataclasses.replace(SETTINGS, lr=0.0, seed=5 if stochastic else None)
    one = make(3000, dtype, dtype, None, settings=settings).tensors
    weight = torch.cat([one.weight[:-2], torch.tensor([0.0, -0.0]).to(one.weight)])
    for x in (one.grad, one.exp_avg, one.exp_avg_sq):
        x.zero_()
    one.weight.copy_(weight)
    table_of([one]).step()
    assert torch.equal(one.weight, weight)
    assert torch.equal(one.weight.signbit(), weight.signbit())
    assert not one.exp_avg.any()
    assert not one.exp_avg_sq.any()


@pytest.mark.parametrize("variant", VARIANTS[:: len(VARIANTS) - 1], ids=lambda variant: variant.name)
def test_after_infinite_gradients_nothing_is_touched(variant) -> None:
    one = make(5000, variant.weight, variant.state, variant.anchor).tensors
    one.grad[17] = math.inf
    before = copied(one)
    table_of([one], StepScalars(found_inf=number(1))).step()
    assert same(one, before)
    table_of([one], StepScalars(found_inf=number(0))).step()
    assert not same(one, before)


def test_the_scale_is_taken_out_and_the_clip_is_put_in() -> None:
    """The scale before the term is added, the clip after."""
    scale = 3000.0
    guarded = [make(size, offset=offset, seed=1) for size, offset in ((3000, 0), (999, 1))]
    for one in guarded:
        one.tensors.grad.mul_(scale)
    scalars = StepScalars(inverse_scale=number(1 / scale), clip=number(0.25))
    check(guarded, scalars, scale=scale, clip=0.25)


@pytest.mark.parametrize("variant", list(variants.norm_variants()), ids=lambda variant: variant.name)
def test_the_sum_of_squares_has_the_term_in_it(variant) -> None:
    state = BF16 if variant.weight == FP32 and variant.block > 1024 else FP32
    settings = dataclasses.replace(SETTINGS, pull=0.5, lr=0.1)
    guarded = [
        make(size, variant.weight, state, variant.anchor, offset, settings=settings)
        for size, offset in ((0, 0), (1, 0), (7186, 0), (3 * variant.block, 0), (variant.block + 1, 3))
    ]
    without = make(500, variant.weight, state, variant.anchor, settings=settings)
    tensors = [one.tensors for one in guarded] + [dataclasses.replace(without.tensors, grad=None)]
    table = table_of(tensors, StepScalars(inverse_scale=number(0.5), clip=number(math.nan)))
    assert table.variant.of_norm == variant
    table._sums.fill_(math.nan)
    got = table.sum_of_squares()
    expected = 0.0
    for one in tensors[:-1]:
        w, g = one.weight.double().cpu(), one.grad.double().cpu() / 2
        g = g if one.anchor is None else g + 0.5 * (w - one.anchor.double().cpu())
        expected += float(g.square().sum())
    assert got.dtype == torch.float64
    assert float(got) == pytest.approx(expected, rel=1e-6)


def test_addresses_beyond_2_to_the_31_elements() -> None:
    """Not only tensors far away: the far end of one that is so long. Pages that nobody touches cost nothing."""
    length = 2**31 + 2**12
    block = variants.StepVariant(BF16, BF16, None).block
    tensors = make(1, BF16, BF16, None).tensors
    fields = {name: torch.empty(length, dtype=BF16, device=DEVICE) for name in (*KEPT, "grad")}
    far = dataclasses.replace(tensors, **fields)
    ends = make(block, BF16, BF16, None).tensors
    for name in (*KEPT, "grad"):
        getattr(far, name)[-block:] = getattr(ends, name)
    table = table_of([far])
    assert table.programs == length // block
    # All programs but the last are left out: the interpreter would take hours.
    table._chunks = table._chunks[-1:].clone()
    assert table._chunks.tolist() == [[0, length // block - 1]]
    table.programs = 1
    table.step()
    before = copied(ends)
    got = dataclasses.replace(ends, **{name: getattr(far, name)[-block:] for name in KEPT})
    assert max(worst(got, before).values()) <= 1
    assert not far.weight[: 2 * block].any() or DEVICE == "cuda"


def test_stochastic_rounding_has_the_bits_of_the_reference_and_no_bias() -> None:
    settings = dataclasses.replace(SETTINGS, seed=2**40 + 3)
    one = make(50_000, BF16, BF16, BF16, settings=settings, ordinal=5).tensors
    truth, before = exact(one), copied(one)
    by_torch = copied(one)
    table_of([one]).step()
    reference.proximal_step(by_torch)
    for name in KEPT:
        got, other = getattr(one, name), getattr(by_torch, name)
        assert (got != other).double().mean() < 1e-3, "where float32 itself was rounded otherwise"
        away = (got.double().cpu() - truth[name]) / torch.finfo(BF16).eps
        spread = float(away.std() / math.sqrt(len(away)))
        assert abs(float(away.mean())) < 5 * spread + 1e-4
        assert not torch.equal(got, getattr(before, name))
    moved = [getattr(one, name).double().cpu() > truth[name] for name in KEPT]
    for i in range(3):
        agree = (moved[i] == moved[i - 1]).double().mean()
        assert abs(float(agree) - 0.5) < 0.02, "each of w, m and v has bits of its own"


def test_stochastic_rounding_keeps_what_is_not_finite() -> None:
    settings = dataclasses.replace(SETTINGS, seed=1)
    one = make(64, BF16, BF16, None, settings=settings).tensors
    one.grad[:3] = torch.tensor([math.inf, -math.inf, math.nan])
    table_of([one]).step()
    assert one.exp_avg[:2].tolist() == [math.inf, -math.inf]
    assert one.exp_avg_sq[:2].tolist() == [math.inf, math.inf]
    assert one.exp_avg[2].isnan()
    assert one.weight[:3].isnan().all()
    assert one.weight[3:].isfinite().all()


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"grad": torch.zeros(6, 4).double()}, False),
        ({"weight": torch.zeros(6, 4).half(), "grad": torch.zeros(6, 4).half()}, False),
        ({"exp_avg": torch.zeros(6, 4).half()}, False),
        ({"exp_avg_sq": torch.zeros(6, 4).bfloat16()}, False),
        ({"anchor": torch.zeros(6, 4).bfloat16()}, False),
        ({"anchor": torch.zeros(6, 3)}, False),
        ({"grad": torch.zeros(4, 6).t()}, False),
        ({name: torch.zeros(4, 6).t() for name in (*KEPT, "grad", "anchor")}, True),
        ({name: torch.zeros(4, 7).t()[:6] for name in (*KEPT, "grad", "anchor")}, False),
        ({name: torch.zeros(1, 4).expand(6, 4) for name in (*KEPT, "grad", "anchor")}, False),
    ],
)
def test_what_has_a_kernel(change, fits) -> None:
    plain = {name: torch.zeros(6, 4) for name in (*KEPT, "grad", "anchor")}
    one = reference.StepTensors(**{**plain, **change}, settings=SETTINGS, step=1.0)
    assert (launch.variant_of(one) is not None) == fits


def test_an_anchor_that_does_not_act_is_not_read() -> None:
    one = make(10, settings=dataclasses.replace(SETTINGS, pull=0.0)).tensors
    assert launch.variant_of(one).anchor is None
    assert launch.variant_of(dataclasses.replace(one, settings=SETTINGS)).anchor == FP32


def test_the_tables_parts_are_at_multiples_of_16_bytes() -> None:
    for count in range(1, 6):
        table = table_of([make(10, seed=i).tensors for i in range(count)])
        assert all(argument.data_ptr() % 16 == 0 for argument in table._arguments())
        assert all(argument.is_contiguous() for argument in table._arguments())


def test_only_what_moved_is_sent_again() -> None:
    """Scalars each time: 4 rows of 48 bytes, and the addresses of what they are scaled by; 8 bytes for a gradient."""
    tensors = [make(100, seed=i).tensors for i in range(30)]
    table = table_of(tensors)
    scalars, gradients, of_tensors = 4 * 48 + 4 * 8, 30 * 8, 30 * 64
    assert table.sent == scalars + gradients + of_tensors
    table.update(tensors, StepScalars())
    assert table.sent == scalars
    addresses = [argument.data_ptr() for argument in table._arguments()]
    launches = table._launches
    moved = [dataclasses.replace(one, grad=one.grad.clone(), step=4.0) for one in tensors]
    table.update(moved, StepScalars())
    assert table.sent == scalars + gradients
    moved[7] = dataclasses.replace(moved[7], exp_avg=moved[7].exp_avg.clone())
    table.update(moved, StepScalars())
    assert table.sent == scalars + gradients + of_tensors
    moved[7] = dataclasses.replace(moved[7], settings=dataclasses.replace(SETTINGS, lr=1.0))
    table.update(moved, StepScalars())
    assert table.sent == scalars + gradients + of_tensors
    assert [argument.data_ptr() for argument in table._arguments()] == addresses
    assert table._launches is launches
    before = [copied(one) for one in moved]
    table.step()
    assert all(max(worst(one, old).values()) <= 1 for one, old in zip(moved, before, strict=True))


def test_other_lengths_and_more_rows_make_another_table() -> None:
    tensors = [make(100, seed=i, step=1.0 + i).tensors for i in range(9)]
    table = table_of(tensors[:2])
    table.step()
    at_one_step = [dataclasses.replace(one, step=3.0) for one in tensors]
    for several in (tensors, tensors[3:5], [make(5000, seed=9).tensors], at_one_step, tensors):
        before = [copied(one) for one in several]
        table.update(several, StepScalars())
        table.step()
        assert all(max(worst(one, old).values()) <= 1 for one, old in zip(several, before, strict=True))


def test_numbers_of_the_wrong_kind_are_refused() -> None:
    tensors = [make(10).tensors]
    for wrong in (torch.ones(2, device=DEVICE), torch.ones((), dtype=torch.float64, device=DEVICE)):
        with pytest.raises(FastlockError, match="must be one float32 each"):
            table_of(tensors, StepScalars(found_inf=wrong))


def test_no_elements_are_no_launch() -> None:
    table = table_of([make(0).tensors])
    table.step()
    assert table.programs == 0
    assert float(table.sum_of_squares()) == 0


class Loaded:
    """A cubin's kernel, as `cubins.Kernel`: launched, it runs Triton's on the addresses that it was given."""

    def __init__(self, variant, table):
        self.variant, self.table, self.packed = variant, table, []

    def launcher(self, grid, addresses):
        arguments = self.table._arguments()
        assert list(addresses) == [argument.data_ptr() for argument in arguments]
        self.packed.append(grid)
        return launch._by_jit(self.variant, arguments, grid[0])


def test_a_cubin_is_packed_once_and_launched_again_and_again(monkeypatch) -> None:
    one = make(3000).tensors
    table = table_of([one])
    kernel = Loaded(table.variant, table)
    monkeypatch.setattr(launch, "launcher_of", lambda variant, device: functools.partial(launch._by_cubin, kernel))
    for step in range(3):
        before = copied(one)
        following = dataclasses.replace(one, step=1.0 + step, grad=one.grad.clone())
        table.update([following], StepScalars())
        table.step()
        assert max(worst(following, dataclasses.replace(before, step=1.0 + step)).values()) <= 1
    assert kernel.packed == [(3, 1, 1)]


def test_cubins_come_before_triton(monkeypatch) -> None:
    variant, device = VARIANTS[0], torch.device("cuda", 1)
    asked, found = [], ["kernel", None]

    def choose(name, index):
        asked.append((name, index))
        return cubins.Choice(found[len(asked) - 1], "")

    monkeypatch.setattr(cubins.LOADER, "choose", choose)
    assert list(launch._ways(variant, device)) == ["cubin", "jit"]
    assert list(launch._ways(variant, device)) == ["jit"]
    assert asked == [(variant.name, 1)] * 2
    found += [None] * 9
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    assert list(launch._ways(variant, device)) == []
    with pytest.raises(NoWayError):
        launch.launcher_of(variant, device)
    assert "cannot be run here" in launch.why_not(variant, device) or cubins.interpreting()


def test_a_forked_process_launches_nothing(monkeypatch) -> None:
    arguments = [torch.zeros(1)]
    monkeypatch.setattr(launch, "cuda_index", lambda device: 0)
    with pytest.raises(FastlockError, match="forked"):
        launch._launch_jit(arguments, VARIANTS[0], 1, process=-1)
