"""What is asked of torch.cuda: one GPU like an H200, whose work is done as soon as it is queued."""

import contextlib
import itertools
import time
from types import SimpleNamespace

import torch

from tests.helpers.fake_gpu import operators

NAME = "Fake H200"
PROPERTIES = SimpleNamespace(
    name=NAME,
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=2**36,
    L2_cache_size=2**14,  # so small that few weights are larger
    shared_memory_per_block=48 * 1024,
    shared_memory_per_block_optin=100 * 1024,
    warp_size=32,
    is_integrated=0,
)
handles = itertools.count(0x51EA0, 0x10)
current: list["Stream"] = []


class Stream:
    """What is queued on it has run."""

    def __init__(self, device=None, priority=0, **_options):
        self.device, self.cuda_stream = torch.device("cuda", 0), next(handles)

    def synchronize(self) -> None:
        synchronize()

    def wait_stream(self, stream) -> None:
        pass

    def wait_event(self, event) -> None:
        pass

    def record_event(self, event=None):
        return event or Event()

    def query(self) -> bool:
        return True

    def __enter__(self):
        current.append(self)
        return self

    def __exit__(self, *_raised) -> None:
        current.pop()


class Event:
    """Happens as it is recorded; but is only known to have happened once somebody waited for it."""

    def __init__(self, **_options):
        self.time, self.waited_for = 0.0, False

    def record(self, stream=None) -> None:
        self.time, self.waited_for = time.perf_counter(), False

    def query(self) -> bool:
        return self.waited_for

    def synchronize(self) -> None:
        self.waited_for = True
        synchronize()

    def wait(self, stream=None) -> None:
        pass

    def elapsed_time(self, end: "Event") -> float:
        return max((end.time - self.time) * 1e3, 1e-6)


class CUDAGraph:
    """Computes again what was computed while it was captured."""

    def __init__(self, keep_graph=False):
        self.steps: list[tuple] = []

    def replay(self) -> None:
        for compute, results in self.steps:
            again = compute()
            for into, value in zip(_tensors(results), _tensors(again), strict=True):
                if into.data_ptr() != value.data_ptr():
                    into.copy_(value)

    def reset(self) -> None:
        self.steps = []


@contextlib.contextmanager
def graph(into: CUDAGraph, **_options):
    operators.State.capturing = into.steps
    try:
        yield
    finally:
        operators.State.capturing = None


def synchronize(device=None) -> None:
    """All has been done when it was queued, but for what is only timed."""
    operators.State.asleep = False


def sleep(cycles) -> None:
    """What is queued behind it is only timed, and nobody looks at what it computes."""
    operators.State.asleep = True


default = Stream()


def _tensors(values) -> list[torch.Tensor]:
    return [one for one in torch.utils._pytree.tree_leaves(values) if isinstance(one, torch.Tensor)]


def current_stream(device=None) -> Stream:
    return current[-1] if current else default


@contextlib.contextmanager
def nothing(*_arguments, **_options):
    yield


def install() -> None:
    """From now on torch says that there is a GPU."""
    cuda = torch.cuda
    for name, value in {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
        "get_device_properties": lambda device=None: PROPERTIES,
        "mem_get_info": lambda device=None: (PROPERTIES.total_memory // 2, PROPERTIES.total_memory),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "manual_seed_all": lambda seed: None,
        "synchronize": synchronize,
        "_sleep": sleep,
        "device": nothing,
        "stream": lambda stream: stream,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "current_stream": current_stream,
        "default_stream": lambda device=None: default,
        "is_current_stream_capturing": lambda: operators.State.capturing is not None,
    }.items():
        setattr(cuda, name, value)
    torch._C._cuda_getCurrentRawStream = lambda index: current_stream().cuda_stream
    torch.empty = _without_pinning(torch.empty)
    torch.Generator = _on_host(torch.Generator)


def _without_pinning(empty):
    """torch.empty, which only notes that memory is to be pinned."""

    def pinned_or_not(*size, pin_memory=False, **options):
        tensor = empty(*size, **options)
        tensor.fake_pinned = pin_memory
        return tensor

    return pinned_or_not


def _on_host(generator):
    """torch.Generator, of the host's random numbers for the GPU as well."""

    class Generator:
        def __new__(cls, device="cpu"):
            return generator()

    return Generator
