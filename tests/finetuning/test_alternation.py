"""Which rows each step reads: none lost, none mixed, any step computed, whatever reads them."""

from collections import Counter

import pytest
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader

from fastlock.errors import FastlockError
from fastlock.finetuning.alternation import Alternation
from fastlock.finetuning.lisa_schedule import Lisa

sizes = st.integers(1, 4)


def dealt(sampler, batch_size, accumulation, ranks):
    """The rows of each optimizer step of an epoch, as BatchSampler and accelerate deal them out to the ranks."""
    batches = BatchSampler(sampler, batch_size, drop_last=False)
    # accelerate leaves the batches of a single rank as they are.
    shards = [batches] if ranks == 1 else [BatchSamplerShard(batches, ranks, rank) for rank in range(ranks)]
    of_ranks = [list(shard) for shard in shards]
    assert len({len(batches) for batches in of_ranks}) == 1, "ranks with more batches wait for the others for ever"
    assert len({tuple(map(len, batches)) for batches in of_ranks}) == 1
    starts = range(0, len(of_ranks[0]), accumulation)
    return [
        [row for batches in of_ranks for batch in batches[start : start + accumulation] for row in batch]
        for start in starts
    ]


@settings(max_examples=150, deadline=None)
@given(
    user_rows=st.integers(1, 40),
    alignment_rows=st.integers(1, 7),
    alignment_steps=st.integers(0, 5),
    user_steps=st.integers(1, 5),
    batch_size=sizes,
    accumulation=sizes,
    ranks=sizes,
)
def test_every_user_row_once_an_epoch_and_no_step_of_two_states(
    user_rows, alignment_rows, alignment_steps, user_steps, batch_size, accumulation, ranks
):
    lisa = Lisa(alignment_steps, user_steps, 1.0)
    sampler = Alternation(
        user_rows, alignment_rows, lisa, batch_size=batch_size, accumulation=accumulation, ranks=ranks, seed=7
    )
    step, safe = 0, []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        assert sampler.start(epoch) == step
        steps = dealt(sampler, batch_size, accumulation, ranks)
        assert sampler.steps(epoch) == len(steps)
        assert len(sampler) == len(list(sampler)) == sum(map(len, steps))
        user = Counter()
        for rows in steps:
            of_user = [row < user_rows for row in rows]
            assert all(of_user) or not any(of_user)
            assert ("user" if of_user[0] else "alignment") == lisa.state(step)
            assert sorted(rows) == sorted(sampler.indices(step))
            assert sampler.epoch_of(step) == epoch
            user.update(row for row in rows if row < user_rows)
            safe += sorted(row for row in sampler.indices(step) if row >= user_rows)
            step += 1
        assert set(user) == set(range(user_rows))
        again = sum(user.values()) - user_rows
        assert again == (-user_rows % (batch_size * ranks) if ranks > 1 else 0)
    uses = Counter(safe)
    assert set(uses) <= set(range(user_rows, user_rows + alignment_rows))
    if alignment_steps:
        full = Counter({row: uses[row] for row in range(user_rows, user_rows + alignment_rows)})
        assert max(full.values()) - min(full.values()) <= 1


def test_the_steps_of_the_paper():
    # 5000 rows in batches of 5: each epoch has 1000 steps on them. 100 alignment steps come before each 900.
    sampler = Alternation(5000, 10000, Lisa(100, 900, 1.0), batch_size=5)
    assert [sampler.steps(epoch) for epoch in range(4)] == [1200, 1100, 1100, 1100]
    assert sampler.steps_of(20) == sampler.start(20) == 20 * 1000 + 2300  # 23 runs of alignment steps, for 22.2 of 900
    assert sampler.steps_of(0.5) == 600


def test_each_epoch_and_seed_has_an_order_of_its_own():
    def order(seed, epoch):
        sampler = Alternation(50, 3, Lisa(1, 4, 1.0), batch_size=2, seed=seed)
        sampler.set_epoch(epoch)
        return [row for row in sampler if row < 50]

    assert order(1, 0) == order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)
    assert order(1, 0) != sorted(order(1, 0))


def test_without_shuffling_the_rows_come_in_order():
    sampler = Alternation(5, 3, Lisa(1, 2, 1.0), batch_size=2, shuffle=False)
    assert list(sampler) == [5, 6, 0, 1, 2, 3, 7, 5, 4]
    assert sampler.indices(4) == [4]


def test_drop_last_leaves_the_smaller_batch_out():
    sampler = Alternation(7, 3, Lisa(1, 2, 1.0), batch_size=2, ranks=2, drop_last=True)
    assert [len(rows) for rows in dealt(sampler, 2, 1, 2)] == [4, 4]
    assert sum(row < 7 for row in sampler) == 4
    with pytest.raises(FastlockError, match="3 rows, fewer than one batch of each rank"):
        Alternation(3, 3, Lisa(1, 2, 1.0), batch_size=2, ranks=2, drop_last=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_skips_and_reads_ahead(workers):
    sampler = Alternation(30, 7, Lisa(2, 3, 1.0), batch_size=3)
    loader = DataLoader(range(37), batch_size=3, sampler=sampler, num_workers=workers)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        expected = [sampler.indices(step) for step in range(sampler.start(epoch), sampler.start(epoch + 1))]
        assert [batch.tolist() for batch in loader] == expected
        assert [batch.tolist() for batch in skip_first_batches(loader, 4)] == expected[4:]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 3), {}, "the user's dataset has no rows"),
        ((3, 0), {}, "the alignment dataset has no rows, and alignment_steps is 1"),
        ((3, 3), {"batch_size": 0}, "batch_size is 0"),
        ((3, 3), {"accumulation": 0}, "accumulation is 0"),
        ((3, 3), {"ranks": -1}, "ranks is -1"),
        ((3.5, 3), {}, "user_rows is 3.5"),
    ],
)
def test_bad_numbers_are_refused(arguments, options, message):
    with pytest.raises(FastlockError, match=message):
        Alternation(*arguments, Lisa(1, 2, 1.0), **options)


def test_the_schedule_is_one():
    with pytest.raises(FastlockError, match="lisa is a tuple; give a schedule"):
        Alternation(3, 3, (1, 2, 1.0))


def test_no_alignment_steps_need_no_alignment_rows():
    assert sorted(Alternation(3, 0, Lisa(0, 2, 1.0))) == [0, 1, 2]
