"""Every way to fold a lock through the output projections of some models: ours, plain PyTorch, the authors'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.nn import functional

import fastlock
from bench.lib.workloads import STRENGTH, Zoo
from fastlock.fold import Fold, fold
from fastlock.kernels.fold import reference
from fastlock.kernels.fold.reference import HeadColumns
from fastlock.locks.lock import Displacement


class Batch:
    """The models of one call, flat: one entry a site, model by model and layer by layer."""

    def __init__(self, zoo: Zoo, members: list[int], shells: list[Any]) -> None:
        self.zoo = zoo
        self.shells = shells
        self.weights = [weight for i in members for weight in zoo.models[i]]
        self.layers = list(zoo.displacements) * len(members)
        self.displacements = [zoo.displacements[layer] for layer in self.layers]
        self.heads = [displacement.heads for displacement in self.displacements]
        self.values = [displacement.values for displacement in self.displacements]
        self.columns = _columns_of(self.weights, self.displacements)
        self.biases: list[torch.Tensor | None] = [None] * len(self.weights)
        self.names = [f"layer {layer}" for layer in self.layers]
        self.outs = [weight.new_empty(weight.shape[0]) for weight in self.weights]
        self.projections = [dict(zip(zoo.displacements, zoo.models[i], strict=True)) for i in members]
        self.plans: list[fastlock.Plan] = []

    def reset(self) -> None:
        """Before each call, untimed: NaN where results go, and no lock in the models that have no plan."""
        for out in self.outs:
            out.fill_(torch.nan)
        for plan in self.plans:
            for bias in results_of(plan):
                bias.data.fill_(torch.nan)  # which torch does not count as a change of the bias
        for shell in [] if self.plans else self.shells:
            if shell.model.layers[self.layers[0]].self_attn.o_proj.bias is not None:
                fastlock.unlock(shell)

    @cached_property
    def plan(self) -> fastlock.Plan:
        """Of the bare projections."""
        return self._planned(self.projections)

    @cached_property
    def plan_of_models(self) -> fastlock.Plan:
        return self._planned(self.shells)

    def _planned(self, models: Any) -> fastlock.Plan:
        plan = fastlock.Plan(models, self.zoo.lock, STRENGTH)
        plan.relock()
        self.plans.append(plan)
        return plan

    @cached_property
    def table(self) -> Any:
        from fastlock.kernels.fold.launch import build_table

        return build_table(self.columns, self.values, self.biases, self.outs)

    @cached_property
    def dense(self) -> list[torch.Tensor]:
        """d of each site as a whole vector, in the weights' dtype, on their device."""
        return [d.dense(w.shape[1]).to(w) for w, d in zip(self.weights, self.displacements, strict=True)]

    @cached_property
    def values_there(self) -> list[torch.Tensor]:
        """The values of each site's locked heads, in the weights' dtype, on their device."""
        return [value.to(w) for w, value in zip(self.weights, self.values, strict=True)]

    @cached_property
    def rows(self) -> dict[int, list[tuple[int, torch.Tensor, torch.Tensor]]]:
        """The lock as its authors keep it: layer -> (head, direction, scale), float16."""
        lock, rows = self.zoo.lock, dict[int, list[tuple[int, torch.Tensor, torch.Tensor]]]()
        for layer, head, u, scale in zip(
            lock.layers, lock.heads, lock.directions.half(), lock.scales.half(), strict=True
        ):
            rows.setdefault(int(layer), []).append((int(head), u, scale))
        return rows


def by_reference(batch: Batch) -> list[torch.Tensor]:
    return [reference.fold(*site) for site in zip(*_from_lock(batch), batch.biases, strict=True)]


def by_fold(batch: Batch) -> list[torch.Tensor]:
    return fold([Fold(*site) for site in zip(*_from_lock(batch), batch.biases, batch.names, strict=True)])


def by_kernel(batch: Batch) -> list[torch.Tensor]:
    from fastlock.kernels.fold.launch import fold_sites

    fold_sites(batch.columns, batch.values, batch.biases, batch.outs)
    return batch.outs


def by_launch(batch: Batch) -> list[torch.Tensor]:
    from fastlock.kernels.fold.launch import launch

    launch(batch.table)
    return batch.outs


def by_relock(batch: Batch) -> list[torch.Tensor]:
    fastlock.relock_many(batch.shells, batch.zoo.lock, STRENGTH)
    layers = list(batch.zoo.displacements)
    return [shell.model.layers[layer].self_attn.o_proj.bias for shell in batch.shells for layer in layers]


def by_plan(batch: Batch) -> list[torch.Tensor]:
    batch.plan.relock()
    return results_of(batch.plan)


def by_plan_of_models(batch: Batch) -> list[torch.Tensor]:
    batch.plan_of_models.relock()
    return results_of(batch.plan_of_models)


def results_of(plan: fastlock.Plan) -> list[torch.Tensor]:
    return [bias for of_model in plan.biases for bias in of_model.values()]


def by_linear(batch: Batch) -> list[torch.Tensor]:
    return [functional.linear(d, weight) for d, weight in zip(batch.dense, batch.weights, strict=True)]


def by_columns(batch: Batch) -> list[torch.Tensor]:
    return [_columns(*site) for site in zip(batch.weights, batch.heads, batch.values_there, strict=True)]


def by_authors(batch: Batch) -> list[torch.Tensor]:
    """Written by us from the description: float16 throughout, a dense displacement, whole matrices."""
    shape, biases = batch.zoo.shape, []
    for layer, weight in zip(batch.layers, batch.weights, strict=True):
        d = torch.zeros(shape.num_heads, shape.head_dim, dtype=torch.float16)
        for head, direction, scale in batch.rows[layer]:
            d[head] = STRENGTH * scale * direction
        biases.append(functional.linear(d.flatten().to(weight.device), weight))
    return biases


def _from_lock(batch: Batch) -> tuple[list[HeadColumns], list[torch.Tensor]]:
    """Columns and values of each site, the displacement made anew, as relocking does."""
    displacements = batch.zoo.lock.displacement(STRENGTH)
    of_sites = [displacements[layer] for layer in batch.layers]
    return _columns_of(batch.weights, of_sites), [displacement.values for displacement in of_sites]


def _columns_of(weights: Sequence[torch.Tensor], displacements: Sequence[Displacement]) -> list[HeadColumns]:
    return [
        HeadColumns.in_projection(weight, d.heads, d.head_dim) for weight, d in zip(weights, displacements, strict=True)
    ]


def _columns(weight: torch.Tensor, heads: tuple[int, ...], values: torch.Tensor) -> torch.Tensor:
    head_dim = values.shape[1]
    parts = [
        functional.linear(d, weight[:, h * head_dim : (h + 1) * head_dim]) for h, d in zip(heads, values, strict=True)
    ]
    return sum(parts[1:], parts[0])


@dataclass(frozen=True)
class Path:
    """One way to fold.

    Attributes:
        starts_from: what is ready before the clock starts; what "plan" and "table" hold was checked and sent before.
        exact: held to `reference.error_bound`; the others only to be about right.
        whole: reads whole matrices, not only the locked columns.
        queued: the host never waits for the device inside, so that its device time can be measured.
        cuda: needs a GPU.
        dtypes: what it takes.
    """

    name: str
    run: Callable[[Batch], list[torch.Tensor]]
    starts_from: str
    what: str
    exact: bool = True
    whole: bool = False
    queued: bool = False
    cuda: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)


PATHS = [
    Path("reference", by_reference, "lock", "`fastlock.kernels.fold.reference.fold`, site by site, in float64"),
    Path(
        "fold",
        by_fold,
        "lock",
        "`fastlock.fold.fold`, which `relock` uses: on CUDA one kernel launch and a check that all is finite; on a CPU "
        "the reference, in float64, and that check",
    ),
    Path(
        "kernel",
        by_kernel,
        "d",
        "`fastlock.kernels.fold.launch.fold_sites`: the table made and sent, and one launch",
        queued=True,
        cuda=True,
    ),
    Path(
        "launch",
        by_launch,
        "table",
        "`fastlock.kernels.fold.launch`: the launch alone",
        queued=True,
        cuda=True,
    ),
    Path(
        "plan",
        by_plan,
        "plan",
        "`fastlock.Plan.relock` on bare output projections: they are looked up again, folded (on CUDA: one launch), "
        "waited for and checked to be finite, into the same biases as before",
    ),
    Path(
        "plan of models",
        by_plan_of_models,
        "plan",
        "`fastlock.Plan.relock` on LlamaForCausalLM models, into the biases that act in them",
        dtypes=(torch.bfloat16,),
    ),
    Path(
        "relock",
        by_relock,
        "lock",
        "`fastlock.relock_many` on LlamaForCausalLM models: every check, the fold, the biases put in place, the "
        "receipts (without digests, which are computed when asked for)",
        dtypes=(torch.bfloat16,),
    ),
    Path(
        "columns",
        by_columns,
        "d",
        "plain PyTorch in the weights' dtype: `F.linear` per locked head, on its columns, and their sum",
        exact=False,
        queued=True,
    ),
    Path(
        "linear",
        by_linear,
        "d",
        "plain PyTorch in the weights' dtype: `F.linear` per layer, on the whole matrix",
        exact=False,
        whole=True,
        queued=True,
    ),
    Path(
        "authors",
        by_authors,
        "lock",
        "the authors' way, written by us from its description: float16 throughout, the displacement product included, "
        "made dense on the CPU, then `F.linear` per layer, on the whole matrix",
        exact=False,
        whole=True,
        dtypes=(torch.float16,),
    ),
]
