"""Locks per request: y = (x + s d[lock of the row]) Wᵀ + c, for servers whose tenants share one model's weights.

Nothing is put into the weights or biases: each request of a batch has the lock that it was assigned, or none.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn

from fastlock.errors import FastlockError
from fastlock.kernels.fold.reference import HeadColumns, exact_fold
from fastlock.locks.lock import Displacement, Lock, check_lock, check_strength, strength_for
from fastlock.models.locked_linear_op import (
    FEWEST_HELD,
    check_lock_id,
    locked_linear,
)
from fastlock.models.reloaded import check_unlocked
from fastlock.models.sites import REPLACED, Site, sites_for, unwrapped
from fastlock.models.state import PLACED_BIAS, version_of


class LockedLinear(nn.Module):
    """One attention output projection with a lock per request, in the place of the plain one.

    It has the parameters of the plain one, under their names, and its hooks, so that a state_dict is the same and what
    happens to them here happens there. Its tables are in no state_dict. `RequestLocks` makes and assigns it.

    Attributes:
        weight, bias: those of the plain projection.
        transposed: whether it keeps W as [num_heads * head_dim, hidden] (GPT-2's Conv1D).
        heads, slots, values, folds: as in `locked_linear`; buffers, at the same address until the device changes.
        lock_of_row, strength_of_row: as in `locked_linear`; of `_Assigned`, and no buffers: DDP would overwrite them
            with those of another process, and torch.compile would compile anew for each batch size.
        packed: whether each row has an entry of its own, and not each request.
        limits: the largest strength of each lock that this dtype can hold.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    heads: torch.Tensor
    slots: torch.Tensor
    values: torch.Tensor
    folds: torch.Tensor
    lock_of_row: torch.Tensor
    strength_of_row: torch.Tensor
    limits: torch.Tensor

    def __init__(self, site: Site, displacements: Sequence[Displacement | None], assigned: _Assigned) -> None:
        """Of a site's module, which is not changed.

        Args:
            displacements: of each lock at strength 1; None for a lock that does not shift this layer.
            assigned: shared by all layers of the model.

        Raises:
            FastlockError: a fold is not finite.
        """
        super().__init__()
        self.name = site.name
        self._displacements = list(displacements)
        self._folded: tuple[object, ...] | None = None
        self._folded_from: weakref.ref[nn.Parameter] | None = None
        self._parameters = site.module._parameters
        _share_hooks(site.module, self)
        self.train(site.module.training)
        self.transposed = not isinstance(site.module, nn.Linear)
        tables = _tables(self._displacements, site.num_heads, site.head_dim)
        tables |= {"folds": torch.zeros(len(displacements), len(site.weight), device="cpu")}
        for name, table in tables.items():
            self.register_buffer(name, table.to(site.weight.device), persistent=False)
        self._assigned = assigned
        self.take_assignment()
        self.refresh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Y of x, [batch, ..., width]; as many requests, or packed rows, as were assigned.

        Raises:
            FastlockError: there are more or fewer.
        """
        if not torch.compiler.is_compiling():
            self.refresh()
        there = x.numel() // x.shape[-1] if self.packed else x.shape[0]
        if self.lock_of_row.shape[0] != there:
            self._refuse(there)
        weight: torch.Tensor = self.weight.t() if self.transposed else self.weight
        bias: torch.Tensor | None = self.bias
        if torch.is_autocast_enabled(x.device.type):
            x, weight, bias = _autocast(x), _autocast(weight), None if bias is None else _autocast(bias)
        return locked_linear(
            x,
            weight,
            bias,
            self.heads,
            self.slots,
            self.values,
            self.folds,
            self.lock_of_row,
            self.strength_of_row,
        )

    def _refuse(self, there: int) -> None:
        kind = "rows of packed requests" if self.packed else "requests"
        came = f"{there} rows" if self.packed else f"a batch of {there}"
        raise FastlockError(
            f"{self.name}: {came} came, but locks were assigned to {self.lock_of_row.shape[0]} {kind}. Call assign() "
            "before the model runs, with one for each (of a beam search, for each beam; packed=True for each row of "
            "requests that are packed into one sequence); -1 for none."
        )

    def take_assignment(self) -> None:
        """Read the requests' locks where they are kept for this device."""
        self.packed = self._assigned.packed
        self.lock_of_row, self.strength_of_row = self._assigned.on(self.weight.device)

    def refresh(self, anew: bool = False) -> None:
        """Fold again if the weight was replaced, moved or written to, or anyway; at the same address if it can be.

        What goes past torch's count of writes (`weight.data`, inference mode) is not noticed.

        Raises:
            FastlockError: a fold is not finite; or a CUDA graph is being captured, in which nothing can be folded.
        """
        weight = self.weight
        now = (weight.data_ptr(), weight.device, weight.dtype, version_of(weight))
        same = self._folded_from is not None and self._folded_from() is weight  # an address may be used again
        if same and now == self._folded and not anew:
            return
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            raise FastlockError(f"{self.name}.weight was changed: call assign() before you capture a CUDA graph.")
        with torch.inference_mode(False), torch.no_grad():
            folds = self._folds()
            self.folds.copy_(folds)
            self.limits = self._limits(folds)
        self._folded, self._folded_from = now, weakref.ref(weight)

    def _folds(self) -> torch.Tensor:
        """W d of each lock at strength 1, [num_locks, hidden] float32: summed in float64, rounded once."""
        weight = self.weight.detach().t() if self.transposed else self.weight.detach()
        none = torch.zeros(len(weight), dtype=torch.float64, device="cpu")
        folds = [
            none if d is None else exact_fold(HeadColumns.in_projection(weight, d.heads, d.head_dim), d.values).cpu()
            for d in self._displacements
        ]
        found = torch.stack(folds).float()
        if not found.isfinite().all():
            raise FastlockError(f"{self.name}: a fold is not finite: its locked columns hold NaN or infinite weights.")
        return found

    def _limits(self, folds: torch.Tensor) -> torch.Tensor:
        """The strength at which what is added to x or y is infinite in their dtype, [num_locks] float64."""
        of_d = [0.0 if d is None else float(d.values.abs().max()) for d in self._displacements]
        largest = torch.tensor(of_d, dtype=torch.float64, device="cpu").maximum(folds.abs().amax(1).double())
        return min(torch.finfo(self.weight.dtype).max, torch.finfo(torch.float32).max) / largest.clamp(min=1)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> LockedLinear:
        """Tables follow the weight to another device, but keep their dtypes."""
        tables = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, table in tables.items():
            self._buffers[name] = None if table is None else table.to(self.weight.device)
        self.take_assignment()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_folded_from": None}


def _share_hooks(source: nn.Module, target: nn.Module) -> None:
    """Whatever hooks one of them has or gets, the other one has too; backward hooks are of one kind in both."""
    shared = {name: hooks for name, hooks in source.__dict__.items() if "_hooks" in name}
    target.__dict__.update(shared, _is_full_backward_hook=source._is_full_backward_hook)


def _autocast(tensor: torch.Tensor) -> torch.Tensor:
    """As autocast casts what goes into a linear layer: all but float64."""
    kept = tensor.dtype == torch.float64
    return tensor if kept else tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _tables(displacements: Sequence[Displacement | None], num_heads: int, head_dim: int) -> dict[str, torch.Tensor]:
    """`heads`, `slots` and `values` of one layer, on the CPU."""
    shifted = sorted({head for d in displacements if d is not None for head in d.heads})
    column = {head: i for i, head in enumerate(shifted)}
    slots = torch.full((len(displacements), len(shifted)), -1, dtype=torch.int32, device="cpu")
    values: list[torch.Tensor] = []
    for lock, d in enumerate(displacements):
        for head, value in zip(d.heads, d.values, strict=True) if d is not None else ():
            slots[lock, column[head]] = len(values)
            values.append(value)
    heads = torch.tensor([column.get(head, -1) for head in range(num_heads)], dtype=torch.int32, device="cpu")
    return {"heads": heads, "slots": slots, "values": torch.stack(values).float().view(-1, head_dim)}


class _Assigned:
    """The lock and the strength of each request, which all layers of a model read.

    On each device every number of requests has its place in memory, the same one each time, so that a CUDA graph that
    was captured with that many sees what is assigned later.

    Attributes:
        packed: whether each row has an entry of its own, and not each request.
    """

    def __init__(self) -> None:
        self.packed = False
        self._now: tuple[torch.Tensor, torch.Tensor] = _numbers([], [])
        self._memory: dict[tuple[torch.device, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def assign(
        self, locks: Sequence[int], strengths: Sequence[float], packed: bool, devices: Iterable[torch.device]
    ) -> None:
        """Another assignment; nothing is changed where memory runs out on one of the devices."""
        for device in devices:
            self._held(device, len(locks))
        self._now, self.packed = _numbers(locks, strengths), packed

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """`lock_of_row` and `strength_of_row` there, written anew."""
        with torch.inference_mode(False), torch.no_grad():
            locks, strengths = (
                memory[: len(numbers)].copy_(numbers)
                for memory, numbers in zip(self._held(device, len(self._now[0])), self._now, strict=True)
            )
        return locks, strengths

    def _held(self, device: torch.device, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The memory for so many requests: of few sizes, so that it does not grow with every other number of rows."""
        size = max(FEWEST_HELD, 1 << (count - 1).bit_length())
        if (device, size) not in self._memory:
            with torch.inference_mode(False):
                locks = torch.full((size,), -1, dtype=torch.int32, device=device)
                self._memory[device, size] = locks, torch.zeros(size, dtype=torch.float32, device=device)
        return self._memory[device, size]


def _numbers(locks: Sequence[int], strengths: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """`lock_of_row` and `strength_of_row`, on the CPU."""
    return (
        torch.tensor(locks, dtype=torch.int32, device="cpu"),
        torch.tensor(strengths, dtype=torch.float32, device="cpu"),
    )


class RequestLocks:
    """Locks that each request of a batch may have, or not, in one model whose weights and biases stay as they are.

    The output projections of all locked layers are replaced by `LockedLinear`s until `remove`, or the end of a `with`
    block. What was assigned holds for all forward passes until the next `assign`; before the first one, and for a
    batch of another size, a forward pass is an error. What is saved meanwhile is the model without locks.

    Attributes:
        locks: the locks, by the number that `assign` takes.
    """

    def __init__(self, model: nn.Module, locks: Sequence[Lock]) -> None:
        """Put them into a model.

        Args:
            model: a transformers model, on any devices, not relocked; `torch.compile`d is fine.
            locks: one or more; they may shift different heads and layers.

        Raises:
            FastlockError: as for `fastlock.relock`; or the model is relocked, or has locks per request already. The
                model is as it was.
        """
        inner = unwrapped(model)
        self.locks = _checked(locks)
        _check_free(inner)
        sites: dict[int, Site] = {}
        displacements: dict[int, list[Displacement | None]] = {}
        for i, lock in enumerate(self.locks):
            of_layers = lock.displacement(1.0)
            for site in sites_for(inner, lock):
                sites[site.layer] = site
                displacements.setdefault(site.layer, [None] * len(self.locks))[i] = of_layers[site.layer]
        for site in sites.values():
            _check_replaceable(site)
        self._assigned = _Assigned()
        with torch.inference_mode(False), torch.no_grad():
            made = [
                (site, LockedLinear(site, displacements[layer], self._assigned))
                for layer, site in sorted(sites.items())
            ]
        self._placed: list[tuple[nn.Module, str, nn.Module, LockedLinear]] = []
        for site, locked in made:
            path, _, name = site.name.rpartition(".")
            parent = inner.get_submodule(path)
            setattr(parent, name, locked)
            site.module.__dict__[REPLACED] = True
            self._placed.append((parent, name, site.module, locked))

    def assign(
        self,
        lock_of_request: Sequence[int] | torch.Tensor,
        strengths: float | Sequence[float | None] | torch.Tensor | None = None,
        *,
        packed: bool = False,
    ) -> None:
        """The lock of each request in the batches that follow.

        What is assigned to as many requests is written to the same memory each time, so that CUDA graphs see it.

        Args:
            lock_of_request: for each request of the batch the number of its lock, -1 for none.
            strengths: one for all, or one a request; None for the lock's own, as for `fastlock.relock`.
            packed: requests are packed into one sequence, and what is given is for each of its tokens.

        Raises:
            FastlockError: a lock that there is not, a strength that can't be applied or is too large for the model's
                dtype, or as many strengths as requests were not given. What was assigned before is still so.
        """
        if not self._placed:
            raise FastlockError("these locks were removed from the model; make new RequestLocks.")
        layers = [locked for *_, locked in self._placed]
        for locked in layers:
            locked.refresh()
        locks, applied = self._applied(lock_of_request, strengths)
        self._assigned.assign(locks, applied, packed, {locked.weight.device for locked in layers})
        for locked in layers:
            locked.take_assignment()

    def _applied(self, lock_of_request: Any, strengths: Any) -> tuple[list[int], list[float]]:
        """The number and the strength of each request's lock, 0 for none."""
        given, of_each = (
            given.tolist() if isinstance(given, torch.Tensor) else given for given in (lock_of_request, strengths)
        )
        if not isinstance(given, Sequence) or isinstance(given, str) or not given:
            raise FastlockError("give a list with the lock of each request, -1 for none.")
        locks = [check_lock_id(lock, len(self.locks)) for lock in given]
        of_each = list(of_each) if isinstance(of_each, Sequence) else [of_each] * len(locks)
        if len(of_each) != len(locks):
            raise FastlockError(f"{len(of_each)} strengths for {len(locks)} requests. Give one for all, or one each.")
        checked = [None if strength is None else check_strength(strength) for strength in of_each]
        applied = [
            0.0 if lock == -1 else strength_for(self.locks[lock], strength)
            for lock, strength in zip(locks, checked, strict=True)
        ]
        limits = torch.stack([locked.limits for *_, locked in self._placed]).amin(0).tolist()
        for lock, strength in zip(locks, applied, strict=True):
            if lock != -1 and strength > limits[lock]:
                raise FastlockError(
                    f"strength {strength:g} is too large for lock {lock}: the model's dtype holds no numbers as large "
                    f"as its fold. Give {limits[lock]:.3g} at most."
                )
        return locks, applied

    def refold(self) -> None:
        """Fold all locks again, after weights were changed past torch's count of writes (`weight.data`)."""
        for _, _, _, locked in self._placed:
            locked.refresh(anew=True)

    def remove(self) -> None:
        """Put the original modules back, with what happened to their parameters meanwhile.

        Raises:
            FastlockError: something else took the place of one of these; nothing was changed.
        """
        for parent, name, _, locked in self._placed:
            if getattr(parent, name) is not locked:
                raise FastlockError(f"{locked.name} was replaced since locks were put in; put that back first.")
        for parent, name, original, locked in self._placed:
            original.train(locked.training)
            original._is_full_backward_hook = locked._is_full_backward_hook
            del original.__dict__[REPLACED]
            setattr(parent, name, original)
        self._placed = []

    def __enter__(self) -> RequestLocks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _checked(locks: Any) -> tuple[Lock, ...]:
    if not isinstance(locks, Sequence) or isinstance(locks, str) or not locks:
        raise FastlockError(f"locks is a {type(locks).__name__}; give a list of one or more locks.")
    for lock in locks:
        check_lock(lock)
    return tuple(locks)


def _check_replaceable(site: Site) -> None:
    """That another module can take the place of a site's."""
    if hasattr(site.module, PLACED_BIAS):
        raise FastlockError(f"{site.name} is part of another model too, which is relocked. Unlock that first.")
    if "forward" in site.module.__dict__ and not hasattr(site.module, "_hf_hook"):
        raise FastlockError(
            f"{site.name}.forward was replaced in this module, and that would not run while locks per request are in. "
            "Put the class's own forward back, or use a hook."
        )


def _check_free(model: nn.Module) -> None:
    """That a model has no lock yet."""
    if any(isinstance(module, LockedLinear) for module in model.modules()):
        raise FastlockError(
            f"{type(model).__name__} has locks per request already: remove() them first. (If it is a copy of a model "
            "that had some: copy that one without them.)"
        )
    check_unlocked(model, "its lock would act in every request, beside the request's own")
