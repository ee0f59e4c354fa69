"""The workers of a zoo: processes of this machine, or of a Ray cluster."""

from __future__ import annotations

import logging
import multiprocessing
import os
import queue
import signal
import time
from collections import Counter
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

import pebble

from fastlock.errors import FastlockError
from fastlock.zoo.tasks import Done, Job, Task, prepare

TASKS_PER_WORKER = 4
RAY_RETRIES = 2
RAY_PATIENCE = 15  # seconds
# What every worker needs: imported once, in the process that the workers are forked from. Those of transformers take
# seconds, which this process does not spend.
PRELOADED = [__name__, "transformers.models.auto.modeling_auto", "transformers.modeling_utils"]


class Pool(Protocol):
    """Workers: tasks go in, and come out done, or with the reason why they never will be."""

    @property
    def capacity(self) -> int:
        """How many tasks may be under way."""

    def submit(self, task: Task) -> None:
        """Take a task; it waits for a worker."""

    def next(self) -> tuple[Task, Done | str]:
        """Wait for the next task to end."""

    def stop(self) -> None:
        """End all workers; those at work clean up first."""


class LocalPool:
    """Worker processes on this machine.

    When a worker dies, only its task is lost, and that is tried once more.
    """

    def __init__(self, job: Job, workers: int) -> None:
        self.capacity = TASKS_PER_WORKER * workers
        self._job = job
        self._workers = workers
        self._running: dict[Future[Done], Task] = {}
        self._ended: queue.SimpleQueue[Future[Done]] = queue.SimpleQueue()
        self._deaths: Counter[int] = Counter()
        self._restarts = 0
        self._pool = self._new_pool()

    def submit(self, task: Task) -> None:
        """Take a task; it waits for a worker."""
        try:
            future = self._pool.schedule(_work, args=(task,))
        except RuntimeError:  # the pool has broken; `next` notices, and starts everything that is running again
            future = pebble.ProcessFuture()
        self._running[future] = task
        future.add_done_callback(self._ended.put)

    def next(self) -> tuple[Task, Done | str]:
        """Wait for the next task to end."""
        while True:
            try:
                future = self._ended.get(timeout=1)
            except queue.Empty:
                if not self._pool.active:
                    self._restart()
                continue
            if future not in self._running:
                continue
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                self._restart()
                continue
            task = self._running.pop(future)
            if error is None:
                self._restarts = 0
                return task, future.result()
            if not isinstance(error, pebble.ProcessExpired):
                return task, f"{task.source}: {type(error).__name__}: {error}"
            self._deaths[task.index] += 1
            if self._deaths[task.index] > 1:
                return task, _died(task, error.exitcode)
            self.submit(task)

    def stop(self) -> None:
        """End all workers; those at work clean up first."""
        self._pool.stop()
        self._pool.join()

    def _restart(self) -> None:
        """Start everything that was running again, with new workers, after the pool broke."""
        self.stop()
        self._restarts += 1
        if self._restarts > 3:
            raise FastlockError(
                "the worker processes end as soon as they start. If this runs from a script, call it under "
                "`if __name__ == '__main__':`; if memory is short, use fewer workers."
            )
        tasks, self._running = list(self._running.values()), {}
        self._pool = self._new_pool()
        for task in tasks:
            self.submit(task)

    def _new_pool(self) -> pebble.ProcessPool:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        _start_fork_server(context)
        return pebble.ProcessPool(
            self._workers, initializer=_start_worker, initargs=(self._job, dict(os.environ)), context=context
        )


def _start_fork_server(context: multiprocessing.context.ForkServerContext) -> None:
    """Start the process that workers are forked from, and wait until it can fork: its imports take seconds.

    It ignores Ctrl-C only once everything is imported: before that, Ctrl-C would end it with a traceback, and a pool
    that is given up meanwhile would leave it workers to fork that cannot start any more.
    """
    from multiprocessing import forkserver, resource_tracker  # Windows has none

    resource_tracker.ensure_running()  # which the fork server needs; starting it lifts the block below
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a new process inherits the mask
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    context.Process(target=_nothing, daemon=True).start()  # returns once it is forked


def _nothing() -> None:
    """What the first process does."""


def _died(task: Task, exit_code: int) -> str:
    try:
        how = signal.Signals(-exit_code).name
    except ValueError:
        how = f"exit code {exit_code}"
    return (
        f"{task.source}: its worker died twice ({how}): memory ran out, or the files changed while they were read. "
        "Run the same command again, with fewer workers."
    )


class _Stopped(BaseException):
    """Raised in a worker that is told to end while it is at work, which cleans up on the way out."""


class _Worker:
    """What a worker process knows: the job of its whole life, and whether it is at work."""

    def __init__(self) -> None:
        self._job: Job | None = None
        self._is_at_work = False

    def start(self, job: Job, environment: dict[str, str]) -> None:
        """Take the job on; the environment is the main process's, for credentials may be newer than the fork server."""
        self._job = job
        os.environ.update(environment)
        signal.signal(signal.SIGTERM, self._stop)
        prepare()

    def work(self, task: Task) -> Done:
        """Do a task; told to end meanwhile, clean up and exit."""
        if self._job is None:
            raise RuntimeError("the worker was not started")
        self._is_at_work = True
        try:
            return self._job.work(self._job, task)
        except _Stopped:
            os._exit(0)
        finally:
            self._is_at_work = False

    def _stop(self, *_: object) -> None:
        if self._is_at_work:
            raise _Stopped
        os._exit(0)


# The one of this process: pebble calls functions of the module, first `_start_worker` and then `_work`.
_WORKER = _Worker()


def _start_worker(job: Job, environment: dict[str, str]) -> None:
    _WORKER.start(job, environment)


def _work(task: Task) -> Done:
    return _WORKER.work(task)


class RayPool:
    """Tasks on a Ray cluster, with Ray's own scheduling and retries. All machines must see the same paths."""

    def __init__(self, job: Job, address: str, workers: int | None) -> None:
        try:
            import ray
        except ImportError:
            raise FastlockError("Ray is not installed. Run: pip install 'fastlock[ray]'") from None
        self._ray = ray
        self._started_here = not ray.is_initialized()
        if self._started_here:
            try:
                ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
            except Exception as error:  # Ray raises whatever its parts raise
                raise FastlockError(
                    f"{address}: no Ray cluster can be reached there ({error}). Give the host:port of one, `auto` on "
                    "one of its machines, or `local` for this machine alone."
                ) from None
        self._workers = workers
        self._job = ray.put(job)
        remote = ray.remote(_work_remotely)
        self._work = remote.options(num_cpus=1, max_retries=RAY_RETRIES, scheduling_strategy="SPREAD")
        self._running: dict[Any, Task] = {}
        self._capacity, self._counted = 0, -1e9

    @property
    def capacity(self) -> int:
        """How many tasks may be under way; it follows a cluster that grows."""
        if self._workers:
            return self._workers
        if time.monotonic() - self._counted > 5:
            cpus = int(self._ray.cluster_resources().get("CPU", 1))
            self._capacity, self._counted = TASKS_PER_WORKER * max(1, cpus), time.monotonic()
        return self._capacity

    def submit(self, task: Task) -> None:
        """Take a task; it waits for a worker."""
        self._running[self._work.remote(self._job, task)] = task

    def next(self) -> tuple[Task, Done | str]:
        """Wait for the next task to end."""
        (ended,), _ = self._ray.wait(list(self._running), num_returns=1)
        task = self._running.pop(ended)
        try:
            done: Done = self._ray.get(ended)
        except self._ray.exceptions.RayError as error:
            return task, f"{task.source}: {type(error).__name__}: {error}"
        return task, done

    def stop(self) -> None:
        """End all tasks; those at work finish, or clean up first.

        A task that ends at the moment it is cancelled brings Ray 2.60 down ("unexpected system state"): only those
        that do not end by themselves are cancelled.
        """
        for timeout in (RAY_PATIENCE, RAY_PATIENCE):
            if self._running:
                _, left = self._ray.wait(list(self._running), num_returns=len(self._running), timeout=timeout)
                for task in left:
                    self._ray.cancel(task, force=False)
                self._running = {task: self._running[task] for task in left}
        if self._started_here:
            self._ray.shutdown()


def _work_remotely(job: Job, task: Task) -> Done:
    return job.work(job, task)
