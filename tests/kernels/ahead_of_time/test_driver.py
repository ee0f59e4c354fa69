"""The driver's functions by ctypes: their prototypes against NVIDIA's header, and what each result is made of."""

import re
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_void_p
from pathlib import Path

import pytest

from fastlock.errors import FastlockError, UnsupportedError
from fastlock.kernels.ahead_of_time import driver
from tests.helpers import fake_driver

TYPES = {
    "unsigned int": c_uint,
    "int": c_int,
    "size_t": c_size_t,
    "CUresult": c_int,
    "CUdevice": c_int,
    "CUdevice_attribute": c_int,
    "CUfunction_attribute": c_int,
    "CUcontext": c_void_p,
    "CUmodule": c_void_p,
    "CUfunction": c_void_p,
    "CUstream": c_void_p,
    "void *": c_void_p,
    "char *": c_char_p,
}


@pytest.fixture(scope="module")
def header() -> str:
    """The cuda.h that Triton compiles its own launcher with."""
    triton = pytest.importorskip("triton")
    return (Path(triton.__file__).parent / "backends" / "nvidia" / "include" / "cuda.h").read_text()


def declared(header: str, name: str) -> tuple[object, ...] | None:
    """The arguments' types as ctypes; the first declaration is the one outside of comments and of old versions."""
    found = re.search(rf"^CUresult CUDAAPI {name}\((.*?)\);", header, re.MULTILINE | re.DOTALL)
    if found is None:
        return None
    return tuple(as_ctypes(argument) for argument in found[1].split(","))


def as_ctypes(argument: str) -> object:
    words = re.sub(r"\bconst\b", "", argument).strip()
    kind, stars = re.fullmatch(r"((?:unsigned )?\w+)\s*(\**)\s*\w+", words).groups()
    if f"{kind} *" in TYPES and stars:
        kind, stars = f"{kind} *", stars[1:]
    result = TYPES[kind]
    for _ in stars:
        result = POINTER(result)
    return result


@pytest.mark.parametrize("name", [*driver.PROTOTYPES, *driver.LATER_PROTOTYPES])
def test_prototypes_are_those_of_cuda_h(name: str, header: str) -> None:
    base = name.removesuffix("_v2")
    expected = declared(header, base)
    if expected is None:
        assert name in driver.LATER_PROTOTYPES
        pytest.skip(f"this Triton's cuda.h has no {name} yet")
    assert (driver.PROTOTYPES | driver.LATER_PROTOTYPES)[name] == expected
    renamed = re.search(rf"^#define {base}\s+(\w+)$", header, re.MULTILINE)
    assert name == (renamed[1] if renamed else base)


def test_attributes_are_those_of_cuda_h(header: str) -> None:
    for name, value in {
        "CU_DEVICE_ATTRIBUTE_INTEGRATED": driver.DEVICE_INTEGRATED,
        "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR": driver.DEVICE_MAJOR,
        "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR": driver.DEVICE_MINOR,
        "CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK": driver.FUNCTION_MAX_THREADS,
        "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES": driver.FUNCTION_MAX_DYNAMIC_SHARED,
        "CUDA_ERROR_INVALID_VALUE": driver.INVALID_VALUE,
    }.items():
        assert re.search(rf"\b{name}\s*=\s*{value}\b", header), name


def test_what_the_functions_tell() -> None:
    library = fake_driver.FakeDriver(capabilities=((8, 6), (12, 0)), version=12090, integrated=True)
    cuda = driver.Driver(library)
    device = cuda.device(1)
    assert (cuda.version(), cuda.capability(device), cuda.integrated(device)) == ((12, 9), (12, 0), True)
    context = cuda.primary_context(device)
    assert context == fake_driver.context_of(1)
    with cuda.current(context):
        assert library.stack == [context]
        module = cuda.load_module(b"bfloat16-rows-64-aligned-serial")
        function = cuda.function_of(module, "fold_kernel")
        cuda.allow_shared(function, 70_000)
    assert library.stack == []
    assert library.allowed_shared == {function: 70_000}
    assert cuda.max_threads(function) == 1024
    assert cuda.parameters(function) == [(0, 8), (8, 8), (16, 8), (24, 8), (32, 8), (40, 8)]
    cuda.unload_module(module)
    assert library.modules == {}
    assert library.broken == []


@pytest.mark.parametrize("name", [*driver.PROTOTYPES, *driver.LATER_PROTOTYPES])
def test_every_result_is_checked(name: str) -> None:
    """Whichever function fails, its name, the driver's words and the number are in the error."""
    library = fake_driver.FakeDriver()
    cuda = driver.Driver(library)
    if name.startswith("cuGetError"):
        library.fails = {name: 1, "cuDriverGetVersion": 209}
        name = "cuDriverGetVersion"
    else:
        library.fails = {name: 209}
    with pytest.raises(driver.DriverError, match=rf"^{name}: .*\(209\)$") as error:
        use_all(cuda)
    if len(library.fails) == 1:
        assert "CUDA_ERROR_NO_BINARY_FOR_GPU no kernel image is available" in str(error.value)


def use_all(cuda: driver.Driver) -> None:
    """Each function once, by the methods; the two that are only called directly, directly."""
    cuda.version()
    device = cuda.device(0)
    cuda.capability(device)
    with cuda.current(cuda.primary_context(device)):
        module = cuda.load_module(b"x")
        function = cuda.function_of(module, "fold_kernel")
        cuda.max_threads(function)
        cuda.parameters(function)
        cuda.allow_shared(function, 1)
        for name in ("cuCtxGetCurrent", "cuLaunchKernel"):
            cuda.check(name, fails_of(cuda, name))
        cuda.unload_module(module)


def fails_of(cuda: driver.Driver, name: str) -> int:
    """What the function returns when it is only asked to fail."""
    arguments = {"cuCtxGetCurrent": (driver.byref(c_void_p()),), "cuLaunchKernel": (None, *(0,) * 7, None, None, None)}
    status = cuda.function_named(name)(*arguments[name])
    return 0 if status == 999 else status  # the fake driver cannot launch nothing


def test_an_unknown_error_has_its_number() -> None:
    library = fake_driver.FakeDriver()
    library.fails = {"cuDeviceGet": 4242}
    with pytest.raises(driver.DriverError, match=r"an error that the driver has no name for \(4242\)"):
        driver.Driver(library).device(0)


def test_a_null_handle_is_an_error() -> None:
    library = fake_driver.FakeDriver()
    library._cuDevicePrimaryCtxRetain = None
    cuda = driver.Driver(library)
    cuda._functions["cuDevicePrimaryCtxRetain"] = lambda *_: 0
    with pytest.raises(FastlockError, match="null pointer"):
        cuda.primary_context(0)


def test_a_driver_without_a_needed_function_is_refused() -> None:
    library = fake_driver.FakeDriver()
    del library.cuLaunchKernel
    with pytest.raises(UnsupportedError, match="has no cuLaunchKernel"):
        driver.Driver(library)


def test_an_old_driver_does_not_tell_parameters() -> None:
    library = fake_driver.FakeDriver()
    del library.cuFuncGetParamInfo
    assert driver.Driver(library).parameters(1) is None
