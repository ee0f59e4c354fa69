"""Launching a kernel that was compiled ahead of time, without Triton or a compiler, where one fits the device.

Whatever is not as the manifest says, or does not fit the device or its driver, means Triton's JIT instead, and a reason
that can be told.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import threading
from collections.abc import Callable, Sequence
from ctypes import byref, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path

import torch

from fastlock.errors import DamagedError, FastlockError, UnsupportedError
from fastlock.kernels.ahead_of_time import driver
from fastlock.kernels.ahead_of_time.manifest import (
    ADDRESS_BYTES,
    ARGUMENTS,
    FOLDER,
    Cubin,
    Manifest,
    digest_of_sources,
    read_manifest,
)

# Set to 0, no cubin is built, or used.
SWITCH = "FASTLOCK_CUBINS"
ALIGNMENT = 16
FREE_SHARED = 48 * 1024


@dataclass(frozen=True)
class Choice:
    """How a variant is launched on a device.

    Attributes:
        kernel: the loaded cubin, or None for Triton's JIT.
        reason: why, in words that can follow "because".
    """

    kernel: Kernel | None
    reason: str


class Loader:
    """The kernels of this process: loaded once a device and variant, or left to the JIT, with the reason.

    Attributes:
        folder: where the manifest and the cubins are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.forget()

    def forget(self) -> None:
        """Start anew; nothing is unloaded, as a launch may still hold it."""
        self._lock = threading.Lock()  # after a fork, another thread may have held the old one
        self._choices: dict[tuple[int, str], Choice] = {}
        self._driver: driver.Driver | None = None

    def choose(self, variant: str, index: int) -> Choice:
        """How a variant is launched on torch's CUDA device `index`.

        Never raises: whatever prevents a cubin is the reason for the JIT; only this once, if it will pass (memory had
        run out, say).
        """
        try:
            return self._choices[index, variant]
        except KeyError:
            pass
        with self._lock:
            if (index, variant) in self._choices:
                return self._choices[index, variant]
            choice, passing = self._found_out(variant, index)
            if not passing:
                self._choices[index, variant] = choice
            return choice

    def choices(self, index: int) -> list[Choice]:
        """The choice for every variant in the manifest, each of them loaded; or, without one, the reason."""
        try:
            variants = dict.fromkeys(cubin.variant for cubin in self._usable_manifest().cubins)
        except (FastlockError, OSError) as error:
            return [Choice(None, str(error))]
        return [self.choose(variant, index) for variant in variants] or [Choice(None, "the manifest lists no cubin")]

    def _found_out(self, variant: str, index: int) -> tuple[Choice, bool]:
        """The choice, and whether another try may give another one."""
        try:
            kernel = self._load(variant, index)
        except (FastlockError, OSError) as error:
            return Choice(None, str(error)), isinstance(error, driver.DriverError) and error.passing
        return Choice(kernel, f"a cubin for {kernel.cubin.target} fits it"), False

    def _load(self, variant: str, index: int) -> Kernel:
        cubins = self._usable_manifest(variant).cubins
        if not cubins:
            raise UnsupportedError(f"there is no cubin of {variant}")
        if self._driver is None:
            self._driver = driver.Driver(driver.open_library())
        cuda = self._driver
        device = cuda.device(index)
        cubin = _fitting(cubins, cuda.capability(device), cuda.integrated(device))
        _check_driver(cubin, cuda.version())
        image = (self.folder / cubin.file).read_bytes()
        if hashlib.sha256(image).hexdigest() != cubin.sha256:
            raise DamagedError(f"{cubin.file} is not the file that the manifest describes")
        context = cuda.primary_context(device)
        with cuda.current(context):
            module = cuda.load_module(image)
            try:
                function = cuda.function_of(module, cubin.kernel)
                _check_function(cuda, cubin, function)
            except FastlockError:
                with contextlib.suppress(FastlockError):
                    cuda.unload_module(module)
                raise
        return Kernel(cuda, cubin, index, context, function)

    def _usable_manifest(self, variant: str | None = None) -> Manifest:
        """The manifest, if its cubins belong to this version and may be used."""
        if os.environ.get(SWITCH) == "0":
            raise FastlockError(f"{SWITCH}=0 is set")
        if interpreting():
            raise FastlockError("TRITON_INTERPRET is set")
        manifest = read_manifest(self.folder, variant)
        if manifest.sources != digest_of_sources():
            raise DamagedError("the cubins were built from other sources than are installed")
        return manifest


class Kernel:
    """A cubin's kernel, loaded into the primary context of one device.

    Attributes:
        driver: what loaded it.
        cubin: what it was loaded from.
        index: torch's index of the device.
        context: the device's primary context.
        function: the kernel's handle.
    """

    def __init__(self, loaded_by: driver.Driver, cubin: Cubin, index: int, context: int, function: int) -> None:
        self.driver = loaded_by
        self.cubin = cubin
        self.index = index
        self.context = context
        self.function = function

    def launcher(self, grid: tuple[int, int, int], addresses: Sequence[int]) -> Launch:
        """The launch over a grid with the kernel's ARGUMENTS, as a function of nothing: all is packed here, once.

        Args:
            grid: blocks in x, y and z.
            addresses: of the kernel's tables, multiples of ALIGNMENT.

        Raises:
            FastlockError: the addresses are not those of the kernel's arguments.
        """
        if len(addresses) != ARGUMENTS or any(address % ALIGNMENT for address in addresses):
            raise FastlockError(f"the kernel takes {ARGUMENTS} addresses, multiples of {ALIGNMENT}, not {addresses}.")
        return Launch(self, grid, addresses)


class Launch:
    """One launch, packed. Every call reads the device's current stream, and is checked."""

    def __init__(self, kernel: Kernel, grid: tuple[int, int, int], addresses: Sequence[int]) -> None:
        self._kernel = kernel
        self._process = os.getpid()
        self._index = kernel.index
        self._context = kernel.context
        self._current = kernel.driver.function_named("cuCtxGetCurrent")
        self._launch = kernel.driver.function_named("cuLaunchKernel")
        # The scratch that Triton's own launcher passes after the arguments: null, as none of ours asks for any.
        scratch = len(kernel.cubin.parameters) - ARGUMENTS
        self._values = (c_uint64 * len(kernel.cubin.parameters))(*addresses, *(0,) * scratch)
        start = ctypes.addressof(self._values)
        places = [start + ADDRESS_BYTES * i for i in range(len(self._values))]
        self._before_stream = (kernel.function, *grid, 32 * kernel.cubin.num_warps, 1, 1, kernel.cubin.shared)
        self._parameters = (c_void_p * len(places))(*places)

    def __call__(self) -> None:
        if os.getpid() != self._process:
            raise forked()
        stream = current_stream(self._index)
        context = c_void_p()
        status = self._current(byref(context))
        if status:
            self._kernel.driver.check("cuCtxGetCurrent", status)
        if context.value == self._context:
            self._run(stream)
        else:  # another device's, or a thread that has none yet
            with self._kernel.driver.current(self._context):
                self._run(stream)

    def _run(self, stream: int) -> None:
        status = self._launch(*self._before_stream, stream, self._parameters, None)
        if status:
            self._refused(status)

    def _refused(self, status: int) -> None:
        try:
            self._kernel.driver.check("cuLaunchKernel", status)
        except driver.DriverError as error:
            raise driver.DriverError(
                f"{self._kernel.cubin.variant} was not launched, or an earlier kernel failed: {error}. Set {SWITCH}=0 "
                "and start again to launch it by Triton's JIT.",
                status,
            ) from None


def forked() -> FastlockError:
    """What to say in a process that was forked from the one that prepared a launch."""
    return FastlockError(
        "this process was forked from one that used CUDA, and CUDA does not work after a fork. Start it with "
        'multiprocessing\'s "spawn" method.'
    )


def _slow_current_stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


def _stream_reader() -> Callable[[int], int]:
    """What reads the handle of torch's current stream on the device of an index.

    torch's own function for that makes no object, and is not public: where it is missing, the public one is taken.
    """
    return getattr(torch._C, "_cuda_getCurrentRawStream", _slow_current_stream)


# The handle of torch's current stream on the device of an index.
current_stream = _stream_reader()


def interpreting() -> bool:
    """Whether the user asks for Triton's interpreter, in Triton's words for yes."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")


def runs_on(target: str, capability: tuple[int, int], integrated: bool = False) -> bool:
    """Whether a cubin for `target` runs on a device.

    CUDA C++ Programming Guide, "Binary Compatibility": a cubin for X.y runs on X.z with z >= y, not across major
    versions, and not between desktop and Tegra, whose GPUs are integrated. "Feature Availability": one with the
    architecture-specific features, for X.ya, runs on X.y alone; Triton compiles for sm_90a, sm_100a and sm_120a. The
    family-specific ones (X.yf), which it does not compile, are treated as if they were such.
    """
    match = re.fullmatch(r"sm_(\d+)(\d)([af]?)", target)
    if match is None:
        return False
    compiled_for = int(match[1]), int(match[2])
    if match[3] or integrated:
        return compiled_for == capability
    return compiled_for[0] == capability[0] and compiled_for[1] <= capability[1]


def _fitting(cubins: Sequence[Cubin], capability: tuple[int, int], integrated: bool) -> Cubin:
    """The one of a variant's cubins for a device: of several, that for the highest compute capability."""
    fitting = [cubin for cubin in cubins if runs_on(cubin.target, capability, integrated)]
    if not fitting:
        targets = ", ".join(sorted({cubin.target for cubin in cubins}))
        number = ".".join(map(str, capability))
        raise UnsupportedError(f"no cubin runs on compute capability {number}, only on {targets}")
    return max(fitting, key=lambda cubin: int(re.sub(r"\D", "", cubin.target)))


def _check_driver(cubin: Cubin, version: tuple[int, int]) -> None:
    """CUDA Compatibility, "Minor Version Compatibility": a driver of the toolkit's major version, or a later one."""
    needs = int(cubin.ptxas.split(".")[0])
    if version[0] < needs:
        number = ".".join(map(str, version))
        raise UnsupportedError(f"the cubins need a driver for CUDA {needs}, and this one is for CUDA {number}")


def _check_function(cuda: driver.Driver, cubin: Cubin, function: int) -> None:
    """The driver sees the kernel that the manifest describes, and grants it the shared memory it needs."""
    if 32 * cubin.num_warps > cuda.max_threads(function):
        raise UnsupportedError(f"{cubin.file} does not run with {cubin.num_warps} warps on this device")
    parameters = cuda.parameters(function)
    if parameters is not None and tuple(parameters) != cubin.parameters:
        raise DamagedError(f"the kernel of {cubin.file} has other parameters than the manifest says")
    if cubin.shared > FREE_SHARED:
        cuda.allow_shared(function, cubin.shared)


# Of this process.
LOADER = Loader(FOLDER)

if hasattr(os, "register_at_fork"):  # CUDA does not survive a fork, and neither do its handles
    os.register_at_fork(after_in_child=LOADER.forget)
