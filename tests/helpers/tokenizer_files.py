"""Tokenizers as checkpoints of Mistral and Qwen2 have them, in small: the files, not the objects."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import fastlock

TEXT = (Path(fastlock.__path__[0]) / "data" / "texts.txt").read_text()
SPECIAL = ["<unk>", "<s>", "</s>"]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

# How the tokenizer.json of Qwen2 and of Mistral's later models split a text.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def sentencepiece(directory: Path) -> None:
    """As Mistral 7B's was converted: "▁" before each piece of text between special tokens, and no BOS of its own."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁")
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trained.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL + bytes_, max_token_length=10)
    )
    tokenizer = Tokenizer.from_str(json.dumps(json.loads(trained.to_str()) | {"pre_tokenizer": None}))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))


def sentencepiece_with_bos(directory: Path) -> None:
    """The same, with the BOS that Mistral's own puts in front."""
    sentencepiece(directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))


def qwen2(directory: Path) -> None:
    """As Qwen2 has it: byte by byte, texts in their composed form."""
    _byte_level(directory, QWEN2, normalizers.NFC())


def tekken(directory: Path) -> None:
    """As Mistral Nemo has it."""
    _byte_level(directory, TEKKEN, None)


def _byte_level(directory: Path, pattern: str, normalizer: Any) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    tokenizer.save(str(directory / "tokenizer.json"))


# A family, what writes its tokenizer.json, and its tokenizer_config.json; None where it has none.
CASES: dict[str, tuple[str, Callable[[Path], None], dict[str, Any] | None]] = {
    "Mistral 7B": ("mistral", sentencepiece_with_bos, TOKENS | {"tokenizer_class": "LlamaTokenizer", "legacy": True}),
    "no BOS of its own": ("mistral", sentencepiece, TOKENS | {"tokenizer_class": "LlamaTokenizer", "legacy": True}),
    "Mistral Nemo": ("mistral", tekken, TOKENS | {"tokenizer_class": "GPT2Tokenizer"}),
    "Mistral Small": ("mistral", tekken, TOKENS | {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}),
    "Mistral, any class": ("mistral", tekken, TOKENS | {"tokenizer_class": "PreTrainedTokenizerFast"}),
    "Mistral without a class": ("mistral", sentencepiece, TOKENS),
    "Mistral without a config": ("mistral", sentencepiece, None),
    "Qwen2.5": ("qwen2", qwen2, TOKENS | {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None}),
    "Qwen2 without a class": ("qwen2", qwen2, TOKENS),
    "Qwen2 without a config": ("qwen2", qwen2, None),
    "R1 Distill Qwen": ("qwen2", qwen2, TOKENS | {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}),
    "Qwen2, any class": ("qwen2", tekken, TOKENS | {"tokenizer_class": "PreTrainedTokenizerFast"}),
}


def write_tokenizer(case: str, directory: Path) -> None:
    """Put a case's tokenizer into a checkpoint."""
    _, write, config = CASES[case]
    write(directory)
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=4, sort_keys=True))
