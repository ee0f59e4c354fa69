"""The op `fastlock::locked_linear`: its schema, its implementations, and its gradients."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastlock.errors import FastlockError
from fastlock.kernels.locked_linear.launch import locked_linear as by_fastest
from fastlock.kernels.locked_linear.reference import Inputs, by_torch
from fastlock.locks.lock import check_strength

_LIBRARY: Any = torch.library.Library("fastlock", "FRAGMENT")
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

    torch.compile can trace it, a CUDA graph can capture it, and it has gradients for x, weight and bias. On a CUDA
    device the first call for a shape times the ways to compute it (`fastlock.kernels.locked_linear`).

    Args:
        x: [..., width] of the weight's dtype.
        weight: W, [hidden, width], float16, bfloat16, float32 or float64; width = num_heads * head_dim.
        bias: c, [hidden] of the weight's dtype, or None.
        heads: the column of `slots` for each head, -1 where no lock shifts it; [num_heads] int32.
        slots: the row of `values` for each lock and column, -1 if the lock spares that head; [num_locks, k] int32.
        values: displacements at strength 1, [n, head_dim] float32.
        folds: W d of each lock at strength 1, [num_locks, hidden] float32.
        lock_of_row: the lock of each entry, -1 for none; [entries] int32. Each entry serves rows / entries consecutive
            rows of x: for [batch, length, width], give one per request.
        strength_of_row: the strength of each entry, [entries] float32.

    Returns:
        y, [..., hidden] of x's dtype, under autocast too; contiguous.

    Raises:
        FastlockError: a shape, dtype or device is not as described; on a CPU also: there is no such lock, or a strength
            cannot be applied. Elsewhere nobody waits for the device: such rows, and W's gradient, become NaN.
    """
    y: torch.Tensor = torch.ops.fastlock.locked_linear(
        x, weight, bias, heads, slots, values, folds, lock_of_row, strength_of_row
    )
    return y


_NOTHING = contextlib.nullcontext()


def _op_on(compute: Callable[[Inputs], torch.Tensor]) -> Callable[..., torch.Tensor]:
    def op(x: torch.Tensor, *others: Any) -> torch.Tensor:
        inputs = Inputs(x.reshape(-1, x.shape[-1]), *others)
        _check(inputs)
        device = x.device.type
        autocast = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _NOTHING
        with autocast:
            return compute(inputs).view(*x.shape[:-1], inputs.weight.shape[0])

    return op


def _on_cpu(inputs: Inputs) -> torch.Tensor:
    lock, strength = inputs.lock_of_row, inputs.strength_of_row
    if (absent := (lock < -1) | (lock >= len(inputs.slots))).any():
        check_lock_id(int(lock[absent][0]), len(inputs.slots))
    if (wrong := ~((strength >= 0) & strength.isfinite())).any():
        check_strength(float(strength[wrong][0]))
    return by_torch(inputs)


def _fake(x: torch.Tensor, weight: torch.Tensor, *others: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, bias, heads, slots, values, _, lock_of_row, strength_of_row = inputs
    # The next assignment is written to the same memory, maybe before the gradients are computed.
    ctx.save_for_backward(x, weight, heads, slots, values, lock_of_row.clone(), strength_of_row.clone())
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
    """The displacement of each entry at strength 1, [entries, width] float32; NaN where there is no such lock."""
    slot = slots[lock_of_row.clamp(0, len(slots) - 1)][:, heads.clamp(min=0)]  # [entries, num_heads]
    shifted = (lock_of_row >= 0)[:, None] & (heads >= 0) & (slot >= 0)
    d = torch.where(shifted[..., None], values[slot.clamp(min=0)], 0.0).flatten(1)
    absent = (lock_of_row < -1) | (lock_of_row >= len(slots))
    return torch.where(absent[:, None], torch.nan, d)


def _check(inputs: Inputs) -> None:
    """Refuse shapes, dtypes and devices that are not as `locked_linear` says."""
    x, weight, values = inputs.x, inputs.weight, inputs.values
    if weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise FastlockError(f"x has {x.shape[1]} columns, but the weight is {list(weight.shape)}; they must agree.")
    hidden, width = weight.shape
    if x.dtype != weight.dtype or not x.dtype.is_floating_point:
        raise FastlockError(
            f"x is {x.dtype}, but the weight is {weight.dtype}; both must be of one floating-point dtype."
        )
    if inputs.bias is not None:
        _check_tensor("bias", inputs.bias, (hidden,), x.dtype, x.device)
    if values.dim() != 2 or inputs.slots.dim() != 2 or 0 in (*values.shape, *inputs.slots.shape):
        raise FastlockError(
            f"values is {list(values.shape)} and slots is {list(inputs.slots.shape)}; both must be tables that are not "
            "empty."
        )
    if width % inputs.head_dim:
        raise FastlockError(
            f"the weight has {width} columns, which cannot be divided into heads of {inputs.head_dim}, as values says."
        )
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
            f"x has {inputs.rows} rows, but locks were assigned to {entries} requests: the rows cannot be shared out "
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


def check_lock_id(lock: Any, num_locks: int) -> int:
    """The number of a lock, or -1 for none, as an int.

    Raises:
        FastlockError: there is no such lock.
    """
    try:
        number = -2 if isinstance(lock, bool) else operator.index(lock)
    except TypeError:
        number = -2
    if not -1 <= number < num_locks:
        raise FastlockError(f"lock {lock!r} was assigned; give a number from 0 to {num_locks - 1}, or -1 for no lock.")
    return number


_LIBRARY.impl("locked_linear", _op_on(by_torch), "CompositeExplicitAutograd")  # MPS, XPU and whatever comes
_LIBRARY.impl("locked_linear", _op_on(_on_cpu), "CPU")
_LIBRARY.impl("locked_linear", _op_on(by_fastest), "CUDA")
torch.library.register_fake("fastlock::locked_linear", _fake, lib=_LIBRARY)
torch.library.register_autograd("fastlock::locked_linear", _backward, setup_context=_keep_for_backward, lib=_LIBRARY)
