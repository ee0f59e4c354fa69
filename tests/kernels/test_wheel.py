"""What setup.py builds: cubins where Triton is, a wheel that works without where it is not."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fastlock.kernels.fold import variants

pytest.importorskip("triton")

from fastlock.kernels.adapter_fold.variants import adapter_variants, is_shipped
from fastlock.kernels.ahead_of_time import cubins, manifest
from fastlock.kernels.gate_fold.variants import gate_variants
from fastlock.kernels.gate_fold.variants import is_shipped as is_gate_shipped
from fastlock.kernels.proximal_step.variants import norm_variants, step_variants

REPOSITORY = Path(__file__).resolve().parents[2]
CUBINS = Path("fastlock", "kernels", "cubins")
BROKEN_TRITON = 'raise ImportError("this Triton can\'t be imported")'


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The repository's own files, without anything that was built."""
    source = tmp_path / "source"
    for name in ("fastlock", "kernels"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "cubins"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    return source


def setup(source: Path, *arguments: object, wanted: str | None, path: Path | None = None, code: int = 0) -> str:
    """Run setup.py; what it printed to standard error."""
    environment = {name: value for name, value in os.environ.items() if name != cubins.SWITCH}
    environment |= {} if wanted is None else {cubins.SWITCH: wanted}
    environment |= {} if path is None else {"PYTHONPATH": str(path)}
    command = [sys.executable, "setup.py", "--quiet", *map(str, arguments)]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr


# What a wheel's user does, on a fake device: every shipped kernel is found, held against its digest and loaded.
USE = """
import json, sys
import pytest
from tests.helpers import fake_driver
from fastlock.kernels.ahead_of_time import cubins
with pytest.MonkeyPatch.context() as patch:
    fake_driver.install(patch, cubins.LOADER.folder, fake_driver.FakeDriver())
    names = json.loads(sys.argv[1])
    print(json.dumps([cubins.__file__, {name: cubins.LOADER.choose(name, 0).reason for name in names}]))
"""


@pytest.mark.slow
def test_a_wheel_has_the_cubins(source: Path, tmp_path: Path) -> None:
    said = setup(source, "bdist_wheel", "--dist-dir", tmp_path, wanted="90")
    names = [variant.name for variant in variants.variants() if variants.shipped(variant)]
    names += [variant.name for variant in gate_variants() if is_gate_shipped(variant)]
    names += [variant.name for variant in adapter_variants() if is_shipped(variant)]
    names += [variant.name for variant in (*step_variants(), *norm_variants())]
    assert f"{len(names)} cubins" in said
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "installed")
    described = manifest.read_manifest(tmp_path / "installed" / CUBINS)
    assert [cubin.variant for cubin in described.cubins] == names
    assert {cubin.target for cubin in described.cubins} == {"sm_90a"}
    path = os.pathsep.join(map(str, (tmp_path / "installed", REPOSITORY)))
    command = [sys.executable, "-c", USE, json.dumps(names)]
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    where, reasons = json.loads(done.stdout or done.stderr)
    assert Path(where).is_relative_to(tmp_path / "installed")
    assert reasons == dict.fromkeys(names, "a cubin for sm_90a fits it")


def test_a_source_build_without_triton_works_and_says_so(source: Path, tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(BROKEN_TRITON)
    said = setup(source, "build_py", "--build-lib", tmp_path / "built", wanted=None, path=tmp_path)
    assert "no kernels were compiled ahead of time" in said
    assert "this Triton can't be imported" in said
    assert (tmp_path / "built" / CUBINS.parent / "fold" / "launch.py").is_file()
    assert not (tmp_path / "built" / CUBINS).exists()
    for wanted in ("1", "90"):
        said = setup(source, "build_py", "--build-lib", tmp_path / "built", wanted=wanted, path=tmp_path, code=1)
        assert "this Triton can't be imported" in said


def test_cubins_can_be_left_out(source: Path, tmp_path: Path) -> None:
    """Those of an earlier build as well."""
    (tmp_path / "built" / CUBINS).mkdir(parents=True)
    (tmp_path / "built" / CUBINS / manifest.MANIFEST).write_text("{}")
    said = setup(source, "build_py", "--build-lib", tmp_path / "built", wanted="0")
    assert "kernels" not in said
    assert (tmp_path / "built" / CUBINS.parent / "fold" / "launch.py").is_file()
    assert not (tmp_path / "built" / CUBINS).exists()


def test_an_editable_installation_compiles_nothing(source: Path, tmp_path: Path) -> None:
    setup(source, "editable_wheel", "--dist-dir", tmp_path, wanted="1")
    assert list(tmp_path.glob("*.whl"))
    assert not list(source.rglob("*.cubin"))
    assert not list(source.rglob(manifest.MANIFEST))
