"""What passes prevents a cubin only while it lasts: memory that has run out, a CUDA graph that is being captured."""

from pathlib import Path

import pytest
import torch

from fastlock.kernels.ahead_of_time import cubins
from tests.helpers.fake_driver import FakeDriver
from tests.kernels.ahead_of_time.changes import LOADING
from tests.kernels.ahead_of_time.launching import BF16_ROWS, is_jit, table_of
from tests.kernels.fold.sites import make_site

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the fake driver reads the CPU's memory")

OUT_OF_MEMORY, CAPTURE_UNSUPPORTED, CAPTURE_IMPLICIT = 2, 900, 906


@pytest.mark.parametrize("status", [OUT_OF_MEMORY, CAPTURE_UNSUPPORTED, CAPTURE_IMPLICIT])
@pytest.mark.parametrize("name", ["cuDevicePrimaryCtxRetain", "cuModuleLoadData", "cuModuleGetFunction"])
def test_a_driver_error_that_passes_is_forgotten(name: str, status: int, installed: FakeDriver) -> None:
    installed.fails[name] = status
    choice = cubins.LOADER.choose(BF16_ROWS.name, 0)
    assert choice.kernel is None
    assert f"({status})" in choice.reason
    assert is_jit(table_of(make_site(40, 64, (0,))))
    installed.fails.clear()
    kernel = cubins.LOADER.choose(BF16_ROWS.name, 0).kernel
    assert kernel is not None
    assert cubins.LOADER.choose(BF16_ROWS.name, 0).kernel is kernel


@pytest.mark.parametrize("name", LOADING)
def test_any_other_driver_error_is_kept(name: str, installed: FakeDriver, folder: Path) -> None:
    """To read, and refuse, the same file again and again would help nobody."""
    installed.fails[name] = 209
    reason = cubins.LOADER.choose(BF16_ROWS.name, 0).reason
    calls = len(installed.calls)
    installed.fails.clear()
    assert cubins.LOADER.choose(BF16_ROWS.name, 0).reason == reason
    assert len(installed.calls) == calls


def test_the_stream_without_torchs_own_reader(monkeypatch) -> None:
    """torch's function for the handle is not public, and may be gone one day."""

    class Stream:
        cuda_stream = 0x51EA

    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0x1000 + index, raising=False)
    assert cubins._stream_reader()(3) == 0x1003
    monkeypatch.delattr(torch._C, "_cuda_getCurrentRawStream")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: Stream)
    assert cubins._stream_reader()(3) == 0x51EA
