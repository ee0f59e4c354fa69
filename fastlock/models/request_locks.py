"""Locks per request, y = (x + s·(d + U Vᵀ x)) Wᵀ + c with those of the row's lock, for tenants of one model's weights.

Nothing is put into the weights or biases: each request of a batch has the lock that it was assigned, or none.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, cast

import torch
from torch import nn

from fastlock.errors import DamagedError, FastlockError, UnsupportedError
from fastlock.kernels.fold.reference import HeadColumns, exact_fold
from fastlock.locks.gate import Gate
from fastlock.locks.lock import Displacement, Lock, check_lock, check_strength, strength_for
from fastlock.models.assignment import Assignment
from fastlock.models.base_check import check_basis
from fastlock.models.locked_linear_op import check_lock_id, locked_linear
from fastlock.models.projections import REPLACED, StandIn, Transposed
from fastlock.models.reloaded import check_unlocked
from fastlock.models.request_gates import GATE_TABLES, gate_tables, with_gates, written_by
from fastlock.models.sites import Site, sites_for, unwrapped
from fastlock.models.state import holds_lock, version_of


class LockedLinear(StandIn):
    """One attention output projection with a lock per request, in the place of the plain one.

    It has the hooks of the plain one, and its parameters under the same names: the state_dict stays the same, and what
    happens to them here happens there. Its tables are in no state_dict. `RequestLocks` makes and assigns it.

    Attributes:
        weight, bias: those of the plain projection.
        transposed: whether it keeps W as [num_heads * head_dim, hidden] (GPT-2's Conv1D).
        heads, slots, values, folds: as in `locked_linear`; buffers, at the same address until the device changes. The
            `GATE_TABLES` are, too, where a lock has a gate here.
        lock_of_row, strength_of_row: as in `locked_linear`, from the `Assignment`. They are not buffers: DDP would
            overwrite them with those of another process, and torch.compile would compile anew for each batch size.
        packed: whether each row has an entry of its own, rather than each request.
        limits: the largest strength of each lock that this dtype can hold, [num_locks] float64.
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

    def __init__(
        self,
        site: Site,
        displacements: Sequence[Displacement | None],
        assigned: Assignment,
        gates: Sequence[Gate | None] = (),
    ) -> None:
        """Stand in for a site's module, which is not changed.

        Args:
            site: a plain or transposed projection.
            displacements: of each lock at strength 1; None for a lock that does not shift this layer.
            assigned: shared by all layers of the model.
            gates: of each lock at strength 1; None for a lock without one here.

        Raises:
            DamagedError: a fold is not finite.
        """
        super().__init__()
        self.name = site.name
        self._displacements = list(displacements)
        self._folded: tuple[object, ...] | None = None
        self._folded_from: weakref.ref[nn.Parameter] | None = None
        self._parameters = site.module._parameters
        _share_hooks(site.module, self)
        self.train(site.module.training)
        self.transposed = isinstance(site.projection, Transposed)
        tables = _tables(self._displacements, site.num_heads, site.head_dim)
        tables |= {"folds": torch.zeros(len(displacements), len(site.weight), device="cpu")}
        of_gates = gate_tables(gates, site.num_heads * site.head_dim, len(site.weight))
        self._gated, tables = bool(of_gates), tables | of_gates
        for name, table in tables.items():
            self.register_buffer(name, table.to(site.weight.device), persistent=False)
        self._assigned = assigned
        self.take_assignment()
        self.refresh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The projection of x with the lock of each request.

        Args:
            x: [batch, ..., width], with as many requests, or packed rows, as were assigned.

        Returns:
            y, [batch, ..., hidden] of x's dtype; under autocast of that which it casts to.

        Raises:
            FastlockError: there are more or fewer requests; or a weight was changed while a CUDA graph is captured.
            DamagedError: a weight was changed, and its fold is not finite.
        """
        if not torch.compiler.is_compiling():
            self.refresh()
        count = x.numel() // x.shape[-1] if self.packed else x.shape[0]
        if self.lock_of_row.shape[0] != count:
            self._refuse(count)
        weight: torch.Tensor = self.weight.t() if self.transposed else self.weight
        bias: torch.Tensor | None = self.bias
        if torch.is_autocast_enabled(x.device.type):
            x, weight, bias = _autocast(x), _autocast(weight), None if bias is None else _autocast(bias)
        y = locked_linear(
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
        if not self._gated:
            return y
        tables = {name: self._buffers[name] for name in GATE_TABLES}
        with torch.autocast(x.device.type, enabled=False):
            return with_gates(y, x, weight, cast(Any, tables), self.lock_of_row, self.strength_of_row)

    def _refuse(self, count: int) -> None:
        entries = "rows of packed requests" if self.packed else "requests"
        batch = f"{count} rows" if self.packed else f"a batch of {count}"
        raise FastlockError(
            f"{self.name}: {batch} came, but locks were assigned to {self.lock_of_row.shape[0]} {entries}. Call "
            "assign() before the model runs, with the lock of each request, -1 for none. In a beam search, give one "
            "for each beam; with packed=True, one for each row of the requests that are packed into one sequence."
        )

    def take_assignment(self) -> None:
        """Read the requests' locks from the memory of this device."""
        self.packed = self._assigned.packed
        self.lock_of_row, self.strength_of_row = self._assigned.on(self.weight.device)

    def refresh(self, anew: bool = False) -> None:
        """Fold again if the weight was replaced, moved or written to, or if `anew`; at the same address if possible.

        Writes that torch does not count (`weight.data`, inference mode) are not noticed.

        Raises:
            DamagedError: a fold is not finite.
            FastlockError: a CUDA graph is being captured, and nothing can be folded meanwhile.
        """
        weight = self.weight
        now = (weight.data_ptr(), weight.device, weight.dtype, version_of(weight))
        same = self._folded_from is not None and self._folded_from() is weight  # an address may be used again
        if same and now == self._folded and not anew:
            return
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            raise FastlockError(f"{self.name}.weight was changed. Call assign() before you capture a CUDA graph.")
        with torch.inference_mode(False), torch.no_grad():
            folds = self._folds()
            self.folds.copy_(folds)
            self.limits = self._limits(folds)
            if self._gated:
                self._buffers["written"].copy_(self._written())  # type: ignore[union-attr]
        self._folded, self._folded_from = now, weakref.ref(weight)

    def _folds(self) -> torch.Tensor:
        """W d of each lock at strength 1, [num_locks, hidden] float32: summed in float64, rounded once."""
        weight = self.weight.detach().t() if self.transposed else self.weight.detach()
        none = torch.zeros(len(weight), dtype=torch.float64, device="cpu")
        folds = [
            none if d is None else exact_fold(HeadColumns.in_projection(weight, d.heads, d.head_dim), d.values).cpu()
            for d in self._displacements
        ]
        table = torch.stack(folds).float()
        if not table.isfinite().all():
            raise DamagedError(
                f"{self.name}: a fold is not finite: its locked columns hold NaN or infinite weights. Check the model, "
                "or download the checkpoint again."
            )
        return table

    def _written(self) -> torch.Tensor:
        """W U of each rank, as `written_by` gives it."""
        weight = self.weight.detach().t() if self.transposed else self.weight.detach()
        written = written_by(weight, cast(torch.Tensor, self._buffers["writers"]))
        if not written.isfinite().all():
            raise DamagedError(
                f"{self.name}: what a gate writes is not finite: the columns of its locked heads hold NaN or infinite "
                "weights. Check the model, or download the checkpoint again."
            )
        return written

    def _limits(self, folds: torch.Tensor) -> torch.Tensor:
        """The strength at which what is added to x or y is infinite in their dtype, [num_locks] float64."""
        of_d = [0.0 if d is None else float(d.values.abs().max()) for d in self._displacements]
        largest = torch.tensor(of_d, dtype=torch.float64, device="cpu").maximum(folds.abs().amax(1).double())
        return min(torch.finfo(self.weight.dtype).max, torch.finfo(torch.float32).max) / largest.clamp(min=1)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> LockedLinear:
        """Tables follow the weight to another device, but keep their dtypes."""
        tables = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        with torch.inference_mode(False), torch.no_grad():  # or nobody could write to them afterwards
            for name, table in tables.items():
                self._buffers[name] = None if table is None else table.to(self.weight.device)
        self.take_assignment()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_folded_from": None}


def _share_hooks(source: nn.Module, target: nn.Module) -> None:
    """Let each have whatever hooks the other has or gets; backward hooks are of one kind in both."""
    shared = {name: hooks for name, hooks in source.__dict__.items() if "_hooks" in name}
    target.__dict__.update(shared, _is_full_backward_hook=source._is_full_backward_hook)


def _autocast(tensor: torch.Tensor) -> torch.Tensor:
    """Cast as autocast does what goes into a linear layer: all but float64."""
    if tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


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


class RequestLocks:
    """Locks that each request of a batch may have, or not, in one model whose weights and biases stay as they are.

    The output projections of all locked layers are replaced by `LockedLinear`s until `remove`, or the end of a `with`
    block. What was assigned holds for all forward passes until the next `assign`; before the first one, and for a
    batch of another size, a forward pass is an error. What is saved meanwhile is the model without locks.

    Attributes:
        locks: the locks, by the number that `assign` takes.
    """

    def __init__(self, model: nn.Module, locks: Sequence[Lock]) -> None:
        """Put locks into a model.

        Args:
            model: a transformers model, on any devices, not relocked; it may be `torch.compile`d.
            locks: one or more; they may shift different heads and layers.

        Raises:
            MismatchError, UnsupportedError, DamagedError: as for `fastlock.relock`.
            FastlockError: the model is relocked, or has locks per request already. After any error the model is as it
                was.
        """
        inner = unwrapped(model)
        self.locks = _checked(locks)
        _check_free(inner)
        sites: dict[int, Site] = {}
        displacements: dict[int, list[Displacement | None]] = {}
        gates: dict[int, list[Gate | None]] = {}
        for i, lock in enumerate(self.locks):
            by_layer, of_lock, gated = lock.constant(1.0), sites_for(inner, lock), lock.gates(1.0)
            check_basis(of_lock, by_layer, lock, type(inner).__name__)
            for site in of_lock:
                sites[site.layer] = site
                displacements.setdefault(site.layer, [None] * len(self.locks))[i] = by_layer[site.layer]
                gates.setdefault(site.layer, [None] * len(self.locks))[i] = gated.get(site.layer)
        for site in sites.values():
            _check_replaceable(site)
        self._assigned = Assignment()
        with torch.inference_mode(False), torch.no_grad():
            stand_ins = [
                (site, LockedLinear(site, displacements[layer], self._assigned, gates[layer]))
                for layer, site in sorted(sites.items())
            ]
        self._placed: list[tuple[nn.Module, str, nn.Module, LockedLinear]] = []
        for site, locked in stand_ins:
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
        """Give each request of the batches that follow its lock.

        Assignments to the same number of requests are written to the same memory: CUDA graphs see them.

        Args:
            lock_of_request: for each request of the batch the number of its lock, -1 for none; [batch] ints.
            strengths: one for all, or one per request; None for the lock's own, as for `fastlock.relock`.
            packed: whether requests are packed into one sequence, and there is an entry for each of its tokens.

        Raises:
            FastlockError: there is no such lock, a strength cannot be applied or is too large for the model's dtype,
                or there are more or fewer strengths than requests. The earlier assignment then still holds.
            DamagedError: a weight was changed, and its fold is not finite.
        """
        if not self._placed:
            raise FastlockError("these locks were removed from the model. Make new RequestLocks.")
        layers = [locked for *_, locked in self._placed]
        for locked in layers:
            locked.refresh()
        locks, applied = self._applied(lock_of_request, strengths)
        self._assigned.assign(locks, applied, packed, {locked.weight.device for locked in layers})
        for locked in layers:
            locked.take_assignment()

    def _applied(self, lock_of_request: Any, strengths: Any) -> tuple[list[int], list[float]]:
        """The number and the strength of each request's lock, 0 for none."""
        requests, wanted = (
            values.tolist() if isinstance(values, torch.Tensor) else values for values in (lock_of_request, strengths)
        )
        if not isinstance(requests, Sequence) or isinstance(requests, str) or not requests:
            raise FastlockError("lock_of_request: give a list with the lock of each request, -1 for none.")
        locks = [check_lock_id(lock, len(self.locks)) for lock in requests]
        wanted = list(wanted) if isinstance(wanted, Sequence) else [wanted] * len(locks)
        if len(wanted) != len(locks):
            raise FastlockError(f"{len(wanted)} strengths for {len(locks)} requests. Give one for all, or one each.")
        checked = [None if strength is None else check_strength(strength) for strength in wanted]
        applied = [
            0.0 if lock == -1 else strength_for(self.locks[lock], strength)
            for lock, strength in zip(locks, checked, strict=True)
        ]
        limits = torch.stack([locked.limits for *_, locked in self._placed]).amin(0).tolist()
        for lock, strength in zip(locks, applied, strict=True):
            if lock != -1 and strength > limits[lock]:
                raise FastlockError(
                    f"strength {strength:g} is too large for lock {lock}: the model's dtype cannot hold numbers as "
                    f"large as its fold. Give {limits[lock]:.3g} at most."
                )
        return locks, applied

    def refold(self) -> None:
        """Fold all locks again, after writes to weights that torch does not count (`weight.data`).

        Raises:
            DamagedError: a fold is not finite.
        """
        for _, _, _, locked in self._placed:
            locked.refresh(anew=True)

    def remove(self) -> None:
        """Put the original modules back; their parameters keep what happened to them meanwhile.

        Raises:
            FastlockError: something else took the place of a `LockedLinear`. Nothing was changed.
        """
        for parent, name, _, locked in self._placed:
            if getattr(parent, name) is not locked:
                raise FastlockError(
                    f"{locked.name} was replaced since locks were put in. Put the LockedLinear back first."
                )
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
    """Refuse a site whose place another module cannot take."""
    if not site.projection.in_place or site.outer is not site.module:
        raise UnsupportedError(
            f"{site.name} is a {type(site.outer).__name__}, and locks per request run plain linear layers alone. Use "
            "fastlock.relock, or load the checkpoint unquantised."
        )
    if holds_lock(site.module):
        raise FastlockError(f"{site.name} is part of another model too, which is relocked. Unlock that model first.")
    if "forward" in site.module.__dict__ and not hasattr(site.module, "_hf_hook"):
        raise UnsupportedError(
            f"{site.name}.forward was replaced in this module, and would not run while locks per request are in. Put "
            "the class's own forward back, or use a hook."
        )


def _check_free(model: nn.Module) -> None:
    """Refuse a model that has a lock already."""
    if any(isinstance(module, LockedLinear) for module in model.modules()):
        raise FastlockError(
            f"{type(model).__name__} has locks per request already: remove() them first. (If it is a copy of a model "
            "that had some, make the copy without them.)"
        )
    check_unlocked(model, "its lock would act in every request, beside the request's own")
