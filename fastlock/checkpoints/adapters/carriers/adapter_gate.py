"""Adapter gate: the gate is in the LoRA itself, as further rows of A and columns of B; no bias is needed anywhere.

An adapter that is served with it over its base is what the lock makes of the adapted model. A LoRA of rank r becomes
one of rank r + rank(lock) at the locked projections, or, for stacks that know one rank alone, everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator

from fastlock.architectures.adapter_stacks import PLAIN_STARTS, why_refused
from fastlock.checkpoints.adapters.carriers.carrier import (
    AdapterCarrier,
    AdapterJob,
    Carried,
    objections_to_relocked,
)
from fastlock.checkpoints.adapters.gate_lora import A, B, gate_lora, is_uniform, scale_of
from fastlock.checkpoints.adapters.methods.lora_kinds import NOT_PLAIN
from fastlock.errors import shown
from fastlock.locks.adapter_receipt import GATE_CARRIER

# The keys of a config with which PEFT computes something else than W x + s B A x.
_OTHERWISE = (*NOT_PLAIN, "kasa_config")
_PATTERNS = ("rank_pattern", "alpha_pattern")


def _objections(job: AdapterJob, stack: str) -> Iterator[str]:
    adapter = job.adapter
    yield from objections_to_relocked(job)
    if job.base.part.lock.has_constant:
        yield "the lock has a constant part, too, which takes a bias"
    if adapter.method != "LORA":
        yield f"a gate is a LoRA, and this is of the method {shown(adapter.method)[:40]}"
    if (key := next((key for key in _OTHERWISE if adapter.config.get(key)), None)) is not None:
        yield f"a gate is a plain LoRA, and this is one with {key}"
    start = adapter.config.get("init_lora_weights", True)
    if not isinstance(start, bool) and (not isinstance(start, str) or start.lower() not in PLAIN_STARTS):
        yield f"a gate is a plain LoRA, and this is one with init_lora_weights = {str(start)[:40]!a}"
    if (refused := why_refused(stack, adapter.method, adapter.config)) is not None:
        yield refused
    if any(adapter.config.get(key) and not isinstance(adapter.config[key], dict) for key in _PATTERNS):
        yield f"its {' or '.join(_PATTERNS)} is not an object"
    if any(fold.touched and not {A, B} <= fold.parameters.keys() for fold in job.folds()):
        yield "the adapter has output projections of its own in place of the base's"
    if (zero := next((fold.layer for fold in job.folds() if fold.scale == 0), None)) is not None:
        yield f"it scales layer {zero} by 0"
    if is_uniform((stack,)):
        yield from _objections_to_one_rank(job, stack)


def _objections_to_one_rank(job: AdapterJob, stack: str) -> Iterator[str]:
    """Why an adapter cannot have one rank and one α for all of its modules."""
    modules = job.adapter.modules
    if any(name.startswith("lora_embedding_") for parameters in modules.values() for name in parameters):
        yield f"{stack} has one rank for all modules, and the adapter touches embeddings"
    if len({scale_of(job.adapter, path) for path, parameters in modules.items() if A in parameters}) > 1:
        yield f"{stack} has one s for all modules, and this adapter has several (rank_pattern, alpha_pattern)"


def _carry(job: AdapterJob, stacks: tuple[str, ...]) -> Carried:
    part, adapter = job.base.part, job.adapter
    made = gate_lora(job.folds(), part.lock.gates(part.strength), stacks)
    return Carried(
        [module.written for module in made.modules],
        [module.path for module in made.modules],
        job.base.place,
        config=made.config,
        weights=made.weights(),
        kept_whole=bool(adapter.files),
    )


ADAPTER_GATE = AdapterCarrier(
    GATE_CARRIER,
    _objections,
    _carry,
    "Serve it over {base} as it is, as any LoRA: it brings its lock. A request without it gets the base's answer.",
    gates="only",
)
