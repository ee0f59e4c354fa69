"""Every benchmark, a line each: what it measures, from which files, and how many seconds it may take, at most."""

from __future__ import annotations

from dataclasses import dataclass

from bench.disk import checkpoints_report
from bench.lib.report import Report, printed_section
from bench.ops import (
    adapter_fold_report,
    first_relock_report,
    fold_counters_report,
    fold_report,
    gate_fold_report,
    host_report,
    parity_report,
    proximal_step_report,
    rows_report,
    warm_up_report,
)

BENCH, GPU = "make bench", "make gpu"
# All that `run.py --gpu` runs, one after the other, the warm-up too: 8 minutes, but for the build before it.
GPU_SECONDS = 455
# Of these, for what run.py itself does between the steps.
SPARE_SECONDS = 5
# The limit of the warm-up. On a machine whose disk is slow it takes what it takes, and the steps share the rest.
WARM_UP_SECONDS = 150


@dataclass(frozen=True)
class Benchmark:
    """One line of the registry.

    Attributes:
        name: for `run.py --only`.
        measures: what, in a line.
        files: from the repository on: those that pytest collects, or one script.
        cpu, cuda: the seconds it may take there; None: it does not run there. With --gpu the steps share the time in
            this proportion, and get more where earlier ones were quick.
        part_of: which of BENCH and GPU run it.
        arguments: for pytest, or for the script.
        script: whether the file is run as it is, without pytest.
        spread: over several processes: nothing of it is timed.
        report: how its rows are told; None: by which tests passed.
    """

    name: str
    measures: str
    files: tuple[str, ...]
    cpu: int | None
    cuda: int | None
    part_of: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    script: bool = False
    spread: bool = False
    report: Report | None = None

    def limit(self, device: str) -> int | None:
        """The seconds it may take on a kind of device."""
        return self.cuda if device == "cuda" else self.cpu


KERNEL_TESTS = (
    "tests/kernels/fold/test_launch.py",
    "tests/kernels/fold/test_dispatch.py",
    "tests/kernels/fold/test_kinds.py",
    "tests/kernels/locked_linear/test_launch.py",
    "tests/kernels/locked_linear/test_choices.py",
    "tests/kernels/proximal_step/test_launch.py",
    "tests/kernels/adapter_fold/test_launch.py",
    "tests/kernels/gate_fold/test_launch.py",
    "tests/kernels/gate_fold/test_dispatch.py",
)
MODEL_TESTS = (
    "tests/models/test_request_locks.py",
    "tests/models/test_relocking.py",
    "tests/checkpoints/test_diagnosis.py",
)
# Of the models' tests those that a CPU skips or tells less of: graphs, compiled modules, autocast, every dtype.
DEVICE_TESTS = (
    "gpu or cuda_graph or reduce_overhead or compiled_module or autocast or unfolded_forward or kernels "
    "or memory_stays or devices"
)
HOUR = 3600

# Before all others on a GPU. As a rule it takes this long.
WARM_UP = Benchmark(
    "warm-up",
    "what the first process on a machine pays for, and what it finds there",
    ("bench/ops/warm_up.py",),
    cpu=None,
    cuda=40,
    script=True,
    report=warm_up_report.REPORT,
)

# In the order in which they run: what a GPU run must not lose comes first, and what may hang last.
BENCHMARKS = (
    Benchmark(
        "parity",
        "every kernel variant, by cubin and by JIT, and relocking in every family, against float64",
        ("bench/ops/parity.py",),
        cpu=None,
        cuda=35,
        part_of=(GPU,),
        spread=True,
        report=parity_report.REPORT,
    ),
    Benchmark(
        "host",
        "what a planned relock costs the host, without the driver's own work",
        ("bench/ops/host.py",),
        cpu=60,
        cuda=60,
        part_of=(BENCH,),
        report=host_report.REPORT,
    ),
    Benchmark(
        "fold",
        "the fold by every path, ours and others', on the shapes of Llama-3 8B and 70B",
        ("bench/ops/fold.py",),
        cpu=600,
        cuda=75,
        part_of=(BENCH, GPU),
        report=fold_report.REPORT,
    ),
    Benchmark(
        "first-relock",
        "the first relock of a process, by cubin and by JIT",
        ("bench/ops/first_relock.py",),
        cpu=None,
        cuda=45,
        part_of=(GPU,),
        report=first_relock_report.REPORT,
    ),
    Benchmark(
        "rows",
        "a projection with a lock per row, by every way, over the plain projection",
        ("bench/ops/rows.py",),
        cpu=200,
        cuda=35,
        part_of=(BENCH, GPU),
        report=rows_report.REPORT,
    ),
    Benchmark(
        "optimizer",
        "the optimizer's step with a pull, against torch's fused AdamW without one and with it by foreach",
        ("bench/ops/proximal_step.py",),
        cpu=300,
        cuda=20,
        part_of=(GPU,),
        report=proximal_step_report.REPORT,
    ),
    Benchmark(
        "adapters",
        "resident adapters over one base, folded in one launch, against torch's batched products",
        ("bench/ops/adapter_fold.py",),
        cpu=120,
        cuda=10,
        part_of=(GPU,),
        report=adapter_fold_report.REPORT,
    ),
    Benchmark(
        "gates",
        "gates written into resident models in one launch each, against a plain torch script",
        ("bench/ops/gate_fold.py",),
        cpu=120,
        cuda=10,
        part_of=(GPU,),
        report=gate_fold_report.REPORT,
    ),
    Benchmark(
        "kernel-tests",
        "the kernels' own tests, on the device",
        KERNEL_TESTS,
        cpu=None,
        cuda=25,
        part_of=(GPU,),
        spread=True,
    ),
    Benchmark(
        "model-tests",
        "tests of request locks and of models on several devices that a CPU skips or tells less of",
        MODEL_TESTS,
        cpu=None,
        cuda=45,
        part_of=(GPU,),
        arguments=("-k", DEVICE_TESTS),
        spread=True,
    ),
    Benchmark(
        "fold-counters",
        "what the GPU's own counters say of each kind of the fold kernel, by ncu where it may read them",
        ("bench/ops/fold_counters.py",),
        cpu=None,
        cuda=20,
        part_of=(GPU,),
        report=fold_counters_report.REPORT,
    ),
    Benchmark(
        "sanitizer",
        "no kernel reads or writes out of bounds: compute-sanitizer's memcheck",
        ("bench/ops/sanitizer.py",),
        cpu=None,
        cuda=90,
        part_of=(GPU,),
    ),
    Benchmark(
        "fold-on-cpu",
        "the fold on a CPU against whole-matrix F.linear, in every dtype, with as many threads",
        ("bench/ops/fold_on_cpu.py",),
        cpu=900,
        cuda=None,
        script=True,
        report=Report(printed_section("The fold on a CPU")),
    ),
    Benchmark(
        "against-plain",
        "relock_checkpoint against a plain script that maps, folds in float32, writes and syncs",
        ("bench/disk/against_plain.py",),
        cpu=600,
        cuda=600,
        script=True,
        report=Report(printed_section("Relocking on disk against a plain script")),
    ),
    Benchmark(
        "checkpoints",
        "relock_checkpoint on real shapes: time, what it reads and writes, memory",
        ("bench/disk/checkpoints.py",),
        cpu=600,
        cuda=600,
        part_of=(BENCH,),
        arguments=("-k", "not 123b"),
        report=checkpoints_report.REPORT,
    ),
    Benchmark(
        "checkpoints-123b",
        "the same on the shape of Mistral-Large-2; takes 10 GB of disk",
        ("bench/disk/checkpoints.py",),
        cpu=600,
        cuda=600,
        arguments=("-k", "123b"),
        report=checkpoints_report.REPORT,
    ),
    Benchmark(
        "quantised",
        "relock_checkpoint on quantised checkpoints against the same in bfloat16: time, and what it reads",
        ("bench/disk/quantised.py",),
        cpu=600,
        cuda=600,
        script=True,
        report=Report(printed_section("Quantised checkpoints on disk")),
    ),
    Benchmark(
        "quantised-after",
        "how far a lock is off that was folded before the weights were quantised; needs what `make demo` sets up",
        ("bench/efficacy/quantised_after.py",),
        cpu=300,
        cuda=300,
        script=True,
        report=Report(printed_section("Relocked, then quantised")),
    ),
    Benchmark(
        "zoo",
        "checkpoints a second of relock_zoo, over as many lone processes, and its memory",
        ("bench/disk/zoo.py",),
        cpu=HOUR,
        cuda=HOUR,
        script=True,
        report=Report(printed_section("Zoos on disk")),
    ),
    Benchmark(
        "adapters-on-disk",
        "relock_adapter over a base that is open, and adapters a second of relock_zoo, and its memory",
        ("bench/disk/adapters.py",),
        cpu=HOUR,
        cuda=HOUR,
        script=True,
        report=Report(printed_section("Adapters on disk")),
    ),
    Benchmark(
        "extract",
        "what extraction takes, and how much of it the probes; needs what `make demo` sets up",
        ("bench/efficacy/extract.py",),
        cpu=HOUR,
        cuda=HOUR,
        script=True,
        report=Report(printed_section("Extraction")),
    ),
    Benchmark(
        "recipes",
        "which lock brings refusals back, and what else would; an hour; needs what `make demo` sets up",
        ("bench/efficacy/recipes.py",),
        cpu=4 * HOUR,
        cuda=4 * HOUR,
        script=True,
        report=Report(printed_section("Recipes")),
    ),
    Benchmark(
        "bands",
        "which layers tell malicious from normal, and whether they stand out; needs what `make demo` sets up",
        ("bench/efficacy/bands.py",),
        cpu=2 * HOUR,
        cuda=HOUR,
        script=True,
        report=Report(printed_section("Bands")),
    ),
    Benchmark(
        "finetuning",
        "which fine-tuning keeps refusals: plain, SPPFT, Lisa, both; hours; needs what `make demo` sets up",
        ("bench/efficacy/finetuning.py",),
        cpu=8 * HOUR,
        cuda=8 * HOUR,
        script=True,
        report=Report(printed_section("Keeping refusals")),
    ),
    Benchmark(
        "one-lock",
        "one lock with a gate, at strength 1, for every fine-tune; hours; needs what `make demo` sets up",
        ("bench/efficacy/gated.py",),
        cpu=8 * HOUR,
        cuda=8 * HOUR,
        script=True,
        report=Report(printed_section("One lock for every fine-tune")),
    ),
    Benchmark(
        "one-lock-further",
        "the same in further use: jailbreaks, several turns, languages and more; needs what one-lock made",
        ("bench/efficacy/gated_further.py",),
        cpu=2 * HOUR,
        cuda=2 * HOUR,
        script=True,
        report=Report(printed_section("One lock in further use")),
    ),
    Benchmark(
        "one-lock-peers",
        "what a user would pick instead of that lock, on the same fine-tunes; an hour; needs what one-lock made",
        ("bench/efficacy/gated_peers.py",),
        cpu=2 * HOUR,
        cuda=2 * HOUR,
        script=True,
        report=Report(printed_section("Instead of one lock")),
    ),
    Benchmark(
        "frontier",
        "how far one constant bias goes, over five seeds; two hours; needs what `make demo` sets up",
        ("bench/efficacy/frontier.py",),
        cpu=8 * HOUR,
        cuda=8 * HOUR,
        script=True,
        report=Report(printed_section("The frontier")),
    ),
)
