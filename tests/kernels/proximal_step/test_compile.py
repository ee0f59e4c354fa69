"""The code of the compiled kernels, for GPUs that this machine need not have."""

import dataclasses
import re

import pytest

pytest.importorskip("triton")

from fastlock.errors import FastlockError
from fastlock.kernels.ahead_of_time import compile, cubins
from fastlock.kernels.ahead_of_time.manifest import ARGUMENTS, SOURCES, digest_of_sources, read_manifest
from fastlock.kernels.proximal_step import compile as build
from fastlock.kernels.proximal_step import triton_kernel as jit
from fastlock.kernels.proximal_step import variants
from tests.helpers.built import build_sample, reports_in

BY_NAME = {variant.name: variant for variant in build.every(90)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """CI's sample."""
    return build_sample("proximal_step", tmp_path_factory.mktemp("build"))


@pytest.fixture(scope="module")
def reports(folder):
    return reports_in(folder)


def accesses(ptx):
    """Bits of each load from and each store to global memory, those of vectors together; how often each."""
    found = {}
    for what, vector, bits in re.findall(r"\b(ld|st)\.global(?:\.v(\d))?\.b(\d+)\b", ptx):
        key = what, int(vector or 1) * int(bits)
        found[key] = found.get(key, 0) + 1
    return found


def test_the_sample_has_every_dtype_on_every_architecture(reports):
    sampled = {(report.arch, report.kernel) for report in reports}
    assert len(sampled) == len(reports)
    for arch in compile.ARCHS:
        of_arch = [BY_NAME[name] for a, name in sampled if a == arch]
        assert {variant.weight for variant in of_arch} == set(variants.WEIGHT_DTYPES)
        assert {type(variant) for variant in of_arch} == {variants.StepVariant, variants.NormVariant}
    on_90 = {name for arch, name in sampled if arch == 90}
    assert on_90 >= {variant.name for variant in variants.step_variants() if variant.anchor}


def test_nothing_spills(reports):
    for report in reports:
        assert (report.spill_bytes, report.local_bytes, report.stack_bytes) == (0, 0, 0), report
        assert not report.problems
        assert 16 <= report.registers <= variants.MOST_REGISTERS
        assert report.shared_bytes <= 8192


@pytest.mark.parametrize(("dtypes", "read", "written"), [("float32-float32-float32", 20, 12)])
def test_a_parameter_in_float32_costs_32_bytes(reports, dtypes, read, written):
    """16-byte accesses alone, and as many as those bytes take: each is read once and written once."""
    seen = 0
    for report in reports:
        if report.kernel == f"step-{dtypes}":
            seen += 1
            found = accesses(report.ptx)
            of_a_thread = BY_NAME[report.kernel].block // 256
            assert found["ld", 128] * 16 == read * of_a_thread
            assert found["st", 128] * 16 == written * of_a_thread
    assert seen == len(compile.ARCHS)


def test_full_blocks_are_moved_16_bytes_at_a_time(reports):
    """And narrow accesses are in the loop over the rest alone, as many as two elements a thread ask for."""
    sizes = {"float32": 4, "bfloat16": 2, "no_anchor": 0}
    for report in reports:
        kind, *names = report.kernel.removesuffix("-stochastic").split("-")
        found = accesses(report.ptx)
        if kind == "norm":
            weight, anchor = (sizes[name] for name in names[:2])
            read, written = [weight, *((weight, anchor) if anchor else ())], []
            elements = int(names[2]) // 256
        else:
            weight, state, anchor = (sizes[name] for name in names)
            read = [weight, weight, state, state, *((anchor,) if anchor else ())]
            written = [weight, state, state]
            elements = 4 if (weight, state) == (4, 4) else 8
        assert found["ld", 128] == sum(read) * elements / 16
        assert found.get(("st", 128), 0) == sum(written) * elements / 16
        assert found.get(("ld", 16), 0) == 2 * read.count(2)
        assert found.get(("st", 16), 0) == 2 * written.count(2)
        if kind == "norm":  # its one sum; Triton 3.9 writes it at the end of either branch
            assert found["st", 32] in (1, 2)
        else:
            assert found.get(("st", 32), 0) == 2 * written.count(4)
        assert ("ld", 8) not in found
        assert "ld.local" not in report.ptx


def test_nothing_is_waited_for_where_all_has_one_dtype(reports):
    """A mixture goes through shared memory, so that both of its dtypes are stored 16 bytes at a time."""
    for report in reports:
        variant = BY_NAME[report.kernel]
        if isinstance(variant, variants.StepVariant) and variant.weight == variant.state:
            assert "bar.sync" not in report.ptx


def test_numbers_are_rounded_to_the_nearest(reports):
    for report in reports:
        converts = re.findall(r"\bcvt\.\S+\.f32\b", report.ptx)
        narrow = [convert for convert in converts if "bf16" in convert]
        assert all(re.fullmatch(r"cvt\.rn\.bf16(x2)?\.f32", convert) for convert in narrow)
        assert bool(narrow) == (report.kernel.startswith("step") and "bfloat16" in report.kernel.split("-anchor")[0])


def test_quotients_and_roots_are_exact_where_weights_are_float32(reports):
    for report in reports:
        if report.kernel.startswith("step"):
            precise = report.kernel.startswith("step-float32")
            assert ("div.rn.f32" in report.ptx) == precise
            assert ("sqrt.rn.f32" in report.ptx) == precise


def test_the_build_sees_what_is_wrong(reports):
    """The checks that the command fails by can fail."""
    report = next(report for report in reports if report.kernel == "step-bfloat16-bfloat16-bfloat16")
    variant = BY_NAME[report.kernel]
    assert build.code_problems(variant, report.ptx) == []
    changed = report.ptx.replace("ld.global.v4.b32", "ld.global.b32", 1)
    assert build.code_problems(variant, changed) == ["4 loads of 16 bytes, 5 expected"]
    changed = re.sub(r"st\.global\.v4\.b32", "st.global.v2.b32", report.ptx)
    assert build.code_problems(variant, changed) == ["0 stores of 16 bytes, 3 expected"]
    (problem,) = build.code_problems(variant, report.ptx.replace("cvt.rn.bf16", "cvt.rz.bf16"))
    assert "rounded by ['rz']" in problem
    (problem,) = build.code_problems(variant, report.ptx.replace(".maxnreg 96", ""))
    assert "limit of registers" in problem


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"global_scratch_size": 128}, "global_scratch_size is 128"),
        ({"num_ctas": 2}, "num_ctas is 2"),
        ({"num_warps": 4}, "num_warps is 4"),
        ({"parameters": ((0, 8), (8, 8), (16, 8), (24, 4), (28, 8), (36, 8))}, "its parameters are"),
    ],
)
def test_what_a_plain_launch_cannot_do_is_seen(change, problem, reports):
    cubin = reports[0].cubin
    plain = {"global_scratch_size": 0, "profile_scratch_size": 0, "launch_cooperative_grid": False}
    plain |= {"launch_pdl": False, "num_ctas": 1, "num_warps": variants.NUM_WARPS}
    asked = len(jit.SIGNATURE), variants.NUM_WARPS
    assert compile.launch_problems(cubin, plain, *asked) == []
    cubin = dataclasses.replace(cubin, parameters=change.pop("parameters", cubin.parameters))
    (found,) = compile.launch_problems(cubin, plain | change, *asked)
    assert problem in found


def test_the_kernels_take_addresses_alone():
    """A number among the arguments would be compiled in, or would make a new kernel for every value."""
    for variant in BY_NAME.values():
        names = [*jit.SIGNATURE, *jit.constants(variant)]
        assert names == list(jit.kernel_of(variant).arg_names)
    assert len(jit.SIGNATURE) == ARGUMENTS
    assert all(kind.startswith("*") for kind in jit.SIGNATURE.values())


def test_the_manifest_has_every_kernel_and_knows_its_sources(folder, reports):
    manifest = read_manifest(folder / "cubins")
    assert {cubin.variant for cubin in manifest.cubins} == {report.kernel for report in reports}
    assert {cubin.target for cubin in manifest.cubins} == {"sm_80", "sm_90a", "sm_100a", "sm_120a"}
    assert all(len(cubin.parameters) == ARGUMENTS + 2 for cubin in manifest.cubins)
    assert all(cubin.shared <= cubins.FREE_SHARED for cubin in manifest.cubins)
    assert manifest.sources == digest_of_sources()
    assert {"proximal_step/variants.py", "proximal_step/launch.py", "proximal_step/triton_kernel.py"} <= set(SOURCES)


@pytest.mark.skipif(not jit.INTERPRETED, reason="needs Triton's interpreter")
def test_refuses_to_compile_under_the_interpreter():
    with pytest.raises(FastlockError, match="TRITON_INTERPRET"):
        build.compile_variant(90, BY_NAME["step-float32-float32-float32"])
