"""Compile every kernel ahead of time, without a GPU, and check the code: `python -m fastlock.kernels.build`.

With `--cubins DIRECTORY` it writes the fold's cubins and their manifest, which `setup.py` puts into the wheel. Unless
only kernels that are shipped are asked for, it goes on with those of `locked_linear`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import triton

from fastlock.kernels.ahead_of_time.compile import ARCHS, in_processes, processors
from fastlock.kernels.fold.compile import compile_variant, in_sample, write_cubins
from fastlock.kernels.fold.variants import shipped, variants
from fastlock.kernels.locked_linear import compile as locked_linear


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print a table, and return 1 if any kernel has a problem."""
    parser = argparse.ArgumentParser(prog="python -m fastlock.kernels.build", description=__doc__)
    parser.add_argument(
        "--arch", type=int, nargs="+", default=ARCHS, help="compute capabilities (default: %(default)s)"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--all", action="store_true", help="every variant, not only CI's sample")
    what.add_argument("--shipped", action="store_true", help="every variant that the wheel has")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the reports, PTX included, to this file")
    parser.add_argument("--cubins", type=Path, metavar="DIRECTORY", help="write the cubins and their manifest here")
    parser.add_argument("--jobs", type=int, default=processors(), help="processes (default: %(default)s)")
    options = parser.parse_args(arguments)
    wanted = [
        (arch, variant)
        for arch, variant in itertools.product(options.arch, variants())
        if options.all or (shipped(variant) if options.shipped else in_sample(arch, variant))
    ]
    reports = []
    print(f"{'arch':<7}{'variant':<32}{'regs':>5}{'spills':>8}{'local':>7}{'shared':>8}{'v4':>4}")
    for report in in_processes(compile_variant, wanted, options.jobs):
        reports.append(report)
        print(
            f"sm_{report.arch:<4}{report.variant:<32}{report.registers:>5}{report.spill_bytes:>8}"
            f"{report.local_bytes:>7}{report.shared_bytes:>8}{report.vector_loads:>4}  {'; '.join(report.problems)}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps([report.to_json() for report in reports], indent=1))
    bad = sum(bool(report.problems) for report in reports)
    print(f"Triton {triton.__version__}: {len(reports)} kernels, {bad} with problems")
    if options.cubins:
        manifest = write_cubins(reports, options.cubins)
        size = sum(path.stat().st_size for path in options.cubins.iterdir())
        print(f"{options.cubins}: {len(manifest.cubins)} cubins, {size / 1e6:.1f} MB")
    if not options.cubins and not options.shipped:
        others = list(locked_linear.compile_all(options.arch, options.all, options.jobs))
        bad += locked_linear.conclude(others)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
