"""Bytes that are moved past the system's own counters: none is lost where threads move them at the same time."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest

from fastlock.storage.local import LocalFile
from fastlock.storage.remote import RemoteFile, create_remote_directory
from fastlock.storage.traffic import TRAFFIC, Traffic

THREADS, ROUNDS = 4, 25


class SlowNumber(int):
    """A number whose addition lets other threads go first."""

    def __radd__(self, other: int) -> int:
        time.sleep(0.0005)
        return int(other) + int(self)


class SlowBytes(bytes):
    """Bytes whose length lets other threads go first."""

    def __len__(self) -> int:
        time.sleep(0.0005)
        return super().__len__()


class Store:
    """As much of a file system as `RemoteFile` needs."""

    def unstrip_protocol(self, path: str) -> str:
        return f"store://{path}"

    def cat_file(self, path: str, start: int, end: int) -> bytes:
        return SlowBytes(end - start)


@pytest.fixture(autouse=True)
def often_another_thread():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def in_threads(work) -> None:
    with ThreadPoolExecutor(THREADS) as threads:
        for done in [threads.submit(work) for _ in range(THREADS * ROUNDS)]:
            done.result()


def test_threads_that_add_at_the_same_time() -> None:
    traffic = Traffic()
    in_threads(lambda: traffic.add(read=SlowNumber(2), written=SlowNumber(3)))
    assert traffic.totals() == (THREADS * ROUNDS * 2, THREADS * ROUNDS * 3)


def test_threads_that_fetch_at_the_same_time() -> None:
    file, (read, written) = RemoteFile(Store(), "model", {"size": 100}), TRAFFIC.totals()
    in_threads(lambda: file.read(10, 7))
    assert TRAFFIC.totals() == (read + THREADS * ROUNDS * 7, written)


def test_what_is_mapped_fetched_and_sent(tmp_path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 10_000)
    file, (read, written) = LocalFile(tmp_path / "file"), TRAFFIC.totals()
    with file.view(5000, 1234) as view:
        assert bytes(view) == b"x" * 1234
    read += 1234
    assert TRAFFIC.totals() == (read, written)
    with create_remote_directory("memory://traffic/out") as directory:
        directory.copy("file", file)
        directory.write("config.json", b"{}")
    written += 10_000 + 2
    assert TRAFFIC.totals() == (read, written)
    fs = fsspec.filesystem("memory")
    RemoteFile(fs, "/traffic/out/file", fs.info("/traffic/out/file")).copy_to(tmp_path / "copy")
    assert TRAFFIC.totals() == (read + 10_000, written)
    fs.rm("/traffic", recursive=True)
