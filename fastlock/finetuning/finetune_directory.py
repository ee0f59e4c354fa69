"""The directory of a fine-tune: what is kept there while it runs, how it is resumed, and how the result gets there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastlock.errors import FastlockError
from fastlock.locks.band import Band
from fastlock.storage.files import CONFIG, parse_object, read_bounded, write_atomic
from fastlock.storage.places import writable_directory

BAND_FILE = "band.json"
RECORD_FILE = "finetune.json"

_SETTINGS = "settings.json"
_STATE = "trainer_state.json"  # which a Trainer writes last
_MAX_STATE_BYTES = 2**30


class FinetuneDirectory:
    """A directory that a fine-tune is written to, made where there is none.

    While it runs, everything is below `training`; the result appears beside it at the end, config.json last.

    Raises:
        FastlockError: the directory cannot be written, holds a result already, or something else.
    """

    def __init__(self, out: Path) -> None:
        if (out / CONFIG).exists():
            raise FastlockError(f"{out}: holds a checkpoint already. Give another directory.")
        self._made = not out.exists()
        self.out = writable_directory(out)
        self.training = out / "training"
        others = [path.name for path in out.iterdir()]
        if others and not (self.training / _SETTINGS).exists():
            raise FastlockError(f"{out}: is not empty (it holds {others[0]}). Give another directory.")

    @property
    def band(self) -> Path:
        """Where the band of the run is kept."""
        return self.training / BAND_FILE

    @contextlib.contextmanager
    def nothing_left(self) -> Iterator[None]:
        """Of a run that fails before it is settled, leave nothing behind."""
        try:
            yield
        except BaseException:
            if self._made:
                with contextlib.suppress(OSError):  # it is not empty: the run was settled
                    self.out.rmdir()
            raise

    def settle(self, settings: dict[str, Any], band: Band | None) -> None:
        """Keep what decides the run, and its band; or see that a run that is resumed is the same.

        Raises:
            FastlockError: it was begun with other settings, or nothing can be written.
        """
        writable_directory(self.training)
        place = self.training / _SETTINGS
        if place.exists():
            begun = parse_object(read_bounded(place, _MAX_STATE_BYTES), str(place))
            now = json.loads(json.dumps(settings))
            if differing := sorted(key for key in begun.keys() | now.keys() if begun.get(key) != now.get(key)):
                raise FastlockError(
                    f"{self.out}: was begun with another {differing[0]} ({begun.get(differing[0])!r}, now "
                    f"{now.get(differing[0])!r}). To resume, give the same command; or give another directory."
                )
        else:
            if band is not None:
                band.save(self.band)
            write_atomic(place, json.dumps(settings, indent=1).encode())

    def last_checkpoint(self) -> Path | None:
        """The last whole checkpoint of the run; what is left of others is removed."""
        found = {}
        for path in self.training.glob("checkpoint-*"):
            step = path.name.removeprefix("checkpoint-")
            if step.isdecimal() and _is_whole(path):
                found[int(step)] = path
            else:
                shutil.rmtree(path)
        return found[max(found)] if found else None

    def new_result(self) -> Path:
        """An empty directory for the result."""
        place = self.training / "result"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        return place

    def finish(self, record: dict[str, Any]) -> None:
        """Put the result and the record of the run in place, and remove what was kept for it."""
        result = self.training / "result"
        names = sorted((path.name for path in result.iterdir()), key=lambda name: name == CONFIG)
        if self.band.exists():
            os.replace(self.band, self.out / BAND_FILE)
        write_atomic(self.out / RECORD_FILE, (json.dumps(record, indent=1) + "\n").encode())
        for name in names:
            os.replace(result / name, self.out / name)
        shutil.rmtree(self.training)


def _is_whole(checkpoint: Path) -> bool:
    try:
        parse_object(read_bounded(checkpoint / _STATE, _MAX_STATE_BYTES), str(checkpoint))
    except FastlockError:
        return False
    return (checkpoint / "optimizer.pt").is_file()
