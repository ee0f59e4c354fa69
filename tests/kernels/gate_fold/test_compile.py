"""The code of the compiled kernels for gates, for GPUs that this machine need not have."""

import re

import pytest

pytest.importorskip("triton")

from fastlock.kernels.ahead_of_time import compile
from fastlock.kernels.ahead_of_time.manifest import ARGUMENTS, SOURCES, read_manifest
from fastlock.kernels.gate_fold import compile as build
from fastlock.kernels.gate_fold import triton_kernel as jit
from fastlock.kernels.gate_fold.variants import gate_variants, is_shipped
from tests.helpers.built import build_sample, reports_in

BY_NAME = {variant.name: variant for variant in gate_variants()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """CI's sample."""
    return build_sample("gate_fold", tmp_path_factory.mktemp("build"))


@pytest.fixture(scope="module")
def reports(folder):
    return reports_in(folder)


def test_every_arch_has_a_kernel_and_nothing_spills(reports) -> None:
    assert {report.arch for report in reports} == set(compile.ARCHS)
    for report in reports:
        assert (report.spill_bytes, report.local_bytes, report.stack_bytes) == (0, 0, 0), report
        assert not report.problems
        assert report.registers <= BY_NAME[report.kernel].most_registers
        assert report.counts["CTAs/SM"] >= 2


def test_weights_are_read_and_written_16_bytes_at_a_time(reports) -> None:
    """Each chunk is copied twice into shared memory and stored twice, once as it is kept; a bias is 2 bytes a row."""
    for report in reports:
        variant = BY_NAME[report.kernel]
        chunk = variant.block_rows * variant.block_columns * variant.dtype.itemsize // 256 // 16
        copies = len(re.findall(r"\bcp\.async\.\S+ \[[^]]*\], \[[^]]*\], 0x10\b", report.ptx))
        stores = len(re.findall(r"\bst\.global\S*\.v4\.b32", report.ptx))
        assert copies >= 2 * 3 * chunk, report
        assert stores == 2 * chunk, report
        assert len(re.findall(r"\bst\.global\S*\.b16", report.ptx)) == 1, "the new bias"


def test_nothing_is_written_before_all_that_is_read_first(reports) -> None:
    """W may be rewritten where it is: the stores stand after the second wait for copies, behind C U of all chunks."""
    for report in reports:
        first_store = report.ptx.index("st.global")
        assert report.ptx.index("shfl.sync.bfly") < first_store
        assert report.ptx[:first_store].count("cp.async.wait_group") >= 2


def test_what_is_not_finite_shows_in_products_with_zero(reports) -> None:
    """Which the compiler must not leave out: one for each number that a thread writes, or for every two of them."""
    for report in reports:
        elements = BY_NAME[report.kernel].elements
        pairs = re.findall(r"\b(?:mul|fma\.rn)\.f32x2\b", report.ptx)  # from sm_100 on; half of them are (C U) V
        with_zero = re.findall(r"(?:mul|fma\.rn)\.f32 .*0f00000000", report.ptx)
        assert len(pairs or with_zero) >= elements
        assert "bar.sync" in report.ptx


def test_16_bit_results_are_rounded_once_and_to_the_nearest(reports) -> None:
    for report in reports:
        converts = re.findall(r"\bcvt\.\S+\.f32\b", report.ptx)
        assert converts
        assert all(re.fullmatch(r"cvt\.rn\.b?f16(x2)?\.f32", convert) for convert in converts)


def test_the_build_sees_what_is_wrong(reports) -> None:
    report = next(report for report in reports if report.kernel == "gates-bfloat16-rows-1-aligned-narrow")
    variant = BY_NAME[report.kernel]
    assert build.code_problems(variant, report.ptx) == []
    narrow = report.ptx.replace("st.global.v4.b32", "st.global.v2.b32")
    assert build.code_problems(variant, narrow) == ["0 stores of 16 bytes, 4 expected"]
    narrow = re.sub(r"(cp\.async\.\S+ .*), 0x10\b", r"\1, 0x8", report.ptx)
    assert build.code_problems(variant, narrow) == ["0 copies of 16 bytes, 12 expected"]
    (problem,) = build.code_problems(variant, report.ptx.replace("cvt.rn.", "cvt.rz."))
    assert "rounded by ['rz']" in problem


def test_the_kernel_takes_addresses_alone() -> None:
    """A number among the arguments would be compiled in, or would make a new kernel for every rank."""
    for variant in BY_NAME.values():
        assert [*jit.SIGNATURE, *jit.constants(variant)] == list(jit.gate_fold_kernel.arg_names)
    assert len(jit.SIGNATURE) == ARGUMENTS
    assert all(kind.startswith("*") for kind in jit.SIGNATURE.values())


def test_the_manifest_has_what_wheels_have(folder, reports) -> None:
    manifest = read_manifest(folder / "cubins")
    sampled = {(report.arch, report.kernel) for report in reports if is_shipped(BY_NAME[report.kernel])}
    found = {(int(re.sub(r"\D", "", cubin.target)), cubin.variant) for cubin in manifest.cubins}
    assert found == sampled
    assert {f"gate_fold/{name}.py" for name in ("variants", "launch", "triton_kernel")} <= set(SOURCES)
    assert len(BY_NAME) == len(list(gate_variants())) == 60
