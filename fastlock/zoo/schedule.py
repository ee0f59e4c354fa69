"""The order in which a zoo's checkpoints are done: what several of them share is folded once."""

from __future__ import annotations

from collections import deque

from fastlock.storage.places import Place, below
from fastlock.zoo.find import FileId, Source
from fastlock.zoo.tasks import Task


class Schedule:
    """Which checkpoint is next: the output projections in a file that several share are folded once.

    Of the checkpoints that share a file, the first one folds it while the others wait; if it did not (it failed, or
    was done already), the next one is the first. The very first unfinished checkpoint never waits, so it all ends.
    """

    def __init__(self, sources: list[Source], files: list[list[FileId]], out: Place | None = None) -> None:
        """Order the checkpoints.

        Args:
            sources: the checkpoints.
            files: for each, those of its files that others have too; see `shared_files`.
            out: the directory that the results go to; None if nothing is written.
        """
        self.sources = sources
        self._out = out
        self._files = files
        self._users: dict[FileId, deque[int]] = {}
        for index, shared in enumerate(files):
            for file in shared:
                self._users.setdefault(file, deque()).append(index)
        self._folds: dict[FileId, bytes] = {}
        self._was_ready = [False] * len(sources)
        self._finished = [False] * len(sources)
        self._ready: deque[int] = deque()
        for index in reversed(range(len(sources))):
            self._consider(index)

    def next_task(self) -> Task | None:
        """The next checkpoint that need not wait, None while there is none."""
        if not self._ready:
            return None
        index = self._ready.popleft()
        source, files = self.sources[index], self._files[index]
        known = {file: self._folds[file] for file in files if file in self._folds}
        return Task(
            index,
            source.place,
            source.name,
            str(below(self._out, source.name)) if self._out else "",
            tuple({id(folds): folds for folds in known.values()}.values()),
            returns_folds=len(known) < len(files),
            kind=source.kind,
        )

    def finished(self, index: int, folds: bytes | None) -> None:
        """Note that a checkpoint is done, and the folds that it made for others."""
        self._finished[index] = True
        for file in self._files[index]:
            users = self._users[file]
            while users and self._finished[users[0]]:
                users.popleft()
            if not users:
                self._folds.pop(file, None)
            elif file in self._folds:
                continue
            elif folds is not None:
                self._folds[file] = folds
                for user in reversed(users):
                    self._consider(user)
            else:
                self._consider(users[0])

    def _consider(self, index: int) -> None:
        """Put a checkpoint before all others that are ready, if it has nothing to wait for."""
        waits = any(file not in self._folds and self._users[file][0] != index for file in self._files[index])
        if not self._was_ready[index] and not waits:
            self._was_ready[index] = True
            self._ready.appendleft(index)
