"""What a plan does with its groups when one of them goes wrong: no error is lost, and nothing begun is left running."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from fastlock.errors import FastlockError
from fastlock.fold import GroupedPlan


@dataclass
class Group:
    """A group that counts what it is told, and goes wrong as asked."""

    error: FastlockError | None = None
    refused: BaseException | None = None
    interrupted: BaseException | None = None
    started: int = 0
    finished: int = 0

    def start(self) -> None:
        if self.refused:
            raise self.refused
        self.started += 1

    def finish(self) -> FastlockError | None:
        self.finished += 1
        if self.interrupted and self.finished == 1:
            raise self.interrupted
        return self.error


def plan_of(*groups: Group) -> GroupedPlan:
    plan = GroupedPlan()
    plan._groups = groups
    return plan


@pytest.mark.parametrize("wrong", [(0,), (2,), (0, 1)], ids=str)
def test_the_first_error_is_raised_and_every_group_awaited(wrong: tuple[int, ...]) -> None:
    groups = [Group(FastlockError(f"of group {number}") if number in wrong else None) for number in range(3)]
    with pytest.raises(FastlockError, match=f"of group {wrong[0]}"):
        plan_of(*groups).run()
    assert all(group.started == 1 and group.finished for group in groups)


def test_a_group_that_cannot_be_begun_leaves_none_running() -> None:
    groups = [Group(), Group(refused=FastlockError("no memory")), Group()]
    with pytest.raises(FastlockError, match="no memory"):
        plan_of(*groups).start()
    assert groups[0].finished
    assert not groups[2].started


def test_an_interrupt_while_waiting_leaves_none_running() -> None:
    groups = [Group(interrupted=KeyboardInterrupt()), Group()]
    plan = plan_of(*groups)
    plan.start()
    with pytest.raises(KeyboardInterrupt):
        plan.finish()
    assert all(group.finished for group in groups)


def test_what_goes_wrong_while_settling_does_not_hide_the_error() -> None:
    groups = [Group(interrupted=ValueError("while settling")), Group(refused=FastlockError("no memory"))]
    with pytest.raises(FastlockError, match="no memory"):
        plan_of(*groups).start()
