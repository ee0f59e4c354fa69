"""What `build` says of the kernels that it compiled ahead of time: one JSON file beside the cubins, read with care."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastlock.errors import DamagedError, UnsupportedError

FOLDER = Path(__file__).parents[1] / "cubins"
MANIFEST = "manifest.json"
FORMAT = 1
# A cubin is made from these files, and launched by what they say: from others it is not the same kernel.
SOURCES = tuple(
    f"{room}/{name}.py"
    for room in ("adapter_fold", "fold", "gate_fold", "proximal_step")
    for name in ("variants", "launch", "triton_kernel")
)
# A kernel's own arguments, all of them addresses: of its tables. Triton adds addresses of scratch memory.
ARGUMENTS = 4
ADDRESS_BYTES = 8


@dataclass(frozen=True)
class Cubin:
    """What the manifest says of one file.

    Attributes:
        variant: the name of what the kernel was compiled for, such as a `fold.Variant`.
        target: what ptxas compiled for, such as sm_80 or sm_90a.
        file: its name, in the manifest's folder.
        sha256: of the file, in hexadecimal.
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
    """All that `build` made.

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


def read_manifest(folder: Path, variant: str | None = None) -> Manifest:
    """The manifest in a folder; of one variant only, if it is named, as checking 200 cubins takes a millisecond.

    Raises:
        UnsupportedError: there is none.
        DamagedError: it is not one that this version writes.
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
        raise UnsupportedError("this installation has no cubins") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedError(f"the manifest of the cubins cannot be read ({error})") from None
    return manifest


def cubin_of(fields: dict[str, Any]) -> Cubin:
    """A cubin from its JSON, checked: a launch relies on these numbers, and a file is opened by this name.

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
