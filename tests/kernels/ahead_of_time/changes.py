"""What can be wrong with an installation, a device or its driver: each changes cubins or the fake driver."""

import json
from pathlib import Path

from fastlock.kernels.ahead_of_time import cubins, manifest
from tests.helpers.fake_driver import FakeDriver, describe
from tests.kernels.ahead_of_time.launching import BF16_ROWS


def change_manifest(**changes: object):
    def change(folder: Path, library: FakeDriver, monkeypatch) -> None:
        data = json.loads((folder / manifest.MANIFEST).read_text())
        for key, value in changes.items():
            if key in data:
                data[key] = value
            else:
                for cubin in data["cubins"]:
                    cubin[key] = value
        (folder / manifest.MANIFEST).write_text(json.dumps(data))

    return change


def write(name: str, text: str):
    return lambda folder, library, monkeypatch: (folder / name).write_text(text)


def remove(name: str):
    return lambda folder, library, monkeypatch: (folder / name).unlink()


def set_library(**changes: object):
    return lambda folder, library, monkeypatch: [setattr(library, key, value) for key, value in changes.items()]


def no_library(folder: Path, library: FakeDriver, monkeypatch) -> None:
    def open_library() -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr("fastlock.kernels.ahead_of_time.driver.open_library", open_library)


def other_sources(folder: Path, library: FakeDriver, monkeypatch) -> None:
    """The kernel is edited after the cubins were built."""
    here = Path(cubins.__file__).parents[1]
    changed = folder.parent / "sources"
    for name in manifest.SOURCES:
        (changed / name).parent.mkdir(parents=True, exist_ok=True)
        (changed / name).write_bytes((here / name).read_bytes() + b"\n" * (name == "fold/triton_kernel.py"))
    digest = manifest.digest_of_sources(changed)
    monkeypatch.setattr(cubins, "digest_of_sources", lambda folder=None: digest)


FILE = describe(BF16_ROWS).file


LOADING = ("cuDeviceGet", "cuDeviceGetAttribute", "cuDriverGetVersion", "cuDevicePrimaryCtxRetain", "cuModuleLoadData")


LOADING += ("cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2", "cuModuleGetFunction", "cuFuncGetAttribute")


LOADING += ("cuFuncGetParamInfo",)
