"""A CUDA driver in Python: real C functions of cuda.h's prototypes, which record every call and run the fold.

What is launched is computed from the addresses that were passed, by a second reading of the table, on the CPU.
"""
# ruff: noqa: N802 - the functions have the driver's own names

import ctypes
import hashlib
import itertools
import threading
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from dataclasses import dataclass, replace

import torch

from fastlock.kernels import launch_paths
from fastlock.kernels.ahead_of_time import cubins, driver, manifest
from fastlock.kernels.ahead_of_time.ways import WAYS, Ways
from fastlock.kernels.fold import launch as fold
from fastlock.kernels.fold import variants

NO_CONTEXT, NOT_FOUND, INVALID_CONTEXT = 0, 500, 201
STREAM = 0x51EA
NAMES = {1: b"CUDA_ERROR_INVALID_VALUE", 209: b"CUDA_ERROR_NO_BINARY_FOR_GPU", 201: b"CUDA_ERROR_INVALID_CONTEXT"}
# Those that cubins hold; the fold's alone is run here.
KERNELS = (b"fold_kernel", b"gate_fold_kernel", b"adapter_fold_kernel", b"step_kernel", b"norm_kernel")
TEXTS = {1: b"invalid argument", 209: b"no kernel image is available for execution on the device"}


class Status(Exception):  # noqa: N818 - not an error of ours
    """What a function of the driver returns instead of 0."""


def check(right: object, otherwise: int) -> None:
    if not right:
        raise Status(otherwise)


@dataclass
class Launch:
    """One cuLaunchKernel, as it arrived in C types."""

    variant: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    stream: int
    parameters: tuple[int, ...]
    context: int
    extra: object


class FakeDriver:
    """The library: has the functions as attributes.

    Attributes:
        capabilities: of each device; `integrated` for all of them.
        version: as cuDriverGetVersion says it.
        fails: name of a function -> the CUresult that it returns.
        parameters: what cuFuncGetParamInfo tells, and how many a launch reads.
        calls: the names of the functions called; `launches` what was launched.
    """

    def __init__(self, capabilities=((9, 0),), version=12080, integrated=False):
        self.capabilities, self.version, self.integrated = capabilities, version, integrated
        self.fails: dict[str, int] = {}
        self.parameters = [(8 * i, 8) for i in range(6)]
        self.max_threads = 1024
        self.calls: list[str] = []
        self.launches: list[Launch] = []
        self.modules: dict[int, bytes] = {}
        self.allowed_shared: dict[int, int] = {}
        self.retained: list[int] = []
        self.broken: list[Exception] = []
        self._stacks = threading.local()
        for name, arguments in {
            "cuGetErrorName": (c_int, POINTER(c_char_p)),
            "cuGetErrorString": (c_int, POINTER(c_char_p)),
            "cuDriverGetVersion": (POINTER(c_int),),
            "cuDeviceGet": (POINTER(c_int), c_int),
            "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
            "cuDevicePrimaryCtxRetain": (POINTER(c_uint64), c_int),
            "cuCtxGetCurrent": (POINTER(c_uint64),),
            "cuCtxPushCurrent_v2": (c_uint64,),
            "cuCtxPopCurrent_v2": (POINTER(c_uint64),),
            "cuModuleLoadData": (POINTER(c_uint64), c_char_p),
            "cuModuleUnload": (c_uint64,),
            "cuModuleGetFunction": (POINTER(c_uint64), c_uint64, c_char_p),
            "cuFuncGetAttribute": (POINTER(c_int), c_int, c_uint64),
            "cuFuncSetAttribute": (c_uint64, c_int, c_int),
            "cuFuncGetParamInfo": (c_uint64, c_size_t, POINTER(c_size_t), POINTER(c_size_t)),
            "cuLaunchKernel": (c_uint64, *(c_uint,) * 7, c_uint64, POINTER(c_uint64), c_void_p),
        }.items():
            setattr(self, name, ctypes.CFUNCTYPE(c_int, *arguments)(self._recorded(name)))

    def _recorded(self, name):
        run = getattr(self, f"_{name.removesuffix('_v2')}")

        def call(*arguments):
            self.calls.append(name)
            try:
                if name not in self.fails:
                    run(*arguments)
                return self.fails.get(name, 0)
            except Status as error:
                return error.args[0]
            except Exception as error:  # which ctypes would only print
                self.broken.append(error)
                return 999

        return call

    @property
    def stack(self):
        """The contexts of this thread."""
        if not hasattr(self._stacks, "contexts"):
            self._stacks.contexts = []
        return self._stacks.contexts

    def _cuGetErrorName(self, status, text):
        check(status in NAMES, 1)
        text[0] = NAMES[status]

    def _cuGetErrorString(self, status, text):
        check(status in TEXTS, 1)
        text[0] = TEXTS[status]

    def _cuDriverGetVersion(self, version):
        version[0] = self.version

    def _cuDeviceGet(self, device, index):
        check(0 <= index < len(self.capabilities), 101)
        device[0] = index + 70  # a handle, not an index

    def _cuDeviceGetAttribute(self, value, attribute, device):
        major, minor = self.capabilities[device - 70]
        value[0] = {75: major, 76: minor, 18: int(self.integrated)}[attribute]

    def _cuDevicePrimaryCtxRetain(self, context, device):
        self.retained.append(device - 70)
        context[0] = context_of(device - 70)

    def _cuCtxGetCurrent(self, context):
        context[0] = self.stack[-1] if self.stack else NO_CONTEXT

    def _cuCtxPushCurrent(self, context):
        self.stack.append(context)

    def _cuCtxPopCurrent(self, context):
        context[0] = self.stack.pop()

    def _cuModuleLoadData(self, module, image):
        check(self.stack, INVALID_CONTEXT)
        module[0] = 0xABC000000 + 16 * len(self.modules)
        self.modules[module[0]] = image

    def _cuModuleUnload(self, module):
        del self.modules[module]

    def _cuModuleGetFunction(self, function, module, name):
        check(name in KERNELS, NOT_FOUND)
        function[0] = module + 1

    def _cuFuncGetAttribute(self, value, attribute, _function):
        assert attribute == 0
        value[0] = self.max_threads

    def _cuFuncSetAttribute(self, function, attribute, value):
        assert attribute == 8
        self.allowed_shared[function] = value

    def _cuFuncGetParamInfo(self, _function, i, offset, size):
        check(i < len(self.parameters), 1)
        offset[0], size[0] = self.parameters[i]

    def _cuLaunchKernel(self, function, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra):
        check(self.stack, INVALID_CONTEXT)
        values = tuple(c_uint64.from_address(parameters[i]).value for i in range(len(self.parameters)))
        variant = self.modules[function - 1].decode()
        self.launches.append(
            Launch(variant, (gx, gy, gz), (bx, by, bz), shared, stream or 0, values, self.stack[-1], extra)
        )
        run_fold(BY_NAME[variant], values[:4], (gx, gy, gz))


BY_NAME = {
    variant.name: variant
    for dtype, transposed, head_dim, aligned in itertools.product(
        variants.DTYPES, (False, True), (32, 64, 80, 96, 112, 128, 160, 192, 256), (True, False)
    )
    for variant in [variants.default_variant(dtype, dtype, head_dim, transposed, aligned)]
}


def context_of(index: int) -> int:
    return 0xC0DE0000 + 64 * index


def at(address: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory as a tensor, [count]."""
    if count == 0:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(address), dtype=dtype)


def run_fold(variant: variants.Variant, addresses: tuple[int, ...], grid: tuple[int, int, int]) -> None:
    """What the kernel does, in float64, by the rows that the grid reaches."""
    sites = grid[1] * grid[2]
    table = at(addresses[0], sites * 8, torch.int64).view(-1, 8)
    counts = table[:, 5] & 0xFFFFFFFF
    heads = at(addresses[1], int((table[:, 4] + counts).max()), torch.int64).tolist()
    values = at(addresses[2], len(heads) * variant.head_dim, torch.float32).view(-1, variant.head_dim)
    flags = at(addresses[3], 1 + sites, torch.int32)
    for stride, hidden, head, next_head, first, count_and_site, bias, out in table.tolist():
        site, count = divmod(count_and_site, 1 << 32)
        assert [head, next_head][:count] == heads[first : first + count][:2]
        b = torch.zeros(hidden, dtype=torch.float64)
        for i in range(first, first + count):
            lines, length = (variant.head_dim, hidden) if variant.transposed else (hidden, variant.head_dim)
            read = at(heads[i], (lines - 1) * stride + length, variant.dtype)
            weight = read.as_strided((lines, length), (stride, 1)).double()
            b += (weight.t() if variant.transposed else weight) @ values[i].double()
        if bias:
            b += at(bias, hidden, variant.dtype).double()
        rows = min(hidden, grid[0] * variant.block_rows)
        result = at(out, hidden, variant.out_dtype)[:rows]
        result[:] = b[:rows].to(variant.out_dtype)
        if not result.isfinite().all():
            flags[0] = flags[1 + site] = 1


def describe(variant: variants.Variant, target: str = "sm_90a", **changes: object) -> manifest.Cubin:
    """A cubin of the manifest whose file is the variant's name."""
    made = manifest.Cubin(
        variant=variant.name,
        target=target,
        file=f"{variant.name}-{target}.cubin",
        sha256=hashlib.sha256(variant.name.encode()).hexdigest(),
        kernel="fold_kernel",
        parameters=tuple((8 * i, 8) for i in range(6)),
        shared=1024,
        num_warps=variant.num_warps,
        registers=64,
        ptxas="12.8",
    )
    return replace(made, **changes)


def write_folder(folder, described) -> None:
    """A folder of cubins, each of which holds its variant's name."""
    folder.mkdir(exist_ok=True)
    for cubin in described:
        (folder / cubin.file).write_text(cubin.variant)
    everything = manifest.Manifest("3.7.1", manifest.digest_of_sources(), tuple(described))
    (folder / manifest.MANIFEST).write_text(everything.to_json())


def install(monkeypatch, folder, library: FakeDriver, checked: bool = False) -> None:
    """From now on what is on the CPU counts as on the fake driver's device 0, and `folder` holds the cubins.

    Unless `checked`, launches are not checked before: each is one that the test asked for.
    """
    monkeypatch.setattr(cubins, "interpreting", lambda: False)
    monkeypatch.setattr(cubins.LOADER, "folder", folder)
    monkeypatch.setattr(cubins, "current_stream", lambda index: STREAM + index)
    monkeypatch.setattr(driver, "open_library", lambda: library)
    monkeypatch.setattr(fold, "cuda_index", lambda device: 0)
    monkeypatch.setattr(launch_paths, "device_of", lambda index: torch.device("cpu"))
    cubins.LOADER.forget()
    fresh = Ways()
    for name in ("_good", "_bad", "_lock"):
        monkeypatch.setattr(WAYS, name, getattr(fresh, name))
    if not checked:
        monkeypatch.setattr(WAYS, "is_good", lambda kernel, index, way: True)
