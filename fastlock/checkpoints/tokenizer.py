"""What keeps a checkpoint's tokenizer what it was where config.json gets another model_type, and whether it still does.

Only JSON is read: the tokenizer is neither loaded nor run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastlock.architectures.tokenizer_classes import tokenizer_classes
from fastlock.checkpoints.checkpoint import Checkpoint
from fastlock.errors import DamagedError, UnsupportedError
from fastlock.storage.files import DOWNLOAD_AGAIN, File, parse_object, read_all

TOKENIZER_CONFIG = "tokenizer_config.json"

# Where a config.json names others that take its place from some release of transformers on.
VERSIONS = "configuration_files"
CLASS = "tokenizer_class"

_FILES = ("vocab.json", "tekken.json")  # beside tokenizer.json, tokenizer.model and tokenizer_config.json


@dataclass(frozen=True)
class TokenizerKeys:
    """What has to be written for a tokenizer to stay what it was.

    Attributes:
        config: further keys of config.json.
        versions: what some releases of transformers must read as the `tokenizer_class`, by the name of their config.
        rewritten: the new tokenizer_config.json, by its name; empty where it stays as it is.
    """

    config: dict[str, Any]
    versions: dict[str, str]
    rewritten: dict[str, dict[str, Any]]


def tokenizer_keys(checkpoint: Checkpoint, works: str) -> TokenizerKeys:
    """What a checkpoint must say in Llama form for every release of transformers to read its tokenizer as before.

    Args:
        checkpoint: the original, a Mistral or a Qwen2.
        works: what would work instead, for messages.

    Raises:
        UnsupportedError: there is nothing that all of them would read so.
        DamagedError: tokenizer_config.json is damaged.
    """
    files, raw = checkpoint.files, checkpoint.raw
    if not any(name.startswith("tokenizer") or name in _FILES for name in files):
        return TokenizerKeys({}, {}, {})
    own = _read(files.get(TOKENIZER_CONFIG), f"{checkpoint.where}/{TOKENIZER_CONFIG}")
    declared = own.get(CLASS)
    if declared is not None and not isinstance(declared, str):
        raise DamagedError(f"{checkpoint.where}/{TOKENIZER_CONFIG}: its {CLASS} is not a name. {DOWNLOAD_AGAIN}")
    _check(checkpoint, own, declared, works)
    classes = tokenizer_classes(checkpoint.model_type, declared or raw.get(CLASS))
    if not classes:
        return TokenizerKeys({}, {}, {})
    if declared is None and raw.get(CLASS) is not None:
        raise UnsupportedError(
            f"{checkpoint.where}: its tokenizer_class ({str(raw[CLASS])[:80]!a}) is declared in config.json alone, "
            f"and in Llama form some releases of transformers would take another. {works}"
        )
    rewritten = {} if declared is None else {TOKENIZER_CONFIG: _without(own, CLASS)}
    if len(set(classes.values())) == 1:
        return TokenizerKeys({CLASS: classes["4.0.0"]}, {}, rewritten)
    versions = {f"config.{release}.json": name for release, name in classes.items()}
    if clash := sorted(files.keys() & versions.keys()):
        raise UnsupportedError(
            f"{checkpoint.where}: holds {clash[0]}, and fastlock needs that name for a file of its own. Move it away. "
            "Nothing was written."
        )
    return TokenizerKeys({CLASS: classes["4.0.0"], VERSIONS: list(versions)}, versions, rewritten)


def version_configs(config: dict[str, Any], versions: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The configs that take config.json's place for some releases of transformers, by name."""
    return {name: _without(config, VERSIONS) | {CLASS: kept} for name, kept in versions.items()}


def versions_in(config: dict[str, Any]) -> tuple[str, ...]:
    """The names of the configs that take a config.json's place for some releases of transformers."""
    names = config.get(VERSIONS)
    return tuple(name for name in names if isinstance(name, str)) if isinstance(names, list) else ()


def changed_version(checkpoint: Checkpoint) -> str | None:
    """A config that takes config.json's place for some release, and says another thing; None where there is none."""
    here = _without(checkpoint.raw, VERSIONS, CLASS)
    for name in versions_in(checkpoint.raw):
        file = checkpoint.files.get(name)
        if file is None or _without(_read(file, f"{checkpoint.where}/{name}"), CLASS) != here:
            return name
    return None


def same_but_class(original: File, current: File | None, where: str) -> bool:
    """Whether a tokenizer_config.json is what was written where `original` was set aside."""
    return current is not None and _read(current, where) == _without(_read(original, where), CLASS)


def _check(checkpoint: Checkpoint, own: dict[str, Any], declared: str | None, works: str) -> None:
    """Refuse tokenizers that are chosen in other ways than by their class."""
    maps = [mapped for mapped in (own.get("auto_map"), checkpoint.raw.get("auto_map")) if mapped is not None]
    if any(not isinstance(mapped, dict) or "AutoTokenizer" in mapped for mapped in maps):
        problem = "its tokenizer is code of its own (auto_map)"
    elif declared is not None and declared.startswith("MistralCommon"):
        problem = f"its tokenizer is one of mistral-common ({declared[:80]!a})"
    elif checkpoint.model_type == "mistral" and own.get("fix_mistral_regex"):
        problem = "its tokenizer_config.json sets fix_mistral_regex, which is for a Mistral alone"
    else:
        return
    raise UnsupportedError(f"{checkpoint.where}: {problem}, and would give other tokens in the Llama form. {works}")


def _read(file: File | None, where: str) -> dict[str, Any]:
    return {} if file is None else parse_object(read_all(file, where), where)


def _without(data: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in keys}
