"""The code of the compiled kernels, for GPUs that this machine need not have."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from fastlock.errors import FastlockError
from fastlock.kernels import build, fold

BY_NAME = {build.name_of(variant): variant for variant in build.variants()}


def loop_of(ptx):
    """The loop over the heads: from a label to the branch back to it. There is no other loop."""
    (body,) = re.findall(r"^(\$L__BB\w+):(.*?)\bbra(?:\.uni)?\s+\1;", ptx, re.MULTILINE | re.DOTALL)
    return body[1]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """CI's sample, compiled by another process: this one may have Triton's interpreter, which can't compile."""
    file = tmp_path_factory.mktemp("build") / "reports.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastlock.kernels.build", "--json", str(file)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return [build.Report(**report) for report in json.loads(file.read_text())]


def test_sample_covers_every_arch_dtype_layout_and_head_dim(reports):
    sampled = {(report.arch, report.variant) for report in reports}
    assert len(sampled) == len(reports)
    for arch in build.ARCHS:
        of_arch = [BY_NAME[name] for a, name in sampled if a == arch]
        assert {(v.dtype, v.transposed) for v in of_arch} == {(d, t) for d in fold.DTYPES for t in (False, True)}
    assert {v.head_dim for v in (BY_NAME[name] for a, name in sampled if a == 90)} == set(build.HEAD_DIMS)


def test_nothing_spills(reports):
    for report in reports:
        assert (report.spill_bytes, report.local_bytes, report.stack_bytes) == (0, 0, 0), report
        assert not report.problems


def test_aligned_kernels_leave_room_for_four_programs_of_256_threads(reports):
    for report in reports:
        if BY_NAME[report.variant].aligned:
            assert 16 <= report.registers <= 64, report


def test_aligned_kernels_read_weights_16_bytes_at_a_time(reports):
    """Not only are there enough wide loads: the loop over the heads has no narrow load of weights, and no barrier."""
    for report in reports:
        variant = BY_NAME[report.variant]
        loop = loop_of(report.ptx)
        loads = re.findall(r"\bld\.global\.(\S+)", loop)
        narrow = [load for load in loads if load == f"b{8 * variant.dtype.itemsize}"]
        if variant.aligned:
            # By columns, a thread reads one fp32 value with each vector of W.
            values = loads.count("v4.b32") if variant.transposed and variant.dtype == torch.float32 else 0
            assert len(narrow) == values, report
            assert "bar.sync" not in loop
        else:
            assert len(narrow) >= 8, report


def test_16_bit_results_are_rounded_once_and_to_the_nearest(reports):
    for report in reports:
        dtype = BY_NAME[report.variant].dtype
        converts = re.findall(r"\bcvt\.\S+\.f32\b", report.ptx)
        assert all(re.fullmatch(r"cvt\.rn\.b?f16(x2)?\.f32", convert) for convert in converts)
        assert bool(converts) == (dtype.itemsize == 2)


def test_build_sees_plain_loads_and_wrong_rounding(reports):
    """The checks that the command fails by can fail."""
    plain = next(report for report in reports if report.variant == "bfloat16-rows-128-plain")
    promised = dataclasses.replace(BY_NAME[plain.variant], aligned=True)
    assert build.code_problems(promised, plain.ptx) == ["0 vector loads, 4 expected"]
    aligned = next(report for report in reports if report.variant == "bfloat16-rows-128-aligned")
    assert build.code_problems(promised, aligned.ptx) == []
    (problem,) = build.code_problems(promised, aligned.ptx.replace("cvt.rn.", "cvt.rz."))
    assert "rounded by ['rz']" in problem


def test_build_and_launch_share_their_constants():
    """A launch passes the constants and options of its variant, and the build compiles them: one definition."""
    variant = BY_NAME["bfloat16-rows-128-aligned"]
    names = [*fold.SIGNATURE, *variant.constants()]
    assert names == list(fold.fold_kernel.arg_names)
    assert set(variant.options()) == {"num_warps", "enable_fp_fusion"}


@pytest.mark.skipif(not fold.INTERPRETED, reason="needs Triton's interpreter")
def test_refuses_to_compile_under_the_interpreter():
    with pytest.raises(FastlockError, match="TRITON_INTERPRET"):
        build.compile_variant(90, BY_NAME["bfloat16-rows-128-aligned"])
