"""The way back of a whole zoo: the loop that docs/zoo.md prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import fastlock
from tests.helpers.adapters import config_of, save_adapter
from tests.helpers.gguf_files import Kind, Tiny, lock_of
from tests.helpers.relocked_adapters import contents

PAGE = Path(__file__).parents[2] / "docs" / "zoo.md"


def test_the_loop_of_the_page_unlocks_what_it_finds(files: Path) -> None:
    lock, zoo, relocked = fastlock.Lock.load(files / "lock.safetensors"), files / "zoo", files / "RELOCKED"
    base = zoo / "org" / "a b"
    base.parent.mkdir(parents=True)
    (files / "base").rename(base)
    save_adapter(config_of("lora"), zoo / "adapter")
    Tiny(Kind.Q8_0).write(zoo / "m.gguf")
    fastlock.relock_checkpoint(base, lock, relocked / "org" / "a b")
    fastlock.relock_adapter(zoo / "adapter", base, lock, relocked / "adapter", stacks=["transformers"])
    fastlock.relock_gguf(zoo / "m.gguf", lock_of([(0, 1), (2, 3)]), relocked / "m.gguf")
    (relocked / "plain").mkdir()
    (relocked / "plain" / "config.json").write_bytes((base / "config.json").read_bytes())
    (loop,) = re.findall(r"## The way back\n.*?```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-c", loop], cwd=files, env=environment, capture_output=True, text=True, check=False)
    assert contents(files / "UNLOCKED") == contents(zoo)
    assert "plain: is not relocked" in done.stderr
