"""The order of a zoo's checkpoints."""

import json
import random

import pytest

from fastlock.zoo.find import Source
from fastlock.zoo.schedule import Schedule


@pytest.mark.parametrize("seed", range(30))
def test_each_shared_file_is_folded_once(seed: int) -> None:
    """Random files, failures and orders of finishing: all end, and nothing that is known is folded again."""
    chance = random.Random(seed)
    count, kinds = 40, 12
    files = [sorted({(0, chance.randrange(kinds)) for _ in range(chance.randrange(4))}) for _ in range(count)]
    schedule = Schedule([Source(f"/{i}", str(i)) for i in range(count)], files)
    running, done, known = [], [], {}
    while len(done) < count:
        while len(running) < 5 and (task := schedule.next_task()) is not None:
            running.append(task)
        task = running.pop(chance.randrange(len(running)))
        given = {tuple(file) for folds in task.folds for file in json.loads(folds)}
        assert all(file in given for file in files[task.index] if file in known)
        missing = [file for file in files[task.index] if file not in given]
        assert task.returns_folds == bool(missing)
        fails = chance.random() < 0.2
        if not fails:
            known.update(dict.fromkeys(missing))
        schedule.finished(task.index, None if fails or not missing else json.dumps(missing).encode())
        done.append(task.index)
    assert sorted(done) == list(range(count))
    assert schedule.next_task() is None
    assert not schedule._folds
