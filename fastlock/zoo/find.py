"""Finding the checkpoints, adapters and GGUF models of a zoo, their names, and the files that several of them share."""

from __future__ import annotations

import glob
import os
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastlock.checkpoints.adapters.adapter import ADAPTER_CONFIG
from fastlock.checkpoints.adapters.adapter_files import holds_adapter_only
from fastlock.checkpoints.gguf.parts import SUFFIX, name_of_first
from fastlock.errors import FastlockError
from fastlock.storage.files import CONFIG, read_bounded
from fastlock.storage.places import Place, as_place
from fastlock.storage.remote import normalised, opened, reaching

HUB_PREFIX = "models--"
MAX_LIST_BYTES = 64 * 1024 * 1024

FileId = tuple[int, int]
CHECKPOINT, ADAPTER, GGUF = "checkpoint", "adapter", "GGUF"
_WEIGHTS = (".safetensors", ".bin")


@dataclass(frozen=True)
class Source:
    """A checkpoint, an adapter or a GGUF model that was found.

    Attributes:
        place: its directory, or a GGUF's file, of a split one the first; its URL, if it is on another machine.
        name: what it is called beside the other ones, and in the directory of the results.
        kind: CHECKPOINT, ADAPTER or GGUF.
    """

    place: str
    name: str
    kind: str = CHECKPOINT


def find_sources(places: Iterable[str | os.PathLike[str]], out: str | os.PathLike[str] | None = None) -> list[Source]:
    """The checkpoints, adapters and GGUF models at these places, sorted by name.

    A place is a checkpoint's directory (one with a config.json; its name is its last path component), an adapter's (one
    with an adapter_config.json and no model), a GGUF file (any part stands for a split model, which has the name of its
    first), a directory to search (names are relative to it), a Hugging Face cache (names are `org--model`), a pattern
    like `runs/*/final`, or a .txt file with one of these per line, relative to that file; `#` begins a comment.
    Directories and patterns may be URLs ("s3://bucket/runs/*/final").

    Args:
        places: where to look.
        out: the directory that the results go to; every search leaves it out.

    Raises:
        FastlockError: none of them is at one of the places, or it is `out`.
    """
    left_out = _identity(out) if out is not None else None
    sources: dict[tuple[str, FileId | str | None], Source] = {}
    for place in _without_lists(places):
        if left_out is not None and _identity(place) == left_out:
            raise FastlockError(
                f"{place}: is --out itself, which is never searched. Leave it out, or give another --out; it may be "
                "below a directory that is searched."
            )
        for source in _at_url(place, left_out) if isinstance(place, str) else _at_path(str(place), left_out):
            sources.setdefault((source.name, _identity(source.place)), source)
    if not sources:
        raise FastlockError("there is nowhere to search: give checkpoints, directories, patterns, or a list file.")
    return sorted(sources.values(), key=lambda source: (source.name, source.place))


def check_names(sources: list[Source]) -> None:
    """Refuse names that cannot stand side by side in one directory.

    Raises:
        FastlockError: two are the same, one is inside another, or one is empty.
    """
    places: dict[str, str] = {}
    for source in sources:
        other = places.setdefault(source.name, source.place)
        if other != source.place:
            raise FastlockError(
                f"{other} and {source.place}: both would be named {source.name}. Rename one, relock them into "
                "different directories, or give the directory above them to be searched."
            )
    for name, place in places.items():
        if not name:
            raise FastlockError(f"{place}: has no name. Move the checkpoint into a directory.")
        for parent in map(str, Path(name).parents):
            if parent in places:
                raise FastlockError(
                    f"{place}: would be named {name}, which is inside {parent}, the name of {places[parent]}. Relock "
                    "them into different directories."
                )


def shared_files(sources: list[Source]) -> list[list[FileId]]:
    """For each checkpoint, the safetensors files that others of these have too, by hard or symbolic links.

    Of others none are named: what is folded of their files is not shared. Files are only looked at, and those that
    cannot be shared are not even followed.
    """
    identities = [_identity(source.place) for source in sources]
    times = Counter(identities)
    linked = [
        _linked_files(source.place, times[identity] > 1) if source.kind == CHECKPOINT else set[FileId]()
        for source, identity in zip(sources, identities, strict=True)
    ]
    users = Counter(file for files in linked for file in files)
    return [sorted(file for file in files if users[file] > 1) for files in linked]


def _linked_files(directory: str, directory_is_linked: bool) -> set[FileId]:
    files = set()
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.name.endswith(".safetensors"):
                    status = entry.stat(follow_symlinks=False)
                    if directory_is_linked or entry.is_symlink() or status.st_nlink > 1:
                        status = entry.stat()
                        files.add((status.st_dev, status.st_ino))
    except OSError:  # the worker that gets this checkpoint says what is wrong with it
        return set()
    return files


def _identity(path: str | os.PathLike[str]) -> FileId | str | None:
    """Something that is the same exactly for the same directory or file; None where there is none."""
    if isinstance(place := as_place(path), str):
        return normalised(place)
    try:
        status = os.stat(place)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _without_lists(places: Iterable[str | os.PathLike[str]]) -> Iterator[Place]:
    """The places, each list file replaced by what it lists."""
    for name in places:
        place = _expanded_user(name)
        if isinstance(place, Path) and place.suffix == ".txt" and place.is_file():
            yield from _listed(place)
        else:
            yield place


def _listed(path: Path) -> Iterator[Place]:
    try:
        lines = read_bounded(path, MAX_LIST_BYTES).decode().splitlines()
    except UnicodeDecodeError as error:
        raise FastlockError(
            f"{path}: is not a list of checkpoints ({error}). Give UTF-8 text, one path per line."
        ) from None
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if text and not text.startswith("#"):
            place = _expanded_user(text)
            listed = place if isinstance(place, str) else path.parent / place
            if isinstance(listed, Path) and listed.suffix == ".txt" and listed.is_file():
                raise FastlockError(f"{path}, line {number}: {text} is itself a list. Give it separately.")
            yield listed


def _expanded_user(name: str | os.PathLike[str]) -> Place:
    place = as_place(name)
    return place if isinstance(place, str) else place.expanduser()


def _at_url(url: str, left_out: FileId | str | None) -> list[Source]:
    with reaching(url):
        fs, root = opened(url)
        tops = sorted(fs.glob(root)) if glob.has_magic(root) else [root]
        sources = [source for top in tops for source in _below_url(fs, top.rstrip("/"), left_out)]
    if not sources:
        raise FastlockError(
            f"{url}: no checkpoint is there (no {CONFIG}), no adapter and no GGUF, and none below it. Check the "
            "address."
        )
    return sources


def _below_url(fs: Any, top: str, left_out: FileId | str | None) -> list[Source]:
    """What lies below a path of a remote file system, found in one listing; none inside another."""
    url: str = fs.unstrip_protocol(top)
    called = top.rpartition("/")[2]
    if _is_gguf(called) and fs.isfile(top):
        return [Source(url, called, GGUF)]
    if any(fs.isfile(f"{top}/{name}") for name in (CONFIG, ADAPTER_CONFIG)) and (
        kind := _kind([path.rpartition("/")[2] for path in fs.ls(top, detail=False)])
    ):
        return [Source(url, called, kind)]
    names: dict[str, list[str]] = {}
    for path in fs.find(top):
        directory, _, file = path.rpartition("/")
        names.setdefault(directory, []).append(file)
    found = {directory: kind for directory, files in names.items() if (kind := _kind(files))}
    found |= {f"{directory}/{name}": GGUF for directory, files in names.items() for name in _gguf_models(files)}
    sources = []
    for place, kind in sorted(found.items()):
        name = place.removeprefix(f"{top}/")
        parts = name.split("/")
        is_inside = any("/".join((top, *parts[:length])) in found for length in range(1, len(parts)))
        is_result = isinstance(left_out, str) and f"{url}/{name}/".startswith(f"{left_out}/")
        is_hidden = any(part in ("", "..") or part.startswith(".") for part in parts)
        if not is_inside and not is_result and not is_hidden:
            sources.append(Source(f"{url}/{name}", name, kind))
    return sources


def _at_path(path: str, left_out: FileId | str | None) -> list[Source]:
    try:
        if os.path.lexists(path):
            sources = _in_or_below(path, left_out)
            problem = "no checkpoint is in it (no config.json), no adapter and no GGUF, and none below it"
        else:
            matches = _expanded(path) if glob.has_magic(path) else []
            sources = [source for match in matches for source in _in_or_below(match, left_out)]
            problem = "no checkpoint, no adapter and no GGUF is there" if matches else "does not exist"
    except (OSError, ValueError) as error:
        raise FastlockError(f"{path}: cannot be searched ({error}). Check the path and its permissions.") from None
    if not sources:
        raise FastlockError(
            f"{path}: {problem}. Give the directory of a checkpoint or an adapter, a GGUF file, a directory to search, "
            "a pattern, or a list."
        )
    return sources


def _expanded(pattern: str) -> list[str]:
    """What a pattern stands for in a shell: no hidden names, and `**` follows no links."""
    path = Path(os.path.abspath(pattern))
    parts = set(path.parts)
    matches = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
    return sorted(str(m) for m in matches if all(part in parts or not part.startswith(".") for part in m.parts))


def _in_or_below(path: str, left_out: FileId | str | None) -> list[Source]:
    path = os.path.abspath(path)
    if not os.path.isdir(path):
        return [_gguf_at(path)] if _is_gguf(path) else []
    if kind := _kind_of(path):
        return [Source(path, os.path.basename(path), kind)]
    return list(_below(path, left_out))


def _kind_of(path: str) -> str | None:
    """What a directory is: of one without either of two files, nothing else is looked at."""
    if any(os.path.isfile(os.path.join(path, name)) for name in (CONFIG, ADAPTER_CONFIG)):
        return _kind(os.listdir(path))
    return None


def _kind(files: Collection[str]) -> str | None:
    """What a directory with these files is, None where it is nothing by itself.

    An adapter beside a model's weights or its config belongs to a model; a config beside GGUF alone says of what they
    were made.
    """
    names = dict.fromkeys(files)
    if holds_adapter_only(names):
        return ADAPTER
    holds_gguf_only = any(map(_is_gguf, names)) and not any(name.endswith(_WEIGHTS) for name in names)
    return CHECKPOINT if CONFIG in names and not holds_gguf_only else None


def _is_gguf(name: str) -> bool:
    return name.lower().endswith(SUFFIX)


def _gguf_models(files: Iterable[str]) -> list[str]:
    """The GGUF models among a directory's files: a split one is its first part, or, where that is not there, each."""
    names = {name for name in files if _is_gguf(name)}
    return sorted(name for name in names if (first := name_of_first(name)) == name or first not in names)


def _gguf_at(path: str) -> Source:
    directory, name = os.path.split(path)
    first = name_of_first(name)
    name = first if os.path.isfile(os.path.join(directory, first)) else name
    return Source(os.path.join(directory, name), name, GGUF)


def _below(top: str, left_out: FileId | str | None) -> Iterator[Source]:
    """What lies below a directory. What lies inside a checkpoint or an adapter is a part of it, and not searched.

    Every directory is searched once, whatever links lead to it: a loop of links ends there.
    """
    searched = {left_out}
    waiting = deque([top])
    while waiting:
        directory = waiting.pop()
        identity = _identity(directory)
        if identity in searched:
            continue
        if directory != top and (kind := _kind_of(directory)):
            yield Source(directory, os.path.relpath(directory, top), kind)
            continue
        searched.add(identity)
        if _is_hub_repository(directory):
            yield from _in_hub(directory)
            continue
        with os.scandir(directory) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(".")]
        below = sorted((entry.path, entry.is_symlink()) for entry in shown if os.path.isdir(entry.path))
        directories = {path for path, _ in below}
        for name in _gguf_models(entry.name for entry in shown if entry.path not in directories):
            place = os.path.join(directory, name)
            yield Source(place, os.path.relpath(place, top), GGUF)
        # Taken from the right: links last, so that the real directories give the names.
        waiting.extend(path for path, is_link in reversed(below) if not is_link)
        waiting.extendleft(path for path, is_link in below if is_link)


def _is_hub_repository(directory: str) -> bool:
    return os.path.basename(directory).startswith(HUB_PREFIX) and os.path.isdir(os.path.join(directory, "snapshots"))


def _in_hub(repository: str) -> list[Source]:
    """What a repository's directory of a Hugging Face cache holds: the snapshot of its main branch, or else all."""
    name = os.path.basename(repository).removeprefix(HUB_PREFIX)
    snapshots = os.path.join(repository, "snapshots")
    held = {entry: found for entry in os.listdir(snapshots) if (found := _in_snapshot(os.path.join(snapshots, entry)))}
    revisions, main = sorted(held), _main_revision(repository)
    if main in revisions:
        revisions = [main]
    names = {revision: name if len(revisions) == 1 else f"{name}@{revision[:8]}" for revision in revisions}
    return [
        replace(source, name=f"{named}/{source.name}" if source.kind == GGUF else named)
        for revision, named in names.items()
        for source in held[revision]
    ]


def _in_snapshot(directory: str) -> list[Source]:
    """A checkpoint or an adapter, or else the GGUF models in a snapshot, which may have directories of their own."""
    if not os.path.isdir(directory):
        return []
    if kind := _kind_of(directory):
        return [Source(directory, os.path.basename(directory), kind)]
    return [source for source in _below(directory, None) if source.kind == GGUF]


def _main_revision(repository: str) -> str:
    try:
        return read_bounded(Path(repository, "refs", "main"), 1024).decode().strip()
    except (FastlockError, UnicodeDecodeError):
        return ""
