"""The carriers of adapters, in the order in which they are tried, and the choice among them."""

from __future__ import annotations

from fastlock.architectures.serving_stacks import STACKS
from fastlock.checkpoints.adapters.carriers.adapter_bias import ADAPTER_BIAS
from fastlock.checkpoints.adapters.carriers.adapter_gate import ADAPTER_GATE
from fastlock.checkpoints.adapters.carriers.base_bias import BASE_BIAS
from fastlock.checkpoints.adapters.carriers.carrier import AdapterCarrier, AdapterJob
from fastlock.checkpoints.adapters.carriers.merge import ADAPTER_MERGE
from fastlock.checkpoints.adapters.carriers.sidecar import ADAPTER_SIDECAR
from fastlock.errors import FastlockError, UnsupportedError

CARRIERS_OF_ADAPTERS = {
    carrier.name: carrier for carrier in (BASE_BIAS, ADAPTER_BIAS, ADAPTER_GATE, ADAPTER_SIDECAR, ADAPTER_MERGE)
}


def checked_carrier(name: str | None) -> str | None:
    """The name of a carrier, None for whatever fits.

    Raises:
        FastlockError: there is no such carrier.
    """
    if name is not None and name not in CARRIERS_OF_ADAPTERS:
        raise FastlockError(f"carrier {name!r}: there is none; choose one of {', '.join(CARRIERS_OF_ADAPTERS)}.")
    return name


def choose_adapter_carrier(job: AdapterJob, stacks: tuple[str, ...], name: str | None = None) -> AdapterCarrier:
    """The first carrier that keeps the lock exactly in every one of these stacks; or the one that is asked for.

    Args:
        job: the adapter.
        stacks: those asked for.
        name: of the carrier, None for whatever fits.

    Raises:
        UnsupportedError: none does, or not the one that is asked for; it says why, and what would work.
        FastlockError: there is no such carrier.
    """
    checked_carrier(name)
    if name == ADAPTER_SIDECAR.name:  # acts in no stack, and is there for servers that no table knows
        if job.base.saved is not None or job.base.part.lock.rank:
            raise _none(job, stacks, (ADAPTER_SIDECAR,))
        return ADAPTER_SIDECAR
    of_kind = tuple(carrier for carrier in CARRIERS_OF_ADAPTERS.values() if carrier.is_of_kind(job.base.part.lock))
    carriers = of_kind if name is None else (CARRIERS_OF_ADAPTERS[name],)
    if job.allowed_gap is not None and name is None:  # asked for the base's own fold, or to be told how far it is off
        carriers = (BASE_BIAS,)
    for carrier in carriers:
        if all(carrier.objection(job, stack) is None for stack in stacks):
            return carrier
    raise _none(job, stacks, carriers)


def fitting_stacks(job: AdapterJob, carrier: AdapterCarrier, stacks: tuple[str, ...]) -> tuple[str, ...]:
    """Those of these stacks in which a carrier keeps the lock exactly."""
    return tuple(stack for stack in stacks if carrier.objection(job, stack) is None)


def _none(job: AdapterJob, stacks: tuple[str, ...], carriers: tuple[AdapterCarrier, ...]) -> UnsupportedError:
    reasons = []
    for carrier in carriers:
        objection = next((found for stack in stacks if (found := carrier.objection(job, stack)) is not None), None)
        reasons.append(f"{carrier.name}: {objection}")
    return UnsupportedError(
        f"{job.adapter.where}: nothing keeps the lock exactly in {' and '.join(stacks)} ({'; '.join(reasons)}). "
        f"{_what_works(job)} Nothing was written."
    )


def _what_works(job: AdapterJob) -> str:
    exact = AdapterJob(job.adapter, job.base)
    works = [
        f"--for {','.join(fitting)} ({carrier.name})"
        for carrier in CARRIERS_OF_ADAPTERS.values()
        if (fitting := fitting_stacks(exact, carrier, STACKS))
    ]
    if works:
        return f"What works: {', or '.join(works)}."
    merged = "What works: merge it into its unquantised base (merge_and_unload, save_pretrained), and relock the result"
    if job.base.part.lock.rank:
        return f"{merged}."
    return f"{merged}; or --carrier {ADAPTER_SIDECAR.name}, for a server with a plugin that adds biases."
