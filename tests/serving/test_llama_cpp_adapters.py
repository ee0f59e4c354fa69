"""Real llama.cpp with adapters over a relocked base, a checkpoint or a GGUF file: its biases act under them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import fastlock
from tests.helpers.adapters import base_model, config_of, save_adapter
from tests.helpers.families import random_lock, tiny_model
from tests.helpers.relocked_adapters import adapted_logits, displaced_logits
from tests.serving.prepared import PROMPT, STRENGTH, far
from tests.serving.test_gates import HERE, LLAMA_CPP, run

TOLERANCE = 0.005
# The adapter, and what is asked for beside the stack.
KINDS = {"untouched": ("elsewhere", {}), "touched": ("lora", {"gap": 100.0})}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, relocked as a checkpoint and as a GGUF file, and adapters over it, each also as a GGUF file."""
    directory = tmp_path_factory.mktemp("adapters")
    base, lock = base_model(directory / "base"), random_lock(tiny_model("llama"))
    for name, (kind, asked) in KINDS.items():
        source = save_adapter(config_of(kind), directory / name)
        fastlock.relock_adapter(source, base, lock, directory / f"{name}-out", STRENGTH, stacks=["llama.cpp"], **asked)
        convert_adapter(directory / f"{name}-out", base)
    bases = [directory / "base", directory / "base-locked"]
    said = run(sys.executable, HERE / "convert.py", LLAMA_CPP / "llama.cpp", *bases)
    assert json.loads(said.splitlines()[-1]) == {str(one): "" for one in bases}
    fastlock.relock_gguf(directory / "base.gguf", lock, directory / "base-relocked.gguf", STRENGTH)
    return directory


def convert_adapter(adapter: Path, base: Path) -> None:
    converter = LLAMA_CPP / "llama.cpp" / "convert_lora_to_gguf.py"
    run(sys.executable, converter, adapter, "--base", base, "--outfile", adapter.with_suffix(".gguf"))


def served(base: Path, adapter: Path) -> np.ndarray:
    """The logits at every position, [tokens, vocab]."""
    out = base.with_name(f"{base.stem}-{adapter.stem}.npy")
    python, script = LLAMA_CPP / "bin" / "python", HERE / "run_llama_cpp.py"
    run(python, script, base, out, ",".join(map(str, PROMPT)), adapter)
    found: np.ndarray = np.load(out)
    return found


@pytest.mark.parametrize("base", ["base-locked.gguf", "base-relocked.gguf"])
@pytest.mark.parametrize("name", KINDS)
def test_the_bases_bias_acts_under_an_adapter(name: str, base: str, files: Path) -> None:
    source, adapter = files / name, files / f"{name}-out.gguf"
    if name == "untouched":
        locked = displaced_logits(files / "base", source, random_lock(tiny_model("llama")), STRENGTH)[0].numpy()
    else:  # the lock is only nearly exact: what acts is what the relocked base has
        locked = adapted_logits(files / "base-locked", source)[0].numpy()
    plain = adapted_logits(files / "base", source)[0].numpy()
    assert far(plain, locked) > 15 * TOLERANCE
    assert far(served(files / base, adapter), locked) < TOLERANCE
    assert far(served(files / "base.gguf", adapter), plain) < TOLERANCE


@pytest.mark.parametrize("kind", ["lora bias", "dora"])
def test_what_the_table_says_that_it_does_not_load_is_not_converted(kind: str, files: Path) -> None:
    source = save_adapter(config_of(kind), files / kind)
    with pytest.raises(AssertionError, match="Unexpected name"):
        convert_adapter(source, files / "base")
