"""Compile every kernel ahead of time, without a GPU, and check the code: `python -m fastlock.kernels.build`.

With `--cubins DIRECTORY` it also writes the cubins of those that wheels have, and their manifest.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton

from fastlock.kernels.adapter_fold import compile as adapter_fold
from fastlock.kernels.ahead_of_time.compile import ARCHS, Op, Report, compile_all, processors, write_cubins
from fastlock.kernels.fold import compile as fold
from fastlock.kernels.gate_fold import compile as gate_fold
from fastlock.kernels.locked_linear import compile as locked_linear
from fastlock.kernels.proximal_step import compile as proximal_step

# Every op; a new one is a line here.
OPS: tuple[Op[Any], ...] = (fold.OP, gate_fold.OP, adapter_fold.OP, locked_linear.OP, proximal_step.OP)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print a table for each op, and return 1 if any kernel has a problem."""
    options = _parser().parse_args(arguments)
    reports: list[Report] = []
    for op in OPS:
        if options.only in (None, op.name):
            reports += compile_op(op, options)
    if options.json:
        options.json.write_text(json.dumps([report.to_json() for report in reports], indent=1))
    bad = sum(bool(report.problems) for report in reports)
    print(f"Triton {triton.__version__}: {len(reports)} kernels, {bad} with problems")
    if options.cubins:
        manifest = write_cubins(reports, options.cubins)
        size = sum(path.stat().st_size for path in options.cubins.iterdir())
        print(f"{options.cubins}: {len(manifest.cubins)} cubins, {size / 1e6:.1f} MB")
    return 1 if bad else 0


def compile_op(op: Op[Any], options: argparse.Namespace) -> list[Report]:
    """Compile what is asked for of one op, and print a line for each."""
    choose = op.every if options.all else op.shipped if options.shipped else op.sample
    jobs = [(arch, job) for arch in options.arch for job in dict.fromkeys(choose(arch))]
    if not jobs:
        return []
    print(f"{'arch':<7}{op.name:<46}{'regs':>5}{'spills':>8}{'local':>7}{'shared':>8}", end="")
    print("".join(f"{name:>8}" for name in op.counted))
    reports = []
    for report in compile_all(op, jobs, options.jobs):
        reports.append(report)
        counts = "".join(f"{report.counts[name]:>8}" for name in op.counted)
        print(
            f"sm_{report.arch:<4}{report.kernel:<46}{report.registers:>5}{report.spill_bytes:>8}{report.local_bytes:>7}"
            f"{report.shared_bytes:>8}{counts}  {'; '.join(report.problems)}",
            flush=True,
        )
    return reports


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastlock.kernels.build", description=__doc__)
    parser.add_argument("--only", choices=[op.name for op in OPS], help="one op's kernels (default: every op's)")
    parser.add_argument(
        "--arch", type=int, nargs="+", default=ARCHS, help="compute capabilities (default: %(default)s)"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--all", action="store_true", help="every kernel, not only CI's sample")
    what.add_argument("--shipped", action="store_true", help="every kernel that wheels have as a cubin")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the reports, PTX included, to this file")
    parser.add_argument("--cubins", type=Path, metavar="DIRECTORY", help="write the cubins and their manifest here")
    parser.add_argument("--jobs", type=int, default=processors(), help="processes (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
