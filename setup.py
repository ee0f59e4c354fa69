"""Only what pyproject.toml cannot say: where the kernels are, and compiling them into the wheel.

`kernels/`, at the top of the repository, installs as `fastlock.kernels`. (The top-level import name `kernels` belongs
to Hugging Face's package of that name.)

The cubins are compiled if the Python that builds can import Triton: with `pip wheel --no-build-isolation .` in an
environment that has fastlock's dependencies; no GPU is needed. The environment variable FASTLOCK_CUBINS chooses: 0
builds none, 1 builds all, a list of compute capabilities (80,90) builds those; where it is set, the build fails if they
cannot be built. A wheel without cubins works: Triton then compiles the kernels on the user's machine.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

CUBINS = "fastlock/kernels/cubins"


class BuildWithCubins(build_py):
    """Copies the Python files, then compiles the cubins beside them; not for an editable installation."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        built, wanted = Path(self.build_lib).resolve(), os.environ.get("FASTLOCK_CUBINS", "")
        shutil.rmtree(built / CUBINS, ignore_errors=True)  # those of an earlier build
        if wanted != "0":
            compile_cubins(built, wanted)


def compile_cubins(built: Path, wanted: str) -> None:
    """Compile into the built package, by the built package. The build fails only if they were asked for."""
    archs = wanted.split(",") if wanted not in ("", "1") else []
    command = [sys.executable, "-m", "fastlock.kernels.build", "--shipped", "--cubins", CUBINS]
    command += ["--arch", *archs] if archs else []
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # From the folder of the built package, which Python then finds first.
    done = subprocess.run(command, cwd=built, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        print(done.stdout.splitlines()[-1], file=sys.stderr)
        return
    lines = "\n".join((done.stdout + done.stderr).splitlines()[-5:])
    said = f"fastlock: no kernels were compiled ahead of time (exit code {done.returncode}):\n{lines}"
    if wanted:
        raise SystemExit(said)
    frame = "*" * 88
    print(
        f"{frame}\n{said}\n"
        "The wheel works without them: Triton compiles them on the user's machine, on the first relock.\n"
        "To have them: build without isolation, where torch, transformers and triton are installed.\n"
        f"FASTLOCK_CUBINS=0 builds without them, and without this message.\n{frame}",
        file=sys.stderr,
    )


setup(
    packages=[
        *(f"fastlock{below}" for below in ["", *(f".{name}" for name in find_packages("fastlock"))]),
        *(f"fastlock.kernels{below}" for below in ["", *(f".{name}" for name in find_packages("kernels"))]),
    ],
    package_dir={"fastlock": "fastlock", "fastlock.kernels": "kernels"},
    package_data={"fastlock": ["py.typed"], "fastlock.data": ["*.jsonl", "*.json", "*.txt"]},
    cmdclass={"build_py": BuildWithCubins},
)
