"""The share of a zoo that one of several machines does."""

import pytest

import fastlock
from fastlock.zoo.shares import check_share, share_of


def test_shares_are_apart_and_all_there_is() -> None:
    zoo = [*"abcdefg"]
    assert share_of(zoo, None, None) == zoo
    assert [share_of(zoo, rank, 3) for rank in range(3)] == [[*"adg"], [*"be"], [*"cf"]]
    assert share_of(zoo, 8, 9) == []


@pytest.mark.parametrize(("rank", "world_size"), [(1, None), (None, 2), (2, 2), (-1, 2), (0, 0)])
def test_a_share_that_there_is_not(rank, world_size) -> None:
    with pytest.raises(fastlock.FastlockError, match=f"the rank is {rank}, and the world size {world_size}. Give both"):
        check_share(rank, world_size)
