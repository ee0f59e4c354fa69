"""Tensors that share memory across devices: a CUDA tensor of the fake GPU lies in the host's memory.

By DLPack (dlpack.h, version 0), which is how torch takes a tensor on a device from somebody else.
"""

import atexit
import ctypes

import torch

CPU, CUDA = 1, 2
INT, UINT, FLOAT, BFLOAT, COMPLEX, BOOL = 0, 1, 2, 4, 5, 6
KINDS = {
    **dict.fromkeys((torch.int8, torch.int16, torch.int32, torch.int64), INT),
    torch.uint8: UINT,
    **dict.fromkeys((torch.float16, torch.float32, torch.float64), FLOAT),
    torch.bfloat16: BFLOAT,
    **dict.fromkeys((torch.complex64, torch.complex128), COMPLEX),
    torch.bool: BOOL,
}


class Array(ctypes.Structure):
    """DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32),
        ("index", ctypes.c_int32),
        ("dims", ctypes.c_int32),
        ("kind", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
    )


class Managed(ctypes.Structure):
    """DLManagedTensor."""


Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(Managed))
Managed._fields_ = (("array", Array), ("context", ctypes.c_void_p), ("deleter", Deleter))
capsule = ctypes.pythonapi.PyCapsule_New
capsule.restype, capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)

# What each tensor made here needs for as long as torch has it, its memory's owner included.
held: dict[int, tuple[Managed, object]] = {}


@Deleter
def _let_go(managed) -> None:
    held.pop(ctypes.addressof(managed.contents), None)


@atexit.register
def _never_mind() -> None:
    """Tensors that outlive Python must not call it."""
    for managed, _ in held.values():
        managed.deleter = Deleter()


def on(device: int, tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, as a tensor on the CPU or on the fake GPU."""
    dims = ctypes.c_int64 * tensor.dim()
    shape, strides = dims(*tensor.shape), dims(*tensor.stride())
    array = Array(tensor.data_ptr(), device, 0, tensor.dim(), KINDS[tensor.dtype], 8 * tensor.itemsize, 1)
    array.shape, array.strides = shape, strides
    managed = Managed(array, None, _let_go)
    held[ctypes.addressof(managed)] = managed, (tensor, shape, strides)
    return torch.utils.dlpack.from_dlpack(capsule(ctypes.addressof(managed), b"dltensor", None))
