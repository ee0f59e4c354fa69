"""The code of the compiled kernels with a lock per row, for GPUs that this machine need not have."""

import re

import pytest
import torch

pytest.importorskip("triton")

from fastlock.errors import FastlockError
from fastlock.kernels.ahead_of_time.compile import ARCHS
from fastlock.kernels.locked_linear import compile as build_locked_linear
from fastlock.kernels.locked_linear import tiles
from fastlock.kernels.locked_linear import triton_kernels as locked_linear_jit
from fastlock.kernels.locked_linear.compile import (
    BF16,
    FP16,
    FP32,
    SHARED_BYTES,
    Compilation,
    code_problems,
)
from fastlock.kernels.locked_linear.tiles import Tile, Way
from tests.helpers.built import build, reports_in

TILE, MANY = Tile(64, 64, 64, 4, 4), tiles.MANY_ROWS_TILES[0]
# What a sound kernel of TILE in bfloat16 has: 4 + 4 copies of 16 bytes a thread in each of three steps.
COPY = "cp.async.cg.shared.global [ %r33 + 0 ], [ %rd64 + 0 ], 0x10, %r34;\n"
SOUND = COPY * 24 + "wgmma.mma_async.sync\ncvt.rn.bf16x2.f32 %r1, %r2, %r3;\nst.global.v4.b32 [ %rd1 + 0 ], {\n"


def test_the_sample(tmp_path):
    """All in one test, so that one process compiles it: it takes most of a minute."""
    reports = reports_in(build("locked_linear", tmp_path, "--jobs", "1"))
    found = {(report.arch, report.kernel): report for report in reports}
    assert len(found) == len(reports)
    assert {arch for arch, _ in found} == set(ARCHS)
    for report in reports:
        assert (report.spill_bytes, report.local_bytes, report.stack_bytes, report.problems) == (0, 0, 0, []), report
        assert 0 < report.registers <= 255
        assert report.shared_bytes <= SHARED_BYTES[report.arch]
        assert not re.search(r"\bld\.global\.b16\b", report.ptx) or "no_bias" not in report.kernel
    for way in build_locked_linear.likely_on(90, BF16):  # every tile that an H200 is given
        report = found[90, Compilation(way, BF16).name]
        check_room(report, way.tile)
        # Where there are registers for it, nothing is read once all tiles are there: not even the folds and the bias.
        (_, after) = re.split(r"\bcp\.async\.wait_group\s+0;", report.ptx)
        assert ("ld.global" in after) == (not reads_early(way.tile)), way
        kinds = set(re.findall(r"\b(mma\.sync|wgmma\.mma_async)\b", report.ptx))
        assert kinds == {"wgmma.mma_async" if way.tile.rows >= 64 else "mma.sync"}
    for way in build_locked_linear.ways_on(90, FP32, 128):
        assert "fma.rn.f32" in found[90, Compilation(way, FP32).name].ptx
    assert {dtype for dtype in ("bfloat16", "float16", "float32") if any(dtype in job for _, job in found)} == {
        "bfloat16",
        "float16",
        "float32",
    }
    # Where d is added to x, the tensor cores take x from registers, and the sums wait for it.
    of_x = {kind: found[90, Compilation(Way(kind, MANY), BF16).name].ptx for kind in ("gather", "shift")}
    assert re.findall(r"wgmma\.mma_async[^;]*\}, %rd\d+, %rd\d+, %p", of_x["gather"])
    assert not re.findall(r"wgmma\.mma_async[^;]*\}, %rd\d+, %rd\d+, %p", of_x["shift"])
    assert re.findall(r"wgmma\.mma_async[^;]*\}, \{(?:%r\d+,?){4}\}, %rd\d+, %p", of_x["shift"])
    check_shift_kernels([found[90, Compilation(Way("around"), BF16, put_back=there).name] for there in (False, True)])
    largest = found[100, Compilation(Way("gather", Tile(128, 256, 64, 8, 4)), BF16).name]
    assert "tcgen05.mma" in largest.ptx


def reads_early(tile):
    """Whether a thread has 32 sums at most, and so registers for as many numbers of the folds."""
    return tile.rows * tile.hidden <= 32 * 32 * tile.num_warps


def check_room(report, tile):
    """As many programs as the model reckons with have room on a multiprocessor, up to 64 rows."""
    if tile.rows <= 64:
        at_once = tiles.at_once(tile, BF16, SHARED_BYTES[90])
        assert at_once <= at_once_by_registers(report, tile), report
        assert at_once * (report.shared_bytes + 1024) <= 228 * 1024, report


def at_once_by_registers(report, tile):
    """Programs of a multiprocessor with 65536 registers; a warp's are handed out by 8 a thread."""
    return 65536 // (-(-report.registers // 8) * 8 * 32 * tile.num_warps)


def check_shift_kernels(reports):
    """Whole vectors, 9 programs of 128 threads or more on a multiprocessor, no shared memory; no early end.

    Its head is found by one read of the table, of 32 heads: without waiting for other warps, or for another read.
    """
    for report in reports:
        assert at_once_by_registers(report, Tile(16, 16, 16, 4, 1)) >= 9
        assert report.shared_bytes == 0
        assert "bar.sync" not in report.ptx
        assert len(re.findall(r"\bret;", report.ptx)) == 1
    there, back = (report.ptx for report in reports)
    # 32 rows of 128 numbers are four vectors a thread of x, and as many of `held`; d is float32.
    assert len(re.findall(r"\bld\.global\S*\.v4\.b32", there)) == 4 + 8
    assert len(re.findall(r"\bst\.global\S*\.v4\.b32", there)) == 4 + 4
    assert len(re.findall(r"\bld\.global\S*\.v4\.b32", back)) == len(re.findall(r"\bst\.global\S*\.v4\.b32", back)) == 4


def test_what_the_build_fails_by():
    job = Compilation(Way("gather", TILE), BF16)
    assert build_locked_linear.expected_wide_copies(TILE, BF16) == 8
    assert code_problems(job, SOUND) == []
    for change, problem in (
        (("0x10", "0x8"), "0 16-byte copies, 24 expected"),
        (("wgmma", "fma"), "0 instructions for tensor cores"),
        (("cvt.rn", "cvt.rz"), "rounded by ['rz']"),
        (("st.global.v4.b32", "st.global.b16"), "1 stores of one number"),
    ):
        (found,) = code_problems(job, SOUND.replace(*change))
        assert problem in found
    assert code_problems(Compilation(job.way, FP32), SOUND.replace("st.", "mma.sync st.")) != []
    assert code_problems(Compilation(Way("add"), BF16), SOUND) == ["no 16-byte load"]
    assert code_problems(Compilation(Way("add"), FP16), SOUND.replace("bf16", "f16") + "ld.global.v4.b32 {") == []


def test_build_and_launch_share_their_constants():
    """A launch passes what the build compiles for: one definition, in the order of the kernel's arguments."""
    for job in (
        Compilation(Way("gather", TILE), BF16),
        Compilation(Way("add"), BF16),
        Compilation(Way("around"), BF16),
    ):
        kernel, constants = build_locked_linear.kernel_of(job)
        names = [name for name in kernel.arg_names if name not in constants]
        assert kernel.arg_names == [*names, *constants]
        integers = {name for name in names if build_locked_linear.type_of(name, BF16) == "i32"}
        assert integers <= {*locked_linear_jit.CHANGING, *build_locked_linear.MULTIPLES}
        assert all(name.startswith("p_") for name in set(names) - integers)


def test_jobs_have_names_of_their_own():
    for arch in ARCHS:
        for jobs in (set(build_locked_linear.jobs(arch)), set(build_locked_linear.sample(arch))):
            assert len({job.name for job in jobs}) == len(jobs) > 3


@pytest.mark.skipif(not locked_linear_jit.INTERPRETED, reason="needs Triton's interpreter")
def test_refuses_to_compile_under_the_interpreter():
    with pytest.raises(FastlockError, match="TRITON_INTERPRET"):
        build_locked_linear.compile_job(90, Compilation(Way("add"), torch.bfloat16))
