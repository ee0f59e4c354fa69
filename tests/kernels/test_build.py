"""The build over all ops: what is compiled, written and refused. The code itself is tested in each op's folder."""

import json
from dataclasses import replace

import pytest
import torch

from fastlock.kernels.fold import variants

pytest.importorskip("triton")

from fastlock.kernels import build
from fastlock.kernels.adapter_fold.variants import adapter_variants, is_shipped
from fastlock.kernels.ahead_of_time.compile import Op, Report
from fastlock.kernels.ahead_of_time.manifest import read_manifest
from fastlock.kernels.gate_fold.variants import gate_variants
from fastlock.kernels.gate_fold.variants import is_shipped as is_gate_shipped
from fastlock.kernels.proximal_step.variants import norm_variants, step_variants
from tests.helpers.fake_driver import BY_NAME, describe

SOUND = Report(
    arch=90,
    kernel="",
    registers=64,
    spill_bytes=0,
    local_bytes=0,
    stack_bytes=0,
    shared_bytes=1024,
    counts={"v4": 4},
    problems=[],
    ptx="",
)
SHIPPED, PLAIN = (
    variants.default_variant(torch.bfloat16, torch.bfloat16, 64, transposed=False, aligned=aligned).name
    for aligned in (True, False)
)


@pytest.fixture
def compiled(monkeypatch) -> list[tuple[str, int, str]]:
    """Two ops that compile at once, one of them with kernels that wheels have: what each was asked for."""
    asked = []

    def op(name: str, every: list[str], shipped: list[str], problems: list[str]) -> Op:
        def compile(arch: int, job: str) -> Report:
            asked.append((name, arch, job))
            cubin = describe(BY_NAME[job], f"sm_{arch}") if job in shipped else None
            return replace(SOUND, arch=arch, kernel=job, cubin=cubin, binary=b"code", problems=problems)

        return Op(name, lambda arch: every[:1], lambda arch: every, lambda arch: shipped, compile, ("v4",))

    ops = (op("one", [PLAIN, SHIPPED, SHIPPED], [SHIPPED], []), op("two", ["other"], [], ["it spills"]))
    monkeypatch.setattr(build, "OPS", ops)
    return asked


def test_the_sample_of_every_op_and_a_problem_is_the_exit_code(compiled, capsys) -> None:
    assert build.main(["--arch", "80", "90", "--jobs", "1"]) == 1
    assert compiled == [("one", 80, PLAIN), ("one", 90, PLAIN), ("two", 80, "other"), ("two", 90, "other")]
    assert "it spills" in capsys.readouterr().out


def test_what_wheels_have_and_nothing_else_is_written(compiled, tmp_path, capsys) -> None:
    where = ["--json", str(tmp_path / "reports.json"), "--cubins", str(tmp_path / "cubins")]
    assert build.main(["--shipped", "--arch", "90", "--jobs", "1", *where]) == 0
    assert compiled == [("one", 90, SHIPPED)]
    (cubin,) = read_manifest(tmp_path / "cubins").cubins
    assert (tmp_path / "cubins" / cubin.file).read_bytes() == b"code"
    (report,) = json.loads((tmp_path / "reports.json").read_text())
    assert (report["kernel"], report["cubin"]["file"]) == (SHIPPED, cubin.file)
    assert "1 cubins" in capsys.readouterr().out.splitlines()[-1], "setup.py shows the last line"


def test_one_op_and_all_of_it(compiled) -> None:
    """Each kernel once, however often an op names it."""
    assert build.main(["--only", "one", "--all", "--arch", "90", "--jobs", "1"]) == 0
    assert compiled == [("one", 90, PLAIN), ("one", 90, SHIPPED)]


def test_wheels_have_the_aligned_folds_the_optimizers_step_and_no_other_kernel() -> None:
    shipped = [job.name for op in build.OPS for job in op.shipped(90) if op.name != "proximal_step"]
    folds = [variant.name for variant in variants.variants() if variants.shipped(variant)]
    folds += [variant.name for variant in adapter_variants() if is_shipped(variant)]
    assert sorted(shipped) == sorted(folds + [variant.name for variant in gate_variants() if is_gate_shipped(variant)])
    (step,) = (op for op in build.OPS if op.name == "proximal_step")
    assert list(step.shipped(90)) == [*step_variants(), *norm_variants()]
