"""A search that resumes after whatever stopped it: its trials are kept in a journal."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastlock.errors import DamagedError, FastlockError
from fastlock.recipes.trials import Trial
from fastlock.storage.files import write_atomic

_STUDY = "calibrate"  # what the search is called in its journal

_OPENING = b'{"op_code":'  # how a journal begins


def sampler_for(seed: int, done: int) -> Any:
    """What suggests the next trial, from nothing but the seed and the trials that are done.

    A search that resumes therefore tries what it would have tried without the stop. The trial during which it was
    stopped does not count (with Optuna's "constant liar", it would).
    """
    mixed = int(np.random.SeedSequence((seed, done)).generate_state(1)[0])
    return _optuna().samplers.TPESampler(seed=mixed, constant_liar=False)


def study_of(journal: Path | None, facts: dict[str, Any]) -> Any:
    """The search in Optuna, resumed if the journal holds it.

    Args:
        journal: the file that keeps the trials, if any does; its directory is made.
        facts: what makes it this search and no other, as JSON can hold it.

    Raises:
        DamagedError: the journal is damaged, or fastlock did not write it.
        FastlockError: it is of another search or cannot be written, or Optuna is not installed.
    """
    with keeping(journal):
        study = _new_study(None) if journal is None else _study_in(journal)
        earlier = study.user_attrs.get("facts")
        if earlier is None:
            study.set_user_attr("facts", facts)
    if earlier not in (None, facts):
        changed = ", ".join(name for name in facts if earlier.get(name) != facts[name])
        raise FastlockError(
            f"{journal}: it is of another search (another {changed}). Give another place, or remove it."
        )
    return study


def _new_study(storage: Any) -> Any:
    directions = ["maximize", "minimize", "minimize"]
    return _optuna().create_study(study_name=_STUDY, directions=directions, storage=storage)


def _study_in(journal: Path) -> Any:
    """The search in a journal, which is begun if it is not there."""
    optuna = _optuna()
    journal.parent.mkdir(parents=True, exist_ok=True)
    if journal.exists():
        _drop_torn_line(journal)
    # Left by a run that was killed while it wrote: Optuna would wait for it, at a relative path forever.
    journal.with_name(f"{journal.name}.lock").unlink(missing_ok=True)
    try:
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
        if _STUDY not in optuna.get_all_study_names(storage):
            return _new_study(storage)
        study = optuna.load_study(study_name=_STUDY, storage=storage)
        measured_trials(study)
        return study
    except OSError:
        raise
    except Exception as error:  # whatever Optuna's parts, and ours, raise at lines that they did not write
        raise _damaged(journal, f"{type(error).__name__}: {error}") from None


def _drop_torn_line(journal: Path) -> None:
    """Drop the last line if it was not written to its end (no room, no power): Optuna would append to it.

    Only a part of a trial is lost, which is tried again.
    """
    data = journal.read_bytes()
    if not _OPENING.startswith(data[: len(_OPENING)]):
        raise _damaged(journal, "it is not a journal")
    *lines, torn = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            raise _damaged(journal, f"line {number} is not JSON") from None
    if torn:
        write_atomic(journal, data.removesuffix(torn))


def _damaged(journal: Path, reason: str) -> DamagedError:
    return DamagedError(f"{journal}: cannot be resumed ({reason}). Give another place, or remove it.")


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise FastlockError("calibration searches with Optuna: pip install 'fastlock[calibrate]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


@contextlib.contextmanager
def keeping(journal: Path | None) -> Iterator[None]:
    """Around what reads and writes the journal: it says what to do if the file system refuses.

    Raises:
        FastlockError: the file system refuses.
    """
    try:
        yield
    except OSError as error:
        raise FastlockError(
            f"{journal}: cannot be written ({error}). Make room or give the right to write there, and run the same "
            "command again; or give another place."
        ) from None


def measured_trials(study: Any) -> tuple[Trial, ...]:
    """The trials that were measured; one during which the run was stopped is not among them."""
    return tuple(Trial(**trial.user_attrs["trial"]) for trial in study.trials if trial.state.name == "COMPLETE")
