"""Every operator of torch on the fake GPU: the CPU's, on the same memory."""

import functools
import warnings

import torch
from torch.utils._pytree import tree_map

from tests.helpers.fake_gpu import memory

# They need no kernel of a device, and what they give is to be wrapped once more.
OWN = ("aten::detach", "aten::view.dtype")
# They take tensors of the host beside those of the device: copies, and indices.
MIXED = ("copy_", "_to_copy", "_copy_from", "index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
BACKENDS = ("CPU", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")


class State:
    """Of the one GPU.

    Attributes:
        capturing: the steps of the graph that is being captured: how to compute each again, and what it gave.
        asleep: whether the device was told to sleep, and nobody waited for it since.
    """

    capturing: "list[tuple] | None" = None
    asleep = False


def register() -> torch.library.Library:
    """Run all operators that have a kernel for the CPU. They are gone with what is returned."""
    library = torch.library.Library("aten", "IMPL")
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of the composite kernels are there for CUDA as well
        for name in torch._C._dispatch_get_all_op_names():
            if name.startswith("aten::") and name not in OWN and any(has(name, backend) for backend in BACKENDS):
                packet, _, overload = name.removeprefix("aten::").partition(".")
                op = getattr(getattr(torch.ops.aten, packet), overload or "default")
                library.impl(name, functools.partial(run, op), "CUDA")
    return library


def on_host(value):
    """The host's view of a tensor on the fake GPU; anything else as it is."""
    return memory.on(memory.CPU, value) if isinstance(value, torch.Tensor) and value.is_cuda else value


def on_gpu(value, base=None):
    """A result on the host, as one on the fake GPU, in the storage of what it is a view of; or what is no tensor."""
    if not isinstance(value, torch.Tensor):
        return value
    if base is None or base.dtype != value.dtype:
        return memory.on(memory.CUDA, value)
    offset = (value.data_ptr() - base.data_ptr()) // base.itemsize
    return torch.ops.inductor._reinterpret_tensor(base, value.shape, value.stride(), offset)


def run(op, *arguments, **options):
    """One operator whose arguments or result are on the fake GPU."""
    check_devices(op, arguments)
    device = options.get("device") or torch.device("cuda")
    check_capture(op, arguments, device)
    if "device" in options:
        options = {**options, "device": torch.device("cpu"), "pin_memory": False}
    host_arguments, host_options = tree_map(on_host, (arguments, options))

    def compute():
        return op(*host_arguments, **host_options)

    results = compute()
    returns = op._schema.returns
    if any(result.alias_info is not None and result.alias_info.is_write for result in returns):
        written = [options[argument.name] for argument in op._schema.arguments if argument.is_out]
        results = arguments[0] if not written else written[0] if len(written) == 1 else written
    elif device.type == "cuda":
        base = arguments[0] if any(result.alias_info is not None for result in returns) else None
        results = tree_map(functools.partial(on_gpu, base=base), results)
    if State.capturing is not None:
        State.capturing.append((compute, results))
    return results


def check_devices(op, arguments) -> None:
    """As on a GPU: no tensor of the host among the device's, but for numbers, copies and indices."""
    tensors = [one for one in arguments if isinstance(one, torch.Tensor)]
    hosts = [one for one in tensors if one.device.type == "cpu" and one.dim()]
    if hosts and len(hosts) < len(tensors) and op._schema.name.removeprefix("aten::") not in MIXED:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {op} found cuda:0 and cpu.")


def check_capture(op, arguments, device) -> None:
    """Of a graph: nothing is waited for, nor (from torch 2.11 on) copied from memory of the host that is not pinned."""
    if State.capturing is None:
        return
    if op._schema.name == "aten::_local_scalar_dense":
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
    if op._schema.name not in ("aten::copy_", "aten::_to_copy"):
        return
    source, target = (arguments[1], arguments[0].device) if op._schema.name == "aten::copy_" else (arguments[0], device)
    if target.type != source.device.type and not getattr(source, "fake_pinned", False):
        raise RuntimeError(
            "Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the CPU tensor is pinned."
        )
