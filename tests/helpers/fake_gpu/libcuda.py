"""The driver that launches nothing, libcuda.c, compiled; and the variables of a process that finds it."""

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

HERE = Path(__file__).parent
COMPILER = shutil.which("gcc") or shutil.which("cc")
PYTHON_H = Path(sysconfig.get_path("include"), "Python.h")


def build(directory: Path) -> None:
    """libcuda.so.1; functions that libcuda.c lacks and Triton links to return an error."""
    triton = pytest.importorskip("triton")
    if COMPILER is None or not PYTHON_H.is_file():
        pytest.skip("Triton compiles its launcher with a C compiler and Python.h; one of them is not here")
    nvidia = Path(triton.__file__).parent / "backends" / "nvidia"
    source = (HERE / "libcuda.c").read_text()
    launcher = "".join((nvidia / name).read_text() for name in ("driver.c", "driver.py"))
    named = set(re.findall(r"\b(cu[A-Z]\w+)\(", launcher)) - set(re.findall(r"\b(cu\w+)\(", source))
    (directory / "others.c").write_text("".join(f"int {name}() {{ return 999; }}\n" for name in sorted(named)))
    command = [COMPILER, "-shared", "-fPIC", "-w", "-I", nvidia / "include", "-Wl,-soname,libcuda.so.1"]
    command += [HERE / "libcuda.c", directory / "others.c", "-o", directory / "libcuda.so.1"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def environment(directory: Path) -> dict[str, str]:
    """Variables for a process that is to find it; what Triton compiles there is kept in the directory as well."""
    found = dict.fromkeys(("LD_LIBRARY_PATH", "TRITON_LIBCUDA_PATH"), str(directory))
    return found | {"TRITON_CACHE_DIR": str(directory / "cache")}
