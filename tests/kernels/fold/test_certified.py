"""The quicker fold on a CPU gives every bit of the reference's, and asks it where it cannot be sure."""

from collections.abc import Iterator

import pytest
import torch

from fastlock.kernels.fold import certified, reference
from fastlock.kernels.fold.reference import HeadColumns

HEAD_DIM = 32
SMALL = 2.0**-20
NARROW = [torch.bfloat16, torch.float16, torch.float32]
# Of 8 heads: one, some apart, all side by side, and columns that begin anywhere.
STARTS = [(3 * HEAD_DIM,), (0, 2 * HEAD_DIM, 5 * HEAD_DIM), tuple(range(0, 8 * HEAD_DIM, HEAD_DIM)), (5, 90, 130)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows the reference was asked for, each time."""
    rows: list[int] = []

    def noted(columns: HeadColumns, *rest: object, _fold=reference.fold) -> torch.Tensor:
        rows.append(len(columns.matrix))
        return _fold(columns, *rest)

    monkeypatch.setattr(reference, "fold", noted)
    return rows


def assert_same(matrix: torch.Tensor, starts: tuple[int, ...], values: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Both give the same bits, NaN where the other has it; the room held NaN before."""
    columns = HeadColumns(matrix, starts)
    assert certified.applies_to(matrix)
    room = certified.Room.for_blocks(matrix.dtype, certified.least_room(columns))
    for memory in (room.narrow, room.middle, room.wide):
        memory.fill_(torch.nan)
    found, expected = certified.fold(columns, values, bias, room), reference.fold(columns, values, bias)
    assert found.dtype == expected.dtype
    same = (found == expected) & (found.signbit() == expected.signbit())
    assert (same | (found.isnan() & expected.isnan())).all(), (~same).nonzero()


def laid_out(matrix: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "by columns":
        return matrix.t().contiguous().t()
    if layout == "part of a wider one":
        wider = torch.full((len(matrix) + 3, matrix.shape[1] + HEAD_DIM), torch.nan, dtype=matrix.dtype)
        wider[2:-1, HEAD_DIM:] = matrix
        return wider[2:-1, HEAD_DIM:]
    return matrix


@pytest.mark.parametrize("layout", ["by rows", "by columns", "part of a wider one"])
@pytest.mark.parametrize("dtype", NARROW)
def test_every_bit_is_the_references(dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several blocks and a rest, in numbers of every size."""
    monkeypatch.setattr(certified, "_BLOCK_NUMBERS", 2**13)
    sizes = torch.exp2(torch.randint(-12, 6, (1283, 1)).float())
    matrix = laid_out((torch.randn(1283, 8 * HEAD_DIM) * sizes).to(dtype), layout)
    for starts in STARTS:
        values = torch.randn(len(starts), HEAD_DIM, dtype=torch.float64)
        for bias in (None, torch.randn(1283).to(dtype)):
            assert_same(matrix, starts, values, bias)
    assert_same(matrix, STARTS[1], torch.randn(3, HEAD_DIM), None)  # of float32 values


@pytest.mark.parametrize("dtype", NARROW)
def test_random_numbers_are_hardly_ever_in_doubt(dtype: torch.dtype, asked: list[int]) -> None:
    columns = HeadColumns((torch.randn(2000, 8 * HEAD_DIM) * 0.02).to(dtype), STARTS[1])
    certified.fold(columns, torch.randn(3, HEAD_DIM, dtype=torch.float64), torch.randn(2000).to(dtype))
    assert sum(asked) <= (0 if dtype != torch.float32 else 40)


@pytest.mark.parametrize("layout", ["by rows", "by columns"])
@pytest.mark.parametrize("dtype", NARROW)
def test_sums_on_the_middle_of_two_numbers(
    dtype: torch.dtype, layout: str, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 and half a unit, and pairs that cancel: which way the last bit falls is a matter of the order alone."""
    monkeypatch.setattr(certified, "_BLOCK_NUMBERS", 1100)  # a column at a time, or some rows
    numbers, size = pairs(dtype)
    ends = torch.tensor([1.0, torch.finfo(dtype).eps / 2]).expand(60, 2)
    doubtful, sure = torch.cat([ends, numbers, -numbers], dim=1), torch.randn(1000, HEAD_DIM)
    sure[:, -1] *= SMALL
    matrix, values = torch.cat([sure, doubtful]).to(dtype), torch.cat([torch.ones(2), size, size])[None]
    assert_same(laid_out(matrix, layout), (0,), values, None)
    assert max(asked) == len(matrix)  # which this test asked for
    assert 60 <= min(asked) < 66
    assert_orders_differ(matrix, values, None)


def test_biases_that_put_sums_on_the_middle() -> None:
    """The bias is so large that half a unit of it in float64 decides, which is more than W d leaves open."""
    numbers, size = pairs(torch.float32)
    ends = torch.tensor([2.0**-14, 2.0**-20]).expand(60, 2)
    matrix = torch.cat([ends, numbers * 2.0**-14, numbers * -(2.0**-14)], dim=1)
    values = torch.cat([torch.tensor([1.0, 2.0**-23]), size, size])[None]
    bias = torch.full((60,), 2.0**10)
    assert_same(matrix, (0,), values, bias)
    assert_orders_differ(matrix, values, bias)


def pairs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """60 rows of numbers, and what they are multiplied with; the last are small."""
    many = HEAD_DIM // 2 - 1
    numbers, size = torch.randn(60, many), torch.randn(many, dtype=torch.float64)
    numbers[:, -1] *= SMALL
    return numbers.to(dtype).float(), size


def assert_orders_differ(matrix: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Without which a test shows nothing."""
    by_blas = torch.mv(matrix.double(), values.flatten()) + (0 if bias is None else bias.double())
    expected = reference.fold(HeadColumns(matrix, (0,)), values, bias)
    assert (reference.rounded(by_blas, matrix.dtype) != expected).any()


@pytest.mark.parametrize("off", [0.0, 2**-60, -(2**-60), 2**-45, -(2**-45)])
@pytest.mark.parametrize("dtype", NARROW)
def test_just_off_the_middle(dtype: torch.dtype, off: float) -> None:
    matrix = torch.ones(40, 2, dtype=dtype)
    matrix[::2] = -1
    values = torch.tensor([[1 + torch.finfo(dtype).eps / 2, off]], dtype=torch.float64)
    assert_same(matrix, (0,), values, None)
    assert_same(matrix, (0,), values, torch.full((40,), 2.0, dtype=dtype))


@pytest.mark.parametrize("dtype", NARROW)
def test_huge_tiny_and_cancelled_numbers(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    matrix = torch.randn(64, HEAD_DIM).to(dtype)
    matrix[0] = info.max
    matrix[1] = -info.max
    matrix[2] = info.tiny
    matrix[3] = info.smallest_normal * info.eps  # the least
    matrix[4] = 0
    matrix[5, ::2], matrix[5, 1::2] = 1, -1
    matrix[6] = -0.0
    for size in (1.0, 2.0**-20, 2.0**20, 2.0**-140, 1e-200, 1e-320, 1e200, 1e308):
        for values in (torch.ones(1, HEAD_DIM), torch.randn(1, HEAD_DIM)):
            for bias in (None, torch.zeros(64, dtype=dtype), -matrix[:, 0]):
                assert_same(matrix, (0,), values.double() * size, bias)


@pytest.mark.parametrize("layout", ["by rows", "by columns"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite(number: float, layout: str) -> None:
    for dtype in NARROW:
        matrix = torch.randn(64, HEAD_DIM).to(dtype)
        spoilt, bias = matrix.clone(), torch.randn(64).to(dtype)
        spoilt[7, 5] = bias[9] = number
        values = torch.randn(1, HEAD_DIM, dtype=torch.float64)
        assert_same(laid_out(spoilt, layout), (0,), values, None)
        assert_same(laid_out(matrix, layout), (0,), values, bias)
        values[0, 3] = number
        assert_same(laid_out(matrix, layout), (0,), values, None)


def test_no_displacement_is_no_fold() -> None:
    bias = torch.randn(50).bfloat16()
    bias[3] = -0.0
    matrix = torch.randn(50, HEAD_DIM).bfloat16()
    assert_same(matrix, (0,), torch.zeros(1, HEAD_DIM, dtype=torch.float64), bias)


def test_no_rows_and_one_row() -> None:
    matrix, values = torch.randn(1, 8 * HEAD_DIM).bfloat16(), torch.randn(3, HEAD_DIM, dtype=torch.float64)
    assert_same(matrix, STARTS[1], values, None)
    assert certified.fold(HeadColumns(matrix[:0], STARTS[1]), values, matrix[:0, 0]).shape == (0,)


def test_it_applies_on_a_cpu_in_one_thread_to_what_is_narrower_than_float64() -> None:
    matrix = torch.randn(8, 8)
    assert certified.applies_to(matrix)
    assert certified.applies_to(matrix.t())
    assert not certified.applies_to(matrix.double())
    assert not certified.applies_to(matrix.to("meta"))
    assert not certified.applies_to(matrix[:, ::2])
    torch.set_num_threads(2)
    assert not certified.applies_to(matrix)
