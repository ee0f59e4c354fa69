"""What a relocked directory holds under which name: what is linked, what is copied, and what is set aside.

Weights that did not change are linked, and nobody may write to the source through such a link. So a linked shard has a
name that no saver writes, to which the index points, and everything that a saver might write is a copy. What a loader
could load without the lock is set aside.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from fnmatch import fnmatch

from fastlock.checkpoints.tensor_index import INDEX, SINGLE
from fastlock.errors import shown
from fastlock.storage.files import CONFIG, File

# Both begin as llama.cpp's converter wants it. transformers removes the second kind when it saves a model there, which
# costs a link and not a byte.
NEW_SHARD = "model-fastlock.safetensors"
_LINKED = "model-fastlock-"

ASIDE = "fastlock/original/"
# Of sites whose weights a gate rewrote, the columns that were there before.
COLUMNS_FILE = "fastlock/original_columns.safetensors"

MAX_COPIED_BYTES = 2**20

# What version control and caches keep for themselves: it belongs to the source, and stays there.
_PRIVATE = frozenset((".git", ".hg", ".svn", ".cache", ".huggingface", ".ipynb_checkpoints", "__pycache__"))
# Weights in other formats and variants, which are without the lock and which some stacks prefer.
_WEIGHTS = (
    "*.bin *.bin.index.json *.bin.index.*.json *.pt *.pth *.gguf *.h5 *.msgpack *.onnx *.ot "
    "consolidated*.safetensors consolidated.safetensors.index.json "
    "model*.safetensors pytorch_model*.safetensors model.safetensors.index.*.json"
).split()
# The settings that a Trainer saves beside the weights, which no stack takes for weights.
_SETTINGS = "training_args.bin"
# With these beside the weights, transformers loads another base (4.57), or puts the adapter on top (5).
_ADAPTER = ("adapter_config.json", "adapter_model*.safetensors")
# Signatures are of the original.
_SIGNATURE = "*.sig"


@dataclass(frozen=True)
class Placement:
    """Where a file of a checkpoint goes in a relocked directory.

    Attributes:
        name: its new name.
        linked: whether its bytes may be shared with the source.
    """

    name: str
    linked: bool

    @property
    def aside(self) -> bool:
        """Whether it is set aside."""
        return self.name.startswith(ASIDE)


def placements_of(files: Mapping[str, File], own: Set[str], in_place: bool) -> dict[str, Placement]:
    """Where each file of a checkpoint goes; what stays behind is left out.

    Args:
        files: of the checkpoint, by name.
        own: those that hold its tensors.
        in_place: whether the new directory takes the place of the old one. Then everything comes along, and what no
            other directory has is linked, as nothing is left to share it with.
    """
    directories = _directories_with_weights(files, own)
    return {
        name: Placement(new, name in own or _is_large_aside(new, file) or (in_place and not file.shared))
        for name, file in files.items()
        for new in [_new_name(name, own, directories)]
        if in_place or not is_private(name)
    }


def _is_large_aside(new_name: str, file: File) -> bool:
    return new_name.startswith(ASIDE) and not is_small(new_name.removeprefix(ASIDE), file)


def _new_name(name: str, own: Set[str], directories: Set[str]) -> str:
    if is_private(name):
        return name
    if name in own:
        return linked_name(name)
    is_aside = name in (CONFIG, INDEX) or fnmatch(_plain(name), _SIGNATURE) or _bypasses(name, own, directories)
    return ASIDE + name if is_aside else name


def linked_name(shard: str) -> str:
    """The name of a shard of the original in a relocked directory; no saver writes it."""
    if shard == SINGLE:
        return f"{_LINKED}00001-of-00001.safetensors"
    return _LINKED + shard.removeprefix("model-")


def is_of_relocking(name: str) -> bool:
    """Whether a name in a relocked directory is fastlock's own: new, changed, renamed, or a signature of the new."""
    is_new = name in (CONFIG, INDEX, NEW_SHARD, COLUMNS_FILE)
    return is_new or name.startswith((ASIDE, _LINKED)) or fnmatch(_plain(name), _SIGNATURE)


def needs_name(name: str) -> bool:
    """Whether fastlock needs a name for a file of its own."""
    return name.partition("/")[0] == "fastlock" or name == NEW_SHARD or name.startswith(_LINKED)


def bypass(files: Iterable[str], own: Set[str]) -> str | None:
    """What a loader could load from a relocked directory without the lock, as a clause; None where there is nothing."""
    names = [name for name in files if not name.startswith(ASIDE) and name != NEW_SHARD]
    directories = _directories_with_weights(names, own)
    name = next((name for name in names if _bypasses(name, own, directories)), None)
    return None if name is None else f"{shown(name)} lies beside the locked weights and can be loaded without the lock"


def is_small(name: str, file: File) -> bool:
    """Whether a file that is set aside is copied and its digest noted: editing the source must not change it."""
    return name in (CONFIG, INDEX) or file.size <= MAX_COPIED_BYTES


def is_private(name: str) -> bool:
    """Whether a file belongs to version control or a cache."""
    return not _PRIVATE.isdisjoint(name.split("/")[:-1])


def _bypasses(name: str, own: Set[str], directories: Set[str]) -> bool:
    """Whether a file is, or lies among, weights that would be loaded without the lock."""
    if name in own or is_private(name):
        return False
    return name.partition("/")[0] in directories or _is_weights(name)


def _is_weights(name: str) -> bool:
    plain = _plain(name)
    return plain != _SETTINGS and any(fnmatch(plain, pattern) for pattern in (*_WEIGHTS, *_ADAPTER))


def _directories_with_weights(names: Iterable[str], own: Set[str]) -> frozenset[str]:
    """The directories in a checkpoint that hold weights of their own (checkpoint-500, original), at any depth."""
    return frozenset(
        name.partition("/")[0]
        for name in names
        if "/" in name and name not in own and not is_private(name) and _is_weights(name)
    )


def _plain(name: str) -> str:
    return name.rpartition("/")[2]
