"""The few functions of the CUDA driver that launching a cubin takes, by ctypes, with every result checked.

Nothing is initialised here: cuInit and the devices' primary contexts are torch's, and are only used.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from typing import Any

from fastlock.errors import FastlockError, UnsupportedError

# As cuda.h declares them, without the result, which is always a CUresult; under the names of the library, which end in
# _v2 where cuda.h renames. tests/kernels/ahead_of_time/test_driver.py compares them with a cuda.h.
PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxGetCurrent": (POINTER(c_void_p),),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuModuleLoadData": (POINTER(c_void_p), c_void_p),
    "cuModuleUnload": (c_void_p,),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuFuncGetAttribute": (POINTER(c_int), c_int, c_void_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuLaunchKernel": (c_void_p, *(c_uint,) * 7, c_void_p, POINTER(c_void_p), POINTER(c_void_p)),
}
# Only in drivers of CUDA 12.4 and later.
LATER_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cuFuncGetParamInfo": (c_void_p, c_size_t, POINTER(c_size_t), POINTER(c_size_t)),
}

INVALID_VALUE = 1
DEVICE_INTEGRATED = 18
DEVICE_MAJOR, DEVICE_MINOR = 75, 76
FUNCTION_MAX_THREADS = 0
FUNCTION_MAX_DYNAMIC_SHARED = 8


# CUresults that another try may do without: there was no memory, the device was taken, a CUDA graph was being captured.
PASSING = frozenset({2, 46, *range(900, 910)})


class DriverError(FastlockError):
    """A function of the CUDA driver returned an error.

    Attributes:
        status: the CUresult.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status

    @property
    def passing(self) -> bool:
        """Whether another try may do without it."""
        return self.status in PASSING


def open_library() -> Any:
    """The driver's library, which torch has opened already.

    Raises:
        OSError: there is none.
    """
    return ctypes.CDLL("libcuda.so.1")


class Driver:
    """The driver's functions, as Python would have them. Each raises DriverError if the driver returns an error.

    Args:
        library: has the functions of PROTOTYPES.

    Raises:
        UnsupportedError: it lacks one of them.
    """

    def __init__(self, library: Any) -> None:
        self._functions: dict[str, Callable[..., int]] = {}
        for name, arguments in (PROTOTYPES | LATER_PROTOTYPES).items():
            function = getattr(library, name, None)
            if function is not None:
                function.argtypes, function.restype = arguments, c_int
                self._functions[name] = function
            elif name in PROTOTYPES:
                raise UnsupportedError(f"the CUDA driver has no {name}")

    def function_named(self, name: str) -> Callable[..., int]:
        """The function itself, for the calls that must be quick; give its result to `check`."""
        return self._functions[name]

    def check(self, name: str, status: int) -> None:
        """Raise what a non-zero result of the function `name` means."""
        if status:
            words = " ".join(self._text(kind, status) for kind in ("cuGetErrorName", "cuGetErrorString"))
            raise DriverError(
                f"{name}: {words.strip() or 'an error that the driver has no name for'} ({status})", status
            )

    def version(self) -> tuple[int, int]:
        """The newest CUDA version that the driver supports, such as (12, 8)."""
        number = self._number("cuDriverGetVersion")
        return number // 1000, number % 1000 // 10

    def device(self, index: int) -> int:
        """The device of torch's index."""
        return self._number("cuDeviceGet", index)

    def capability(self, device: int) -> tuple[int, int]:
        """The compute capability of a device, such as (9, 0)."""
        return self._attribute(device, DEVICE_MAJOR), self._attribute(device, DEVICE_MINOR)

    def integrated(self, device: int) -> bool:
        """Whether the device shares the host's memory, as Tegra does."""
        return bool(self._attribute(device, DEVICE_INTEGRATED))

    def primary_context(self, device: int) -> int:
        """The context that torch uses on a device. It stays retained until the process ends, as torch's own does."""
        return self._handle("cuDevicePrimaryCtxRetain", device)

    @contextlib.contextmanager
    def current(self, context: int) -> Iterator[None]:
        """The context is this thread's current one inside the `with` block."""
        self._call("cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", byref(c_void_p()))

    def load_module(self, image: bytes) -> int:
        """Load a cubin into the current context."""
        return self._handle("cuModuleLoadData", image)

    def unload_module(self, module: int) -> None:
        """Unload it again."""
        self._call("cuModuleUnload", module)

    def function_of(self, module: int, name: str) -> int:
        """A kernel of a module."""
        return self._handle("cuModuleGetFunction", module, name.encode())

    def max_threads(self, function: int) -> int:
        """How many threads a block of this kernel may have. Asking makes the driver load it, if it has not yet."""
        return self._number("cuFuncGetAttribute", FUNCTION_MAX_THREADS, function)

    def allow_shared(self, function: int, shared: int) -> None:
        """Let the kernel have more dynamic shared memory than the 48 KiB that it may have without asking."""
        self._call("cuFuncSetAttribute", function, FUNCTION_MAX_DYNAMIC_SHARED, shared)

    def parameters(self, function: int) -> list[tuple[int, int]] | None:
        """Offset and size in bytes of each parameter of a kernel; None if the driver is too old to tell."""
        if "cuFuncGetParamInfo" not in self._functions:
            return None
        parameters: list[tuple[int, int]] = []
        while True:
            offset, size = c_size_t(), c_size_t()
            status = self._functions["cuFuncGetParamInfo"](function, len(parameters), byref(offset), byref(size))
            if status == INVALID_VALUE:  # there is no further one
                return parameters
            self.check("cuFuncGetParamInfo", status)
            parameters.append((offset.value, size.value))

    def _call(self, name: str, *arguments: Any) -> None:
        self.check(name, self._functions[name](*arguments))

    def _number(self, name: str, *arguments: Any) -> int:
        """The int that the function writes to its first argument."""
        number = c_int()
        self._call(name, byref(number), *arguments)
        return number.value

    def _handle(self, name: str, *arguments: Any) -> int:
        """The pointer that the function writes to its first argument."""
        handle = c_void_p()
        self._call(name, byref(handle), *arguments)
        if handle.value is None:
            raise FastlockError(f"{name} returned a null pointer and no error")
        return handle.value

    def _attribute(self, device: int, attribute: int) -> int:
        return self._number("cuDeviceGetAttribute", attribute, device)

    def _text(self, name: str, status: int) -> str:
        text = c_char_p()
        failed = self._functions[name](status, byref(text))
        return "" if failed or text.value is None else text.value.decode(errors="replace")
