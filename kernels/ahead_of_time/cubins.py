"""The kernels that were compiled ahead of time: which fits a device, and launching it without Triton or a compiler.

`build` writes them, and the manifest that describes them, to the folder `cubins` beside this file. Whatever is not as
the manifest says, or does not fit the device or its driver, means Triton's JIT instead, and a reason to tell.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
import threading
from collections.abc import Sequence
from ctypes import byref, c_uint64, c_void_p
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fastlock.errors import FastlockError
from fastlock.kernels.ahead_of_time import driver

FOLDER = Path(__file__).parents[1] / "cubins"
MANIFEST = "manifest.json"
FORMAT = 1
# Set to 0, no cubin is built, or used.
SWITCH = "FASTLOCK_CUBINS"
# A cubin is made from these files, and launched by what they say: from others it is not the same kernel.
SOURCES = ("fold/variants.py", "fold/launch.py", "fold/triton_kernel.py")
# The kernel's own arguments: addresses of the sites, heads, values and flags. Triton adds addresses of scratch memory.
ARGUMENTS = 4
ADDRESS_BYTES = 8
ALIGNMENT = 16
FREE_SHARED = 48 * 1024


@dataclass(frozen=True)
class Cubin:
    """What the manifest says of one file.

    Attributes:
        variant: the `fold.Variant`'s name.
        target: what ptxas compiled for, such as sm_80 or sm_90a.
        file: its name in the manifest's folder.
        sha256: of the file.
        kernel: the kernel's name in it.
        parameters: (offset, size) in bytes of each of the kernel's parameters.
        shared: bytes of dynamic shared memory of one block.
        num_warps: of one block.
        registers: of one thread.
        ptxas: version of the assembler, such as 12.8.
    """

    variant: str
    target: str
    file: str
    sha256: str
    kernel: str
    parameters: tuple[tuple[int, int], ...]
    shared: int
    num_warps: int
    registers: int
    ptxas: str


@dataclass(frozen=True)
class Manifest:
    """What `build` made.

    Attributes:
        triton: version of the compiler.
        sources: digest of SOURCES, see `digest_of_sources`.
        cubins: the files.
    """

    triton: str
    sources: str
    cubins: tuple[Cubin, ...]

    def to_json(self) -> str:
        """The text of the manifest file: a line for each cubin."""
        facts = {"format": FORMAT, "triton": self.triton, "sources": self.sources}
        lines = ",\n".join(json.dumps(asdict(cubin)) for cubin in self.cubins)
        return f'{json.dumps(facts)[:-1]}, "cubins": [\n{lines}\n]}}\n'


@dataclass(frozen=True)
class Choice:
    """How a variant is launched on a device.

    Attributes:
        kernel: the loaded cubin, or None for Triton's JIT.
        reason: why, in words that can follow "because".
    """

    kernel: Kernel | None
    reason: str


def read_manifest(folder: Path, variant: str | None = None) -> Manifest:
    """The manifest of a folder; of one variant only, if it is named, as to check 200 cubins takes a millisecond.

    Raises:
        FastlockError: there is none, or it is not one of this version's.
    """
    try:
        data = json.loads((folder / MANIFEST).read_bytes())
        if data.pop("format") != FORMAT:
            raise ValueError("another format")
        described = data.pop("cubins")
        cubins = tuple(cubin_of(fields) for fields in described if variant in (None, fields["variant"]))
        manifest = Manifest(cubins=cubins, **data)
        if not isinstance(manifest.triton, str) or not isinstance(manifest.sources, str):
            raise TypeError("triton and sources must be text")
    except FileNotFoundError:
        raise FastlockError("this installation has no cubins") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise FastlockError(f"the manifest of the cubins can't be read ({error})") from None
    return manifest


def cubin_of(fields: dict[str, Any]) -> Cubin:
    """A cubin from its JSON, checked: a launch goes by these numbers, and a file is opened by this name.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: that is not how `build` describes a cubin.
    """
    parameters = tuple((int(offset), int(size)) for offset, size in fields["parameters"])
    cubin = Cubin(**fields | {"parameters": parameters})
    texts = (cubin.variant, cubin.target, cubin.file, cubin.sha256, cubin.kernel, cubin.ptxas)
    numbers = (cubin.shared, cubin.num_warps, cubin.registers)
    addresses = tuple((ADDRESS_BYTES * i, ADDRESS_BYTES) for i in range(len(cubin.parameters)))
    sound = (
        all(isinstance(text, str) for text in texts)
        and all(type(number) is int for number in numbers)
        and re.fullmatch(r"[\w.-]+", cubin.file)
        and re.fullmatch(r"\d+\.\d+", cubin.ptxas)
        and len(cubin.parameters) >= ARGUMENTS
        and cubin.parameters == addresses
        and cubin.shared >= 0
        and 1 <= cubin.num_warps <= 32
    )
    if not sound:
        raise ValueError(f"{cubin.file!r} is described wrongly")
    return cubin


def digest_of_sources(folder: Path | None = None) -> str:
    """sha256 over SOURCES, in hexadecimal; of the running version's, or of those in a folder.

    Raises:
        OSError: a source is not there.
    """
    sha = hashlib.sha256()
    for name in SOURCES:
        content = ((folder or Path(__file__).parents[1]) / name).read_bytes()
        sha.update(f"{name} {len(content)}\n".encode() + content)
    return sha.hexdigest()


def runs_on(target: str, capability: tuple[int, int], integrated: bool = False) -> bool:
    """Whether a cubin for `target` runs on a device.

    CUDA C++ Programming Guide, "Binary Compatibility": a cubin for X.y runs on X.z with z >= y, not across major
    versions, and not between desktop and Tegra, whose GPUs are integrated. "Feature Availability": one with the
    architecture-specific features, for X.ya, runs on X.y alone; Triton compiles for sm_90a, sm_100a and sm_120a. The
    family-specific (X.yf), which it does not compile, are taken for such ones.
    """
    match = re.fullmatch(r"sm_(\d+)(\d)([af]?)", target)
    if match is None:
        return False
    compiled_for = int(match[1]), int(match[2])
    if match[3] or integrated:
        return compiled_for == capability
    return compiled_for[0] == capability[0] and compiled_for[1] <= capability[1]


def choose(variant: str, index: int) -> Choice:
    """How a variant is launched on torch's CUDA device `index`; found out once a process, device and variant.

    Never raises: whatever is in the way of a cubin is the reason for the JIT.
    """
    try:
        return _choices[index, variant]
    except KeyError:
        pass
    with _lock:
        if (index, variant) not in _choices:
            try:
                kernel = _load(variant, index)
                choice = Choice(kernel, f"a cubin for {kernel.cubin.target} fits it")
            except (FastlockError, OSError) as error:
                choice = Choice(None, str(error))
            _choices[index, variant] = choice
        return _choices[index, variant]


def choices(index: int) -> list[Choice]:
    """The choice of every variant that the manifest has, each of them loaded; or, if there is none, the reason."""
    try:
        variants = dict.fromkeys(cubin.variant for cubin in _usable_manifest().cubins)
    except (FastlockError, OSError) as error:
        return [Choice(None, str(error))]
    return [choose(variant, index) for variant in variants] or [Choice(None, "the manifest lists no cubin")]


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
            addresses: of the sites, heads, values and flags, multiples of ALIGNMENT.

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
        self._device = torch.device("cuda", kernel.index)
        self._context = kernel.context
        self._current = kernel.driver.function_named("cuCtxGetCurrent")
        self._launch = kernel.driver.function_named("cuLaunchKernel")
        # The scratch that Triton's own launcher passes behind the arguments: null, as none of ours asks for any.
        scratch = len(kernel.cubin.parameters) - ARGUMENTS
        self._values = (c_uint64 * len(kernel.cubin.parameters))(*addresses, *(0,) * scratch)
        start = ctypes.addressof(self._values)
        places = [start + ADDRESS_BYTES * i for i in range(len(self._values))]
        self._before_stream = (kernel.function, *grid, 32 * kernel.cubin.num_warps, 1, 1, kernel.cubin.shared)
        self._parameters = (c_void_p * len(places))(*places)

    def __call__(self) -> None:
        if os.getpid() != self._process:
            raise forked()
        stream = _current_stream(self._device)
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
                f"the fold was not launched, or an earlier kernel failed: {error}. Set {SWITCH}=0 and start again to "
                "launch it by Triton's JIT."
            ) from None


def forked() -> FastlockError:
    """What to say in a process that was forked from the one that made a launch ready."""
    return FastlockError(
        "this process was forked from one that used CUDA, and CUDA does not work after a fork. Start it with "
        'multiprocessing\'s "spawn" method.'
    )


def _current_stream(device: torch.device) -> int:
    """The handle of torch's current stream on a device."""
    return torch.cuda.current_stream(device).cuda_stream


_choices: dict[tuple[int, str], Choice] = {}
_lock = threading.Lock()


def forget() -> None:
    """Forget all that was found out and loaded; nothing is unloaded, as a launch may still hold it."""
    global _lock  # noqa: PLW0603 - after a fork, another thread may have held it
    _lock = threading.Lock()
    _choices.clear()
    _opened.cache_clear()


@lru_cache(maxsize=1)
def _opened() -> driver.Driver:
    return driver.Driver(driver.open_library())


def _usable_manifest(variant: str | None = None) -> Manifest:
    """The manifest, if the cubins are of this version and may be used."""
    if os.environ.get(SWITCH) == "0":
        raise FastlockError(f"{SWITCH}=0 is set")
    if interpreting():
        raise FastlockError("TRITON_INTERPRET is set")
    manifest = read_manifest(FOLDER, variant)
    if manifest.sources != digest_of_sources():
        raise FastlockError("the cubins were built from other sources than are installed")
    return manifest


def interpreting() -> bool:
    """Whether the user asks for Triton's interpreter, in Triton's words for yes."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")


def _load(variant: str, index: int) -> Kernel:
    cubins = _usable_manifest(variant).cubins
    if not cubins:
        raise FastlockError(f"there is no cubin of {variant}")
    cuda = _opened()
    device = cuda.device(index)
    cubin = _fitting(cubins, cuda.capability(device), cuda.integrated(device))
    needs = int(cubin.ptxas.split(".")[0])
    # CUDA Compatibility, "Minor Version Compatibility": a driver of the toolkit's major version, or a later one.
    if cuda.version()[0] < needs:
        found = ".".join(map(str, cuda.version()))
        raise FastlockError(f"the cubins need a driver for CUDA {needs}, and this one is for CUDA {found}")
    image = (FOLDER / cubin.file).read_bytes()
    if hashlib.sha256(image).hexdigest() != cubin.sha256:
        raise FastlockError(f"{cubin.file} is not the file that the manifest describes")
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


def _fitting(cubins: Sequence[Cubin], capability: tuple[int, int], integrated: bool) -> Cubin:
    """The one of a variant's cubins for a device: of several, that for the highest compute capability."""
    fitting = [cubin for cubin in cubins if runs_on(cubin.target, capability, integrated)]
    if not fitting:
        targets = ", ".join(sorted({cubin.target for cubin in cubins}))
        raise FastlockError(f"no cubin runs on compute capability {'.'.join(map(str, capability))}, only on {targets}")
    return max(fitting, key=lambda cubin: int(re.sub(r"\D", "", cubin.target)))


def _check_function(cuda: driver.Driver, cubin: Cubin, function: int) -> None:
    """The driver sees the kernel that the manifest describes, and lets it have the shared memory it needs."""
    if 32 * cubin.num_warps > cuda.max_threads(function):
        raise FastlockError(f"{cubin.file} does not run with {cubin.num_warps} warps on this device")
    parameters = cuda.parameters(function)
    if parameters is not None and tuple(parameters) != cubin.parameters:
        raise FastlockError(f"the kernel of {cubin.file} has other parameters than the manifest says")
    if cubin.shared > FREE_SHARED:
        cuda.allow_shared(function, cubin.shared)


if hasattr(os, "register_at_fork"):  # CUDA does not survive a fork, and neither do its handles
    os.register_at_fork(after_in_child=forget)
