"""Ways of running a kernel: each checked once, the bad ones left, with a warning and the reason."""

import contextlib
import multiprocessing
import os
import threading
import warnings

import pytest
import torch

from fastlock.errors import FastlockError, UnsupportedError
from fastlock.kernels.ahead_of_time import ways as ways_module
from fastlock.kernels.ahead_of_time.driver import DriverError
from fastlock.kernels.ahead_of_time.ways import NoWayError, Ways, WrongResultError


@contextlib.contextmanager
def silent():
    """A warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


BOTH = {"cubin": "by cubin", "jit": "by jit"}


class Checks:
    """A check that fails as told, and what it was asked."""

    def __init__(self, **outcomes: bool | Exception) -> None:
        self.outcomes, self.asked = outcomes, []

    def __call__(self, way: str) -> bool:
        self.asked.append(way)
        outcome = self.outcomes.get(way.removeprefix("by "), True)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def test_what_passed_is_not_checked_again() -> None:
    ways, check = Ways(), Checks()
    assert [ways.first("fold", 0, BOTH, check) for _ in range(3)] == ["by cubin"] * 3
    assert check.asked == ["by cubin"]
    ways.first("fold", 1, BOTH, check)  # another device
    ways.first("other", 0, BOTH, check)
    assert check.asked == ["by cubin"] * 3
    ways.forget()
    ways.first("fold", 0, BOTH, check)
    assert len(check.asked) == 4


ABOUT_THE_WAY = [
    WrongResultError("its result was wrong"),
    DriverError("cuLaunchKernel: CUDA_ERROR_INVALID_IMAGE (200)", 200),
    RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
    RuntimeError("PTXAS error: Internal Triton PTX codegen error"),
    type("OutOfResources", (Exception,), {})("out of resource: shared memory"),
    FileNotFoundError(2, "No such file", "ptxas"),
    UnsupportedError("Triton cannot be imported"),
]


@pytest.mark.parametrize("error", ABOUT_THE_WAY, ids=lambda error: type(error).__name__)
def test_a_way_that_fails_is_left_with_one_warning(error: Exception) -> None:
    ways, check = Ways(), Checks(cubin=error)
    with pytest.warns(RuntimeWarning, match="fold is not run by its cubin on cuda:0: ") as warned:
        assert [ways.first("fold", 0, BOTH, check) for _ in range(3)] == ["by jit"] * 3
    assert len(warned) == 1
    assert str(error).rstrip(".") in str(warned[0].message)
    assert check.asked == ["by cubin", "by jit"]
    (bad,) = ways.bad(0)
    assert (bad.kernel, bad.index, bad.way) == ("fold", 0, "cubin")
    assert str(error).rstrip(".") in bad.reason
    assert ways.bad(1) == []


def test_no_way_left_is_an_error_that_says_why() -> None:
    ways, check = Ways(), Checks(cubin=WrongResultError("row 3 is 0"), jit=RuntimeError("no C compiler"))
    with pytest.warns(RuntimeWarning), pytest.raises(NoWayError, match="row 3 is 0; RuntimeError: no C compiler"):
        ways.first("fold", 0, BOTH, check)
    with silent(), pytest.raises(UnsupportedError, match="`fastlock doctor` says why"):
        ways.first("fold", 0, BOTH, check)
    assert check.asked == ["by cubin", "by jit"]


PASSING = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    DriverError("cuModuleLoadData: CUDA_ERROR_OUT_OF_MEMORY (2)", 2),
    DriverError("cuModuleLoadData: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED (900)", 900),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: operation not permitted when stream is capturing"),
]


@pytest.mark.parametrize("error", PASSING, ids=str)
def test_what_will_pass_says_nothing_about_a_way(error: Exception) -> None:
    ways, check = Ways(), Checks(cubin=error)
    with silent(), pytest.raises(type(error)):
        ways.first("fold", 0, BOTH, check)
    assert ways.bad(0) == []
    check.outcomes.clear()
    assert ways.first("fold", 0, BOTH, check) == "by cubin"


def test_a_broken_device_says_nothing_about_a_way(monkeypatch) -> None:
    """After an illegal address the driver fails at whatever is called; and nothing can be computed there instead."""

    class Broken:
        def synchronize(self) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: Broken())
    ways = Ways()
    with pytest.raises(DriverError, match="700"):
        ways.first("fold", 0, BOTH, Checks(cubin=DriverError("cuLaunchKernel: CUDA_ERROR_ILLEGAL_ADDRESS (700)", 700)))
    assert ways.bad(0) == []


def test_nothing_is_checked_while_a_graph_is_captured(monkeypatch) -> None:
    """Whatever waits for the device spoils the capture. What was checked before may be launched."""
    ways, check = Ways(), Checks()
    ways.first("checked", 0, BOTH, check)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(FastlockError, match="Run it once before the capture"):
        ways.first("fold", 0, BOTH, check)
    assert ways.first("checked", 0, BOTH, check) == "by cubin"
    assert check.asked == ["by cubin"]
    assert ways.bad(0) == []


def test_an_interruption_says_nothing_about_a_way() -> None:
    def interrupted(way: str) -> bool:
        raise KeyboardInterrupt

    ways = Ways()
    with pytest.raises(KeyboardInterrupt):
        ways.first("fold", None, BOTH, interrupted)
    assert ways.first("fold", None, BOTH, Checks()) == "by cubin"


def test_what_could_not_tell_is_asked_again() -> None:
    ways, check = Ways(), Checks(cubin=False)
    assert [ways.first("fold", 0, BOTH, check) for _ in range(2)] == ["by cubin"] * 2
    assert check.asked == ["by cubin"] * 2
    assert not ways.is_good("fold", 0, "cubin")


def test_threads_check_a_way_once() -> None:
    ways, check, start = Ways(), Checks(), threading.Barrier(8)

    def take() -> None:
        start.wait()
        ways.first("fold", 0, BOTH, check)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert check.asked == ["by cubin"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fork_checks_anew() -> None:
    """Nothing that was loaded works there; and another thread may have held the lock."""
    ours, theirs = multiprocessing.get_context("fork").Pipe()

    def child() -> None:
        check = Checks()
        ways_module.WAYS.first("forked", None, BOTH, check)
        theirs.send(check.asked)

    ways_module.WAYS.first("forked", None, BOTH, Checks())
    process = multiprocessing.get_context("fork").Process(target=child)
    holding, done = threading.Event(), threading.Event()

    def hold() -> None:
        with ways_module.WAYS._lock:
            holding.set()
            done.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    holding.wait()
    process.start()
    came = ours.poll(30)
    done.set()
    other.join()
    process.kill()
    process.join()
    assert came, "the child waits for a lock that nobody will release"
    assert ours.recv() == ["by cubin"]


def test_a_long_reason_is_cut() -> None:
    ways = Ways()
    with pytest.warns(RuntimeWarning), pytest.raises(NoWayError):
        ways.first("fold", None, {"jit": "by jit"}, Checks(jit=RuntimeError("ptxas:\n" + "x" * 10**6)))
    (bad,) = ways.bad(None)
    assert bad.sentence.startswith("the kernel fold is not run by its jit on the CPU: RuntimeError: ptxas: xxx")
    assert len(bad.sentence) < 1000
    assert isinstance(WrongResultError(""), FastlockError)
