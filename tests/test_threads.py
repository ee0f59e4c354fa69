"""Threads that share work, in each of which torch keeps to one."""

import threading

import pytest
import torch

from fastlock.threads import MAX_THREADS, in_threads, started_threads, threads_for


@pytest.fixture
def three():
    """Torch with three threads in this one."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def test_the_results_are_in_order_and_come_from_as_many_threads(three: int) -> None:
    met = threading.Barrier(three, timeout=60)

    def work(number: int) -> tuple[int, int]:
        met.wait()  # which ends only where all are there at once
        return number, threading.get_ident()

    results = in_threads(work, range(2 * three))
    assert [number for number, _ in results] == list(range(2 * three))
    assert len({thread for _, thread in results} - {threading.get_ident()}) == three


def test_torch_has_one_thread_in_each_and_what_it_had_elsewhere(three: int) -> None:
    """In this thread, and in one that begins to use torch meanwhile: there it takes what was set last."""
    elsewhere: list[int] = []

    def work(_: int) -> tuple[int, bool]:
        other = threading.Thread(target=lambda: elsewhere.append(torch.get_num_threads()))
        other.start()
        other.join()
        torch.ones(2**17).sum()  # long enough to be shared
        return torch.get_num_threads(), threading.current_thread() is threading.main_thread()

    assert in_threads(work, range(three)) == [(1, False)] * three
    assert elsewhere == [three] * three
    assert torch.get_num_threads() == three


def test_the_first_error_is_raised_and_the_rest_is_not_begun(three: int) -> None:
    begun: list[int] = []
    before = {*threading.enumerate()}  # other tests' libraries may have left some

    def work(number: int) -> None:
        begun.append(number)
        if number == 1:
            raise MemoryError(f"no memory for {number}")

    with pytest.raises(MemoryError, match="no memory for 1"):
        in_threads(work, range(10_000))
    assert len(begun) < 10_000
    assert torch.get_num_threads() == three
    assert {*threading.enumerate()} <= before


def test_nothing_is_started_where_torch_has_one_thread_or_there_is_nothing_to_do(
    three: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_is_wanted(*_: object) -> None:
        raise AssertionError("a thread was started")

    monkeypatch.setattr(threading.Thread, "start", none_is_wanted)
    assert in_threads(str, []) == []
    torch.set_num_threads(1)
    assert in_threads(lambda _: threading.current_thread() is threading.main_thread(), range(3)) == [True] * 3


def test_a_thread_that_cannot_be_started(three: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others do not wait for it forever."""
    start, started = threading.Thread.start, []

    def second_is_refused(thread: threading.Thread) -> None:
        started.append(thread)
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", second_is_refused)
    with pytest.raises(RuntimeError, match="can't start new thread"), started_threads(3):
        pytest.fail("it was begun without all of its threads")
    assert torch.get_num_threads() == three


def test_how_many_threads(three: int) -> None:
    assert [threads_for(items) for items in (0, 1, 2, 3, 100)] == [0, 1, 2, 3, 3]
    torch.set_num_threads(MAX_THREADS + 5)
    assert threads_for(100) == MAX_THREADS
