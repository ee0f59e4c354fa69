"""Finding the checkpoints and adapters of a zoo, their names, and the files that several of them share."""

from __future__ import annotations

import glob
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlock.checkpoints.adapters.adapter import ADAPTER_CONFIG
from fastlock.checkpoints.adapters.adapter_files import holds_adapter_only
from fastlock.errors import FastlockError
from fastlock.storage.files import CONFIG, read_bounded
from fastlock.storage.places import Place, as_place
from fastlock.storage.remote import normalised, opened, reaching

HUB_PREFIX = "models--"
MAX_LIST_BYTES = 64 * 1024 * 1024

FileId = tuple[int, int]
CHECKPOINT, ADAPTER = "checkpoint", "adapter"


@dataclass(frozen=True)
class Source:
    """A checkpoint or an adapter that was found.

    Attributes:
        directory: where it is; its URL, if it is on another machine.
        name: what it is called beside the other ones, and in the directory of the results.
        kind: CHECKPOINT or ADAPTER.
    """

    directory: str
    name: str
    kind: str = CHECKPOINT


def find_sources(places: Iterable[str | os.PathLike[str]], out: str | os.PathLike[str] | None = None) -> list[Source]:
    """The checkpoints and adapters at these places, sorted by name.

    A place is a checkpoint's directory (one with a config.json; its name is its last path component), an adapter's (one
    with an adapter_config.json and no model), a directory to search (names are relative to it), a Hugging Face cache
    (names are `org--model`), a pattern like `runs/*/final`, or a .txt file with one of these per line, relative to that
    file; `#` begins a comment. Directories and patterns may be URLs ("s3://bucket/runs/*/final").

    Args:
        places: where to look.
        out: the directory that the results go to; every search leaves it out.

    Raises:
        FastlockError: neither is at one of the places, or it is `out`.
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
            sources.setdefault((source.name, _identity(source.directory)), source)
    if not sources:
        raise FastlockError("there is nowhere to search: give checkpoints, directories, patterns, or a list file.")
    return sorted(sources.values(), key=lambda source: (source.name, source.directory))


def check_names(sources: list[Source]) -> None:
    """Refuse names that cannot stand side by side in one directory.

    Raises:
        FastlockError: two are the same, one is inside another, or one is empty.
    """
    directories: dict[str, str] = {}
    for source in sources:
        other = directories.setdefault(source.name, source.directory)
        if other != source.directory:
            raise FastlockError(
                f"{other} and {source.directory}: both would be named {source.name}. Rename one, relock them into "
                "different directories, or give the directory above them to be searched."
            )
    for name, directory in directories.items():
        if not name:
            raise FastlockError(f"{directory}: has no name. Move the checkpoint into a directory.")
        for parent in map(str, Path(name).parents):
            if parent in directories:
                raise FastlockError(
                    f"{directory}: would be named {name}, which is inside {parent}, the name of "
                    f"{directories[parent]}. Relock them into different directories."
                )


def shared_files(sources: list[Source]) -> list[list[FileId]]:
    """For each checkpoint, the safetensors files that others of these have too, by hard or symbolic links.

    Of adapters none are named: what is folded of their files is not shared. Files are only looked at, and those that
    cannot be shared are not even followed.
    """
    directories = [_identity(source.directory) for source in sources]
    times = Counter(directories)
    linked = [
        _linked_files(source.directory, times[directory] > 1) if source.kind == CHECKPOINT else set[FileId]()
        for source, directory in zip(sources, directories, strict=True)
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
    """Something that is the same exactly for the same directory; None where there is none."""
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
            f"{url}: no checkpoint is there (no {CONFIG}), no adapter, and none below it. Check the address."
        )
    return sources


def _below_url(fs: Any, top: str, left_out: FileId | str | None) -> list[Source]:
    """What lies below a path of a remote file system, found in one listing; none inside another."""
    url: str = fs.unstrip_protocol(top)
    if any(fs.isfile(f"{top}/{name}") for name in (CONFIG, ADAPTER_CONFIG)):
        kind = _kind([path.rpartition("/")[2] for path in fs.ls(top, detail=False)])
        return [Source(url, top.rpartition("/")[2], kind or CHECKPOINT)]
    names: dict[str, list[str]] = {}
    for path in fs.find(top):
        directory, _, file = path.rpartition("/")
        names.setdefault(directory, []).append(file)
    directories = {directory: kind for directory, files in names.items() if (kind := _kind(files))}
    sources = []
    for directory, kind in sorted(directories.items()):
        name = directory.removeprefix(f"{top}/")
        parts = name.split("/")
        is_inside = any("/".join((top, *parts[:length])) in directories for length in range(1, len(parts)))
        is_result = isinstance(left_out, str) and f"{url}/{name}/".startswith(f"{left_out}/")
        is_hidden = any(part in ("", "..") or part.startswith(".") for part in parts)
        if not is_inside and not is_result and not is_hidden:
            sources.append(Source(f"{url}/{name}", name, kind))
    return sources


def _at_path(path: str, left_out: FileId | str | None) -> list[Source]:
    try:
        if os.path.lexists(path):
            sources = _in_or_below(path, left_out)
            problem = "no checkpoint is in it (no config.json), no adapter, and none below it"
        else:
            matches = _expanded(path) if glob.has_magic(path) else []
            sources = [source for match in matches for source in _in_or_below(match, left_out)]
            problem = "no checkpoint and no adapter is there" if matches else "does not exist"
    except (OSError, ValueError) as error:
        raise FastlockError(f"{path}: cannot be searched ({error}). Check the path and its permissions.") from None
    if not sources:
        raise FastlockError(
            f"{path}: {problem}. Give the directory of a checkpoint or an adapter, one to search, a pattern, or a list."
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
        return []
    if kind := _kind_of(path):
        return [Source(path, os.path.basename(path), kind)]
    return list(_below(path, left_out))


def _kind_of(path: str) -> str | None:
    """What a directory is: of one without either of two files, nothing else is looked at."""
    if os.path.isfile(os.path.join(path, ADAPTER_CONFIG)):
        return _kind(os.listdir(path))
    return CHECKPOINT if os.path.isfile(os.path.join(path, CONFIG)) else None


def _kind(files: Iterable[str]) -> str | None:
    """What a directory with these files is: an adapter beside a model's weights or its config belongs to a model."""
    names = dict.fromkeys(files)
    if holds_adapter_only(names):
        return ADAPTER
    return CHECKPOINT if CONFIG in names else None


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
            below = sorted(
                (entry.path, entry.is_symlink())
                for entry in entries
                if not entry.name.startswith(".") and os.path.isdir(entry.path)
            )
        # Taken from the right: links last, so that the real directories give the names.
        waiting.extend(path for path, is_link in reversed(below) if not is_link)
        waiting.extendleft(path for path, is_link in below if is_link)


def _is_hub_repository(directory: str) -> bool:
    return os.path.basename(directory).startswith(HUB_PREFIX) and os.path.isdir(os.path.join(directory, "snapshots"))


def _in_hub(repository: str) -> list[Source]:
    """What a repository's directory of a Hugging Face cache holds: the snapshot of its main branch, or else all."""
    name = os.path.basename(repository).removeprefix(HUB_PREFIX)
    snapshots = os.path.join(repository, "snapshots")
    kinds = {entry: kind for entry in os.listdir(snapshots) if (kind := _kind_of(os.path.join(snapshots, entry)))}
    revisions, main = sorted(kinds), _main_revision(repository)
    if main in revisions:
        revisions = [main]
    names = {revision: name if len(revisions) == 1 else f"{name}@{revision[:8]}" for revision in revisions}
    return [Source(os.path.join(snapshots, entry), named, kinds[entry]) for entry, named in names.items()]


def _main_revision(repository: str) -> str:
    try:
        return read_bounded(Path(repository, "refs", "main"), 1024).decode().strip()
    except (FastlockError, UnicodeDecodeError):
        return ""
