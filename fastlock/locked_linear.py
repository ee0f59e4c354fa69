"""Locks per request: y = (x + s d[lock of the row]) Wᵀ + c, for servers whose tenants share one model's weights.

Nothing is put into the weights or biases: each request of a batch has the lock that it was assigned, or none.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn

from fastlock import reference
from fastlock.carrier import PLACED_BIAS
from fastlock.errors import FastlockError
from fastlock.kernels.locked_linear import Inputs, by_torch
from fastlock.kernels.locked_linear import locked_linear as by_fastest
from fastlock.loaded import receipt_of
from fastlock.lock import Displacement, Lock, check_lock, check_strength, strength_for
from fastlock.receipt import version_of
from fastlock.sites import Site, sites_for, unwrapped

_LIBRARY: Any = torch.library.Library("fastlock", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "locked_linear(Tensor x, Tensor weight, Tensor? bias, Tensor heads, Tensor slots, Tensor values, Tensor folds, "
    "Tensor lock_of_row, Tensor strength_of_row) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def locked_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    heads: torch.Tensor,
    slots: torch.Tensor,
    values: torch.Tensor,
    folds: torch.Tensor,
    lock_of_row: torch.Tensor,
    strength_of_row: torch.Tensor,
) -> torch.Tensor:
    """The projection with a lock per row, y = (x + s d[lock]) Wᵀ + c: the op `fastlock::locked_linear`.

    It can be traced by torch.compile, captured in a CUDA graph and differentiated by x, weight and bias. On a CUDA
    device the first call for a shape times what there is to compute it (`fastlock.kernels.locked_linear`).

    Args:
        x: [..., width] of the weight's dtype.
        weight: W, [hidden, width], float16, bfloat16, float32 or float64.
        bias: c, [hidden] of the weight's dtype, or None.
        heads: the column of `slots` for each head, -1 where no lock shifts it; [num_heads] int32.
        slots: the row of `values` for each lock and column, -1 where the lock does not shift that head; [num_locks,
            columns] int32.
        values: displacements at strength 1, [n, head_dim] float32; width = num_heads * head_dim.
        folds: W d of each lock at strength 1, [num_locks, hidden] float32.
        lock_of_row: the lock of each entry, -1 for none; [entries] int32. Each entry serves rows / entries consecutive
            rows of x, so that [batch, length, width] takes one a request.
        strength_of_row: the strength of each entry, [entries] float32.

    Returns:
        y, [..., hidden] of x's dtype, contiguous.

    Raises:
        FastlockError: shapes, dtypes or devices are not as said; on a CPU also for a lock that there is not, or a
            strength that can't be applied. On a CUDA device, which nobody waits for, rows of such a lock become NaN.
    """
    y: torch.Tensor = torch.ops.fastlock.locked_linear(
        x, weight, bias, heads, slots, values, folds, lock_of_row, strength_of_row
    )
    return y


def _op_on(compute: Callable[[Inputs], torch.Tensor]) -> Callable[..., torch.Tensor]:
    def op(x: torch.Tensor, *others: Any) -> torch.Tensor:
        inputs = Inputs(x.reshape(-1, x.shape[-1]), *others)
        _check(inputs)
        return compute(inputs).view(*x.shape[:-1], inputs.weight.shape[0])

    return op


def _on_cpu(inputs: Inputs) -> torch.Tensor:
    lock, strength = inputs.lock_of_row, inputs.strength_of_row
    if (absent := (lock < -1) | (lock >= len(inputs.slots))).any():
        _check_lock_id(int(lock[absent][0]), len(inputs.slots))
    if (wrong := ~((strength >= 0) & strength.isfinite())).any():
        check_strength(float(strength[wrong][0]))
    return by_torch(inputs)


def _fake(x: torch.Tensor, weight: torch.Tensor, *others: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, bias, heads, slots, values, _, lock_of_row, strength_of_row = inputs
    ctx.save_for_backward(x, weight, heads, slots, values, lock_of_row, strength_of_row)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, heads, slots, values, lock_of_row, strength_of_row = ctx.saved_tensors
    of_x = grad @ weight if ctx.needs_input_grad[0] else None
    flat = grad.reshape(-1, grad.shape[-1])
    of_bias = flat.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
    of_weight = None
    if ctx.needs_input_grad[1]:
        d = _dense(heads, slots, values, lock_of_row) * strength_of_row[:, None]  # [entries, width]
        shifted = x.reshape(len(d), -1, x.shape[-1]) + d[:, None].to(x.dtype)
        of_weight = flat.t() @ shifted.reshape(-1, x.shape[-1])
    return of_x, of_weight, of_bias, None, None, None, None, None, None


def _dense(heads: torch.Tensor, slots: torch.Tensor, values: torch.Tensor, lock_of_row: torch.Tensor) -> torch.Tensor:
    """The displacement of each entry at strength 1, [entries, width] float32."""
    slot = slots[lock_of_row.clamp(min=0)][:, heads.clamp(min=0)]  # [entries, num_heads]
    shifted = (lock_of_row >= 0)[:, None] & (heads >= 0) & (slot >= 0)
    return torch.where(shifted[..., None], values[slot.clamp(min=0)], 0.0).flatten(1)


_LIBRARY.impl("locked_linear", _op_on(_on_cpu), "CPU")
_LIBRARY.impl("locked_linear", _op_on(by_fastest), "CUDA")
torch.library.register_fake("fastlock::locked_linear", _fake, lib=_LIBRARY)
torch.library.register_autograd("fastlock::locked_linear", _backward, setup_context=_keep_for_backward, lib=_LIBRARY)


def _check(inputs: Inputs) -> None:
    """That shapes, dtypes and devices are as `locked_linear` says."""
    x, weight, values = inputs.x, inputs.weight, inputs.values
    if weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise FastlockError(f"x has {x.shape[1]} columns, but the weight is {list(weight.shape)}.")
    hidden, width = weight.shape
    if x.dtype != weight.dtype or not x.dtype.is_floating_point:
        raise FastlockError(f"x is {x.dtype}, but the weight {weight.dtype}; both must be of one floating-point dtype.")
    if inputs.bias is not None:
        _check_tensor("bias", inputs.bias, (hidden,), x.dtype, x.device)
    if values.dim() != 2 or inputs.slots.dim() != 2 or 0 in (*values.shape, *inputs.slots.shape):
        raise FastlockError(f"values is {list(values.shape)} and slots {list(inputs.slots.shape)}; both are tables.")
    if width % inputs.head_dim:
        raise FastlockError(f"the weight has {width} columns, which are no heads of {inputs.head_dim}.")
    entries = inputs.lock_of_row.numel()
    _check_tensor("weight", weight, (hidden, width), x.dtype, x.device, contiguous=False)
    _check_tensor("heads", inputs.heads, (width // inputs.head_dim,), torch.int32, x.device)
    _check_tensor("slots", inputs.slots, inputs.slots.shape, torch.int32, x.device)
    _check_tensor("values", values, values.shape, torch.float32, x.device)
    _check_tensor("folds", inputs.folds, (len(inputs.slots), hidden), torch.float32, x.device)
    _check_tensor("lock_of_row", inputs.lock_of_row, (entries,), torch.int32, x.device)
    _check_tensor("strength_of_row", inputs.strength_of_row, (entries,), torch.float32, x.device)
    if inputs.rows and (entries == 0 or inputs.rows % entries):
        raise FastlockError(
            f"x has {inputs.rows} rows, but locks were assigned to {entries} requests: the rows can't be shared out "
            "evenly. Give one entry for each request of the batch."
        )


def _check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    contiguous: bool = True,
) -> None:
    right = tensor.shape == tuple(shape) and tensor.dtype == dtype and tensor.device == device
    if not right or (contiguous and not tensor.is_contiguous()):
        raise FastlockError(
            f"{name} is {list(tensor.shape)} {tensor.dtype} on {tensor.device}; it must be contiguous, {list(shape)} "
            f"{dtype} on {device}."
        )


def _check_lock_id(lock: Any, num_locks: int) -> int:
    try:
        number = -2 if isinstance(lock, bool) else operator.index(lock)
    except TypeError:
        number = -2
    if not -1 <= number < num_locks:
        raise FastlockError(f"lock {lock!r} was assigned; give a number from 0 to {num_locks - 1}, or -1 for no lock.")
    return number


class LockedLinear(nn.Module):
    """One attention output projection with a lock per request, in the place of the plain one.

    It has the parameters of the plain one, under their names, and its hooks, so that a state_dict is the same and what
    happens to them here happens there. Its tables are buffers that no state_dict holds: their addresses change only
    with the batch size or the device, as CUDA graphs need. `RequestLocks` makes and assigns it.

    Attributes:
        weight, bias: those of the plain projection.
        transposed: whether it keeps W as [num_heads * head_dim, hidden] (GPT-2's Conv1D).
        heads, slots, values, folds, lock_of_row, strength_of_row: as in `locked_linear`.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    heads: torch.Tensor
    slots: torch.Tensor
    values: torch.Tensor
    folds: torch.Tensor
    lock_of_row: torch.Tensor
    strength_of_row: torch.Tensor

    def __init__(self, site: Site, displacements: Sequence[Displacement | None]) -> None:
        """Of a site's module, which is not changed.

        Args:
            displacements: of each lock at strength 1; None for a lock that does not shift this layer.

        Raises:
            FastlockError: a fold is not finite.
        """
        super().__init__()
        self.name = site.name
        self._displacements = list(displacements)
        self._folded: tuple[object, ...] | None = None
        self._parameters = site.module._parameters
        self.__dict__.update({name: hooks for name, hooks in site.module.__dict__.items() if name.endswith("_hooks")})
        self.train(site.module.training)
        self.transposed = not isinstance(site.module, nn.Linear)
        device = site.weight.device
        tables = _tables(self._displacements, site.num_heads, site.head_dim)
        tables |= {"folds": torch.zeros(len(displacements), len(site.weight), device="cpu")}
        tables |= _assignment([], [])
        for name, table in tables.items():
            self.register_buffer(name, table.to(device), persistent=False)
        self.refresh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Y of x, [batch, ..., width] with one assigned request each, or one sequence with one for each row.

        Raises:
            FastlockError: there are not as many requests as were assigned.
        """
        if not torch.compiler.is_compiling():
            self.refresh()
        requests, rows = self.lock_of_row.shape[0], x.numel() // x.shape[-1]
        if requests != x.shape[0] and (x.shape[0] != 1 or requests != rows):
            raise FastlockError(
                f"{self.name}: a batch of {x.shape[0]} came, but locks were assigned to {requests} requests. "
                "Call assign() before the model runs, with one for each (of a beam search, for each beam); -1 for none."
            )
        weight: torch.Tensor = self.weight.t() if self.transposed else self.weight
        bias: torch.Tensor | None = self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
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

    def refresh(self, anew: bool = False) -> None:
        """Fold again if the weight was replaced, moved or written to, or anyway; at the same address if it can be.

        What goes past torch's count of writes (`weight.data`, inference mode) is not noticed.

        Raises:
            FastlockError: a fold is not finite; or a CUDA graph is being captured, in which nothing can be folded.
        """
        weight = self.weight
        now = (weight.data_ptr(), weight.device, weight.dtype, version_of(weight))
        if now == self._folded and not anew:
            return
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            raise FastlockError(f"{self.name}.weight was changed: call assign() before you capture a CUDA graph.")
        with torch.inference_mode(False), torch.no_grad():
            self.folds.copy_(self._folds())
        self._folded = now

    def _folds(self) -> torch.Tensor:
        """W d of each lock at strength 1, [num_locks, hidden] float32: summed in float64, rounded once."""
        weight = self.weight.detach().t() if self.transposed else self.weight.detach()
        none = torch.zeros(len(weight), dtype=torch.float64, device="cpu")
        folds = [none if d is None else reference.exact_fold(weight, d).cpu() for d in self._displacements]
        found = torch.stack(folds).float()
        if not found.isfinite().all():
            raise FastlockError(f"{self.name}: a fold is not finite: its locked columns hold NaN or infinite weights.")
        return found

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> LockedLinear:
        """Tables follow the weight to another device, but keep their dtypes."""
        tables = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, table in tables.items():
            self._buffers[name] = None if table is None else table.to(self.weight.device)
        return self


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


def _assignment(locks: Sequence[int], strengths: Sequence[float]) -> dict[str, torch.Tensor]:
    """`lock_of_row` and `strength_of_row`, on the CPU."""
    return {
        "lock_of_row": torch.tensor(locks, dtype=torch.int32, device="cpu"),
        "strength_of_row": torch.tensor(strengths, dtype=torch.float32, device="cpu"),
    }


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
            if hasattr(site.module, PLACED_BIAS):
                raise FastlockError(f"{site.name} is part of another model too, which is relocked. Unlock that first.")
        with torch.inference_mode(False), torch.no_grad():
            made = [(site, LockedLinear(site, displacements[layer])) for layer, site in sorted(sites.items())]
        self._placed: list[tuple[nn.Module, str, nn.Module, LockedLinear]] = []
        for site, locked in made:
            path, _, name = site.name.rpartition(".")
            parent = inner.get_submodule(path)
            setattr(parent, name, locked)
            self._placed.append((parent, name, site.module, locked))

    def assign(
        self,
        lock_of_request: Sequence[int] | torch.Tensor,
        strengths: float | Sequence[float | None] | None = None,
    ) -> None:
        """The lock of each request in the batches that follow.

        As long as there are as many requests, it is written to the same memory, so that CUDA graphs see it.

        Args:
            lock_of_request: for each request of the batch the number of its lock, -1 for none.
            strengths: one for all, or one a request; None for the lock's own, as for `fastlock.relock`.

        Raises:
            FastlockError: a lock that there is not, a strength that can't be applied, or as many strengths as requests
                were not given. What was assigned before is still so.
        """
        if not self._placed:
            raise FastlockError("these locks were removed from the model; make new RequestLocks.")
        locks, applied = self._applied(lock_of_request, strengths)
        for _, _, _, locked in self._placed:
            locked.refresh()
        with torch.inference_mode(False), torch.no_grad():
            for name, table in _assignment(locks, applied).items():
                self._write(name, table)

    def _applied(
        self, lock_of_request: Sequence[int] | torch.Tensor, strengths: float | Sequence[float | None] | None
    ) -> tuple[list[int], list[float]]:
        """The number and the strength of each request's lock, 0 for none."""
        given: Any = lock_of_request.tolist() if isinstance(lock_of_request, torch.Tensor) else lock_of_request
        if not isinstance(given, Sequence) or isinstance(given, str) or not given:
            raise FastlockError("give a list with the lock of each request, -1 for none.")
        locks = [_check_lock_id(lock, len(self.locks)) for lock in given]
        each = list(strengths) if isinstance(strengths, Sequence | torch.Tensor) else [strengths] * len(locks)
        if len(each) != len(locks):
            raise FastlockError(f"{len(each)} strengths for {len(locks)} requests. Give one for all, or one each.")
        checked = [None if strength is None else check_strength(strength) for strength in each]
        return locks, [
            0.0 if lock == -1 else strength_for(self.locks[lock], strength)
            for lock, strength in zip(locks, checked, strict=True)
        ]

    def _write(self, name: str, table: torch.Tensor) -> None:
        """Write a part of the assignment to the buffer that the layers of each device have in common."""
        common: dict[torch.device, torch.Tensor] = {}
        for _, _, _, locked in self._placed:
            device = locked.weight.device
            if device not in common:
                there = locked.get_buffer(name)
                common[device] = there.copy_(table) if there.shape == table.shape else table.to(device)
            if locked.get_buffer(name) is not common[device]:
                setattr(locked, name, common[device])

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


def _check_free(model: nn.Module) -> None:
    """That a model has no lock yet."""
    if any(isinstance(module, LockedLinear) for module in model.modules()):
        raise FastlockError(f"{type(model).__name__} has locks per request already: remove() them first.")
    if receipt_of(model) is not None:
        raise FastlockError(
            f"{type(model).__name__} is relocked: its lock would act in every request, beside the request's own. "
            "Unlock it first."
        )
