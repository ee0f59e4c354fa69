"""The code of the compiled kernels, for GPUs that this machine need not have."""

import dataclasses
import hashlib
import re

import pytest
import torch

from fastlock.kernels.ahead_of_time import compile
from fastlock.kernels.fold import variants

pytest.importorskip("triton")

import triton

from fastlock.errors import FastlockError
from fastlock.kernels.ahead_of_time import cubins
from fastlock.kernels.ahead_of_time.manifest import MANIFEST, digest_of_sources, read_manifest
from fastlock.kernels.fold import compile as build
from fastlock.kernels.fold import triton_kernel as jit
from tests.helpers.built import build_sample, reports_in

BY_NAME = {variant.name: variant for variant in variants.variants()}
BF16_ROWS = variants.default_variant(torch.bfloat16, torch.bfloat16, 128, transposed=False, aligned=True)


def loop_of(ptx):
    """The loop over the heads: from a label to the branch back to it. There is no other loop."""
    (body,) = re.findall(r"^(\$L__BB\w+):(.*?)\bbra(?:\.uni)?\s+\1;", ptx, re.MULTILINE | re.DOTALL)
    return body[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """CI's sample."""
    return build_sample("fold", tmp_path_factory.mktemp("build"))


@pytest.fixture(scope="module")
def reports(folder):
    return reports_in(folder)


@pytest.fixture(scope="module")
def manifest(folder):
    return read_manifest(folder / "cubins")


def test_sample_covers_every_arch_dtype_layout_and_head_dim(reports):
    sampled = {(report.arch, report.kernel) for report in reports}
    assert len(sampled) == len(reports)
    for arch in compile.ARCHS:
        of_arch = [BY_NAME[name] for a, name in sampled if a == arch]
        for kind in variants.KINDS:
            found = {(v.dtype, v.transposed) for v in of_arch if v.kind == kind}
            unfit = {
                (dtype, columns)
                for (name, dtype, columns), a in variants.SPILLS.items()
                if (name, arch in a) == (kind, True)
            }
            assert found == {(d, t) for d in variants.DTYPES for t in (False, True)} - unfit
    assert {v.head_dim for v in (BY_NAME[name] for a, name in sampled if a == 90)} == set(variants.HEAD_DIMS)


def test_nothing_spills(reports):
    for report in reports:
        assert (report.spill_bytes, report.local_bytes, report.stack_bytes) == (0, 0, 0), report
        assert not report.problems


# Programs of 256 threads on a multiprocessor of sm_90 at once, and the heads of W, 8 KB each, that one has under way:
# what the kinds are for. By the registers that ptxas gave out, and the shared memory.
ROOM = {"serial": (4, 1), "lean": (6, 1), "pairs": (5, 2), "staged": (6, 2)}


@pytest.mark.parametrize("kind", list(variants.KINDS))
def test_programs_at_once_and_what_they_have_under_way(kind, reports):
    found = [report for report in reports if report.arch == 90 and BY_NAME[report.kernel].kind == kind]
    of_llama = [report for report in found if report.kernel == f"bfloat16-rows-128-aligned-{kind}"]
    (counts,) = [report.counts for report in of_llama]
    programs, heads = ROOM[kind]
    assert counts["CTAs/SM"] == 65536 // (-(-of_llama[0].registers // 8) * 8 * 256) == programs
    assert counts["KB/SM"] == programs * heads * 8


def test_no_kernel_has_more_registers_than_its_kind_may(reports):
    for report in reports:
        variant = BY_NAME[report.kernel]
        assert 16 <= report.registers <= variant.most_registers, report
        if variant.aligned:
            assert report.counts["KB/SM"] >= 32, report


def test_aligned_kernels_read_weights_16_bytes_at_a_time(reports):
    """Not only are there enough wide loads: the loop over the heads has no narrow load of weights, and no barrier.

    What is staged comes by copies of 16 bytes alone, but for the values, and waits for other threads.
    """
    for report in reports:
        variant = BY_NAME[report.kernel]
        loop = loop_of(report.ptx)
        loads = re.findall(r"\bld\.global\.(\S+)", loop)
        narrow = [load for load in loads if load == f"b{8 * variant.dtype.itemsize}"]
        if variant.kind == "staged":
            copies = re.findall(r"cp\.async\.(\S+) \[[^]]*\], \[[^]]*\], 0x(\w+)", loop)
            of_weight = [size for kind, size in copies if kind.startswith("cg")]
            tile = variant.block_rows * variant.block_columns * variant.dtype.itemsize
            needed = tile // (32 * variant.num_warps) // 16
            assert set(of_weight) == {"10"}, report
            values = variant.vector * 4 // 16  # float32 beside one vector of W: Triton 3.6 copies them likewise
            assert len(of_weight) in (needed, needed + values), report
            assert narrow == [], report
            assert "cp.async.wait_group" in loop
            assert report.counts["async"] == 3 * len(of_weight)
        elif variant.aligned:
            # By columns, a thread reads one fp32 value with each vector of W.
            values = loads.count("v4.b32") if variant.transposed and variant.dtype == torch.float32 else 0
            assert len(narrow) == values, report
            assert "bar.sync" not in loop
            assert report.counts["async"] == 0
        else:
            assert len(narrow) >= 8, report


def loads_before_weights(ptx):
    """How many loads, each of which needs the one before, come before the first read of W.

    By the registers that each line reads and writes, in the order of the text, which is that of the first step of the
    loop. There, loads from the table under a predicate of their own do not take place.
    """
    depth: dict[str, int] = {}
    for line in ptx.splitlines():
        registers = re.findall(r"%\w+", line)
        load = re.search(r"\bld\.global\.(\S+)", line)
        if "cp.async.cg" in line or (load and load[1].startswith("v4")):
            return max(depth.get(register, 0) for register in registers)
        if not registers or re.match(r"\s*(st|bra|@%p\d+ (bra|st|ld\.global\.b64))\b", line):
            continue
        target, *sources = [
            register for register in registers if not (line.lstrip().startswith("@") and register == registers[0])
        ]
        depth[target] = max((depth.get(source, 0) for source in sources), default=0) + bool(load)
    raise AssertionError("nothing reads W")


def test_the_first_read_of_weights_waits_for_one_row_of_the_table_alone(reports):
    """Its fields do not wait for each other, nor for a table of addresses."""
    aligned = [report for report in reports if BY_NAME[report.kernel].aligned]
    assert {loads_before_weights(report.ptx) for report in aligned} == {1}
    for report in aligned:
        before = report.ptx[: re.search(r"cp\.async\.cg|ld\.global\.v4", report.ptx).start()]
        assert not re.search(r"\b(ret|exit);", before), "an early return is waited for"


def test_16_bit_results_are_rounded_once_and_to_the_nearest(reports):
    for report in reports:
        dtype = BY_NAME[report.kernel].dtype
        converts = re.findall(r"\bcvt\.\S+\.f32\b", report.ptx)
        assert all(re.fullmatch(r"cvt\.rn\.b?f16(x2)?\.f32", convert) for convert in converts)
        assert bool(converts) == (dtype.itemsize == 2)


def test_build_sees_plain_loads_and_wrong_rounding(reports):
    """The checks that the command fails by can fail."""
    plain = next(report for report in reports if report.kernel == "bfloat16-rows-128-plain-serial")
    promised = dataclasses.replace(BY_NAME[plain.kernel], aligned=True)
    assert build.code_problems(promised, plain.ptx) == ["0 vector loads, 4 expected"]
    aligned = next(report for report in reports if report.kernel == promised.name)
    assert build.code_problems(promised, aligned.ptx) == []
    staged, pairs = (dataclasses.replace(promised, kind=kind) for kind in ("staged", "pairs"))
    assert build.code_problems(staged, aligned.ptx) == ["0 copies of 16 bytes, 6 expected"]
    assert build.code_problems(pairs, aligned.ptx) == ["4 vector loads, 8 expected"]
    (problem,) = build.code_problems(promised, aligned.ptx.replace("cvt.rn.", "cvt.rz."))
    assert "rounded by ['rz']" in problem


def test_build_and_launch_share_their_constants():
    """A launch passes the constants and options of its variant, and the build compiles them: one definition."""
    variant = BF16_ROWS
    names = [*jit.SIGNATURE, *jit.constants(variant)]
    assert names == list(jit.fold_kernel.arg_names)
    assert set(variant.options()) == {"num_warps", "maxnreg", "enable_fp_fusion"}


@pytest.mark.skipif(not jit.INTERPRETED, reason="needs Triton's interpreter")
def test_refuses_to_compile_under_the_interpreter():
    with pytest.raises(FastlockError, match="TRITON_INTERPRET"):
        build.compile_variant(90, BF16_ROWS)


def test_the_manifest_describes_every_file(folder, manifest, reports):
    """Of the sample, every kernel that wheels have is there; each file is the one described; there is no other."""
    files = {path.name: path for path in (folder / "cubins").iterdir()}
    assert set(files) == {MANIFEST} | {cubin.file for cubin in manifest.cubins}
    assert manifest.triton == triton.__version__
    assert manifest.sources == digest_of_sources()
    shipped = {(report.arch, report.kernel) for report in reports if variants.shipped(BY_NAME[report.kernel])}
    assert {(int(re.sub(r"\D", "", cubin.target)), cubin.variant) for cubin in manifest.cubins} == shipped
    for cubin in manifest.cubins:
        assert hashlib.sha256(files[cubin.file].read_bytes()).hexdigest() == cubin.sha256
        assert cubin.num_warps == BY_NAME[cubin.variant].num_warps


def test_each_arch_has_the_target_that_it_can_run(manifest):
    targets = {cubin.target for cubin in manifest.cubins}
    assert targets == {"sm_80", "sm_90a", "sm_100a", "sm_120a"}
    for arch in compile.ARCHS:
        assert sum(cubins.runs_on(target, divmod(arch, 10)) for target in targets) == 1


def test_the_manifest_agrees_with_the_ptx(manifest, reports):
    """cuobjdump read the numbers in the binary; the PTX, from which ptxas made it, says the same."""
    code = {report.cubin.file: report.ptx for report in reports if report.cubin}
    for cubin in manifest.cubins:
        ptx = code[cubin.file]
        assert f".target {cubin.target}\n" in ptx
        (head,) = re.findall(rf"\.visible \.entry {cubin.kernel}\((.*?)\)", ptx, re.DOTALL)
        parameters = re.findall(r"\.param \.(\w+)", head)
        assert parameters == ["u64"] * 6 == ["u64"] * len(cubin.parameters)
        assert cubin.parameters == tuple((8 * i, 8) for i in range(6))
        assert f".reqntid {32 * cubin.num_warps}" in ptx
        assert 0 < cubin.shared <= cubins.FREE_SHARED


def test_cubins_come_from_the_older_ptxas(manifest):
    """A newer toolkit's cubins would need a newer driver."""
    assert {cubin.ptxas for cubin in manifest.cubins} == {triton.knobs.nvidia.ptxas.version}


def test_cubins_hold_no_path_of_the_machine(folder, manifest):
    for cubin in manifest.cubins:
        binary = (folder / "cubins" / cubin.file).read_bytes()
        assert b"jit.py" not in binary
        assert b".debug_line" not in binary


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"global_scratch_size": 128}, "global_scratch_size is 128"),
        ({"profile_scratch_size": 1}, "profile_scratch_size is 1"),
        ({"num_ctas": 2}, "num_ctas is 2"),
        ({"launch_pdl": True}, "launch_pdl is True"),
        ({"launch_cooperative_grid": True}, "launch_cooperative_grid is True"),
        ({"num_warps": 16}, "num_warps is 16"),
        ({"parameters": ((0, 8), (8, 8), (16, 8), (24, 8))}, "its parameters are"),
    ],
)
def test_what_a_plain_launch_cannot_do_is_not_shipped(change, problem, reports, tmp_path):
    report = next(report for report in reports if report.kernel == BF16_ROWS.name)
    variant = BY_NAME[report.kernel]
    plain = {"global_scratch_size": 0, "profile_scratch_size": 0, "launch_cooperative_grid": False}
    plain |= {"launch_pdl": False, "num_ctas": 1, "num_warps": variant.num_warps}
    asked = len(jit.SIGNATURE), variant.num_warps
    assert compile.launch_problems(report.cubin, plain, *asked) == []
    parameters = change.pop("parameters", report.cubin.parameters)
    cubin = dataclasses.replace(report.cubin, parameters=parameters)
    (found,) = compile.launch_problems(cubin, plain | change, *asked)
    assert problem in found
    bad = dataclasses.replace(report, problems=[found])
    assert compile.write_cubins([bad], tmp_path / "cubins").cubins == ()


def test_cubins_go_to_a_directory_of_their_own(tmp_path):
    (tmp_path / "precious.txt").write_text("")
    with pytest.raises(FastlockError, match="other files"):
        compile.write_cubins([], tmp_path)
    assert (tmp_path / "precious.txt").exists()
