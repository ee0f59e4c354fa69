"""The code of the compiled kernels for adapters, for GPUs that this machine need not have."""

import dataclasses
import re

import pytest
import torch

pytest.importorskip("triton")

from fastlock.kernels.adapter_fold import compile as build
from fastlock.kernels.adapter_fold import triton_kernel as jit
from fastlock.kernels.adapter_fold.variants import MOST_REGISTERS, adapter_variants, is_shipped
from fastlock.kernels.ahead_of_time import compile
from fastlock.kernels.ahead_of_time.manifest import ARGUMENTS, SOURCES, read_manifest
from tests.helpers.built import build_sample, reports_in

BY_NAME = {variant.name: variant for variant in adapter_variants()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """CI's sample."""
    return build_sample("adapter_fold", tmp_path_factory.mktemp("build"))


@pytest.fixture(scope="module")
def reports(folder):
    return reports_in(folder)


def test_every_arch_has_a_kernel_and_nothing_spills(reports) -> None:
    assert {report.arch for report in reports} == set(compile.ARCHS)
    for report in reports:
        assert (report.spill_bytes, report.local_bytes, report.stack_bytes) == (0, 0, 0), report
        assert not report.problems
        assert 16 <= report.registers <= MOST_REGISTERS
        assert report.counts["CTAs/SM"] >= 2
        assert report.shared_bytes <= 4096


def test_adapters_are_read_16_bytes_at_a_time(reports) -> None:
    """A and B by wide loads alone, and as many as their bytes take; β, a number a row, is read 2 bytes at a time."""
    for report in reports:
        variant = BY_NAME[report.kernel]
        wide = len(re.findall(r"\bld\.global\.v4\.b32", report.ptx))
        narrow = len(re.findall(r"\bld\.global\.b16", report.ptx))
        if not variant.aligned:
            assert (wide, narrow >= 16) == (0, True)
            continue
        tiles = (512 * 16 + 16 * 128) * variant.dtype.itemsize
        of_values = 2 if variant.dtype.itemsize == 2 else 1
        assert wide == tiles // 256 // 16 + of_values, report
        assert narrow <= 4, "β: 512 numbers over 256 threads, two of which may hold a row"


def test_b_is_asked_for_before_a_is_waited_for(reports) -> None:
    """All loads of B stand before that of a head's first column, which those of A need; nothing uses them there."""
    for report in reports:
        if BY_NAME[report.kernel].aligned:
            loads = re.findall(r"\bld\.global\.(v4\.b32|b64|b32|b16)", report.ptx)
            after = loads[loads.index("v4.b32") :]
            of_b = 512 * 16 * BY_NAME[report.kernel].dtype.itemsize // 256 // 16
            assert after.index("b64") == of_b
            between = report.ptx[report.ptx.index("ld.global.v4.b32") :].partition("ld.global.b64")[0]
            assert not re.search(r"bar\.sync|shfl\.sync|\bcvt\.", between)


def test_16_bit_results_are_rounded_once_and_to_the_nearest(reports) -> None:
    for report in reports:
        converts = re.findall(r"\bcvt\.\S+\.f32\b", report.ptx)
        assert converts
        assert all(re.fullmatch(r"cvt\.rn\.b?f16(x2)?\.f32", convert) for convert in converts)


def test_the_build_sees_what_is_wrong(reports) -> None:
    report = next(report for report in reports if report.kernel == "adapters-bfloat16-bfloat16-aligned")
    variant = BY_NAME[report.kernel]
    assert build.code_problems(variant, report.ptx) == []
    narrow = report.ptx.replace("ld.global.v4.b32", "ld.global.v2.b32")
    assert build.code_problems(variant, narrow) == ["0 vector loads, 5 expected"]
    (problem,) = build.code_problems(variant, report.ptx.replace("cvt.rn.", "cvt.rz."))
    assert "rounded by ['rz']" in problem


def test_the_kernel_takes_addresses_alone() -> None:
    """A number among the arguments would be compiled in, or would make a new kernel for every rank."""
    for variant in BY_NAME.values():
        assert [*jit.SIGNATURE, *jit.constants(variant)] == list(jit.adapter_fold_kernel.arg_names)
    assert len(jit.SIGNATURE) == ARGUMENTS
    assert all(kind.startswith("*") for kind in jit.SIGNATURE.values())


def test_the_manifest_has_what_wheels_have(folder, reports) -> None:
    manifest = read_manifest(folder / "cubins")
    sampled = {(report.arch, report.kernel) for report in reports if is_shipped(BY_NAME[report.kernel])}
    found = {(int(re.sub(r"\D", "", cubin.target)), cubin.variant) for cubin in manifest.cubins}
    assert found == sampled
    assert {f"adapter_fold/{name}.py" for name in ("variants", "launch", "triton_kernel")} <= set(SOURCES)


def test_wheels_have_adapters_in_the_bases_dtype_and_in_float32() -> None:
    shipped = [variant for variant in adapter_variants() if is_shipped(variant)]
    assert all(variant.aligned for variant in shipped)
    dtypes = {(variant.dtype, variant.out_dtype) for variant in shipped}
    f32, f16, b16 = torch.float32, torch.float16, torch.bfloat16
    assert dtypes == {(f32, f32), (f16, f16), (b16, b16), (f32, f16), (f32, b16)}
    assert len({dataclasses.astuple(variant) for variant in adapter_variants()}) == len(BY_NAME) == 18
