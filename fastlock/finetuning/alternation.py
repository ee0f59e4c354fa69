"""Which rows each optimizer step reads, when two datasets take turns."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from fastlock.errors import FastlockError, check_number
from fastlock.finetuning.lisa_schedule import Lisa

_MOST_ROWS = sys.maxsize


class Alternation(Sampler[int]):
    """A sampler over a user's dataset and an alignment dataset laid end to end, which take turns as Lisa says.

    The user's rows are 0 … user_rows - 1, the alignment rows follow. It keeps nothing but the epoch: the rows of any
    optimizer step can be computed, so to resume is to count steps. An epoch is one pass through the user's rows, each
    of them once, lengthened by the alignment steps that fall into it, so epochs may differ in length; the states run
    on from one to the next. The alignment rows go round and round, each once before any comes again. Every step reads
    rows of one dataset. A user's epoch may end with a smaller step, as in any other training; several ranks must have
    batches of one size, so that step is filled up with rows from the epoch's start.

    Give it to a DataLoader over `torch.utils.data.ConcatDataset([user, alignment])`, with the same batch size, and call
    `set_epoch` before each epoch. With several ranks, the batches are dealt out to them in turn, as accelerate does.

    Args:
        user_rows: how many rows the user's dataset has.
        alignment_rows: how many the alignment dataset has; at least one, unless there are no alignment steps.
        lisa: the schedule.
        batch_size: rows in one batch of one rank.
        accumulation: batches that each rank reads in one optimizer step.
        ranks: how many processes read different batches.
        seed: decides the order of the rows.
        shuffle: False keeps the order of the datasets.
        drop_last: leave a last, smaller batch out, as a DataLoader does: some user rows are then not read.

    Raises:
        FastlockError: a number is not what it must be, a dataset is empty, or smaller than a batch of every rank when
            the last one is dropped.
    """

    def __init__(
        self,
        user_rows: int,
        alignment_rows: int,
        lisa: Lisa,
        *,
        batch_size: int = 1,
        accumulation: int = 1,
        ranks: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        check_rows(user_rows, alignment_rows, check_lisa(lisa))
        for name, value in (("batch_size", batch_size), ("accumulation", accumulation), ("ranks", ranks)):
            check_number(name, value, 1, _MOST_ROWS)
        self.lisa = lisa
        self.epoch = 0
        self._rows: dict[str, int] = {"user": user_rows, "alignment": alignment_rows}
        self._seed, self._shuffle = seed, shuffle
        self._step_rows = batch_size * accumulation * ranks
        even = batch_size * ranks if ranks > 1 or drop_last else 1
        # The rows of a user's epoch, filled up or cut to whole batches of every rank.
        self._epoch_rows = user_rows // even * even if drop_last else -(-user_rows // even) * even
        if not self._epoch_rows:
            raise FastlockError(
                f"the user's dataset has {user_rows} rows, fewer than one batch of each rank ({even} rows), and "
                "drop_last leaves them out. Give more rows, or drop_last=False."
            )
        self._user_steps = -(-self._epoch_rows // self._step_rows)
        self._order: tuple[tuple[str, int], list[int]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0, that `iter` and `len` are about."""
        check_number("epoch", epoch, 0, _MOST_ROWS)
        self.epoch = epoch

    def __len__(self) -> int:
        """How many rows the epoch reads."""
        return (self.steps(self.epoch) - 1) * self._step_rows + self._last_rows

    def __iter__(self) -> Iterator[int]:
        """The rows of the epoch, step by step; in a step, the batches of all ranks, as they are dealt out."""
        for step in range(self.start(self.epoch), self.start(self.epoch + 1)):
            yield from self.indices(step)

    def start(self, epoch: int) -> int:
        """The first optimizer step of an epoch, counted over the whole training: the one after its predecessor's."""
        return self.lisa.step_of(epoch * self._user_steps - 1) + 1 if epoch else 0

    def steps(self, epoch: int) -> int:
        """How many optimizer steps an epoch has."""
        return self.start(epoch + 1) - self.start(epoch)

    def steps_of(self, epochs: float) -> int:
        """How many optimizer steps it takes to read so many epochs of the user's rows, or parts of one."""
        return self.lisa.step_of(max(1, math.ceil(epochs * self._user_steps)) - 1) + 1

    def epoch_of(self, step: int) -> int:
        """The epoch that an optimizer step belongs to."""
        return self.lisa.user_steps_before(step) // self._user_steps

    def indices(self, step: int) -> list[int]:
        """The rows of an optimizer step, counted over the whole training: the batches of all ranks, in turn."""
        user_steps = self.lisa.user_steps_before(step)
        if self.lisa.state(step) == "user":
            epoch, within = divmod(user_steps, self._user_steps)
            order = self._ordered("user", epoch)
            ends = min((within + 1) * self._step_rows, self._epoch_rows)
            return [order[i % len(order)] for i in range(within * self._step_rows, ends)]
        first, rows = (step - user_steps) * self._step_rows, self._rows["alignment"]
        places = (divmod(i, rows) for i in range(first, first + self._step_rows))
        return [self._rows["user"] + self._ordered("alignment", turn)[i] for turn, i in places]

    @property
    def _last_rows(self) -> int:
        """How many rows the last step of an epoch reads."""
        return self._epoch_rows - (self._user_steps - 1) * self._step_rows

    def _ordered(self, dataset: str, turn: int) -> Sequence[int]:
        """The rows of one dataset, in the order in which its `turn`-th pass reads them."""
        if not self._shuffle:
            return range(self._rows[dataset])
        if self._order is None or self._order[0] != (dataset, turn):
            seed = random.Random(f"{self._seed} {dataset} {turn}").getrandbits(63)
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(self._rows[dataset], generator=generator).tolist()
            self._order = ((dataset, turn), order)
        return self._order[1]


def check_lisa(lisa: object) -> Lisa:
    """The same schedule; refuse what is none.

    Raises:
        FastlockError: it is not a `Lisa`.
    """
    if not isinstance(lisa, Lisa):
        raise FastlockError(
            f"lisa is a {type(lisa).__name__}; give a schedule: fastlock.Lisa(alignment_steps=100, user_steps=900, "
            "pull=1.0)."
        )
    return lisa


def check_rows(user_rows: int, alignment_rows: int, lisa: Lisa) -> None:
    """Refuse datasets that a schedule cannot take rows from.

    Raises:
        FastlockError: one of them is empty.
    """
    check_number("user_rows", user_rows, 0, _MOST_ROWS)
    check_number("alignment_rows", alignment_rows, 0, _MOST_ROWS)
    if not user_rows:
        raise FastlockError("the user's dataset has no rows. Give at least one to train on.")
    if lisa.alignment_steps and not alignment_rows:
        raise FastlockError(
            f"the alignment dataset has no rows, and alignment_steps is {lisa.alignment_steps}. Give at least one row "
            "(harmful requests with the refusals to keep), or alignment_steps=0."
        )
