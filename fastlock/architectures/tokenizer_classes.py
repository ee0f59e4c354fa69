"""Which class reads a checkpoint's tokenizer: the model_type in config.json decides that too, from release to release.

AutoTokenizer of transformers 4 takes the class that tokenizer_config.json declares, else the one that config.json
declares, else the family's. That of transformers 5 takes it only if it is the one that it has for the family. For a
Llama it has none, and takes what is declared: a checkpoint in Llama form has to declare to every release what that
release took before, or the same text gives other tokens. `configuration_files` in config.json is how all of them are
given a config of their own.

Read in transformers 5.0 to 5.23 and run with 4.46, 4.57, 5.3 and 5.23. (5.6 alone trusted what a Mistral declares.)
"""

from __future__ import annotations

# What transformers 4 takes for a family that declares none; and what reads a tokenizer.json as it is, there and in 5.
_OF_FAMILY = {"mistral": "LlamaTokenizer", "qwen2": "Qwen2Tokenizer"}
_AS_IT_IS = ("PreTrainedTokenizerFast", "TokenizersBackend")

# What transformers takes from these releases on, whatever is declared, unless it is of the family.
_SINCE = {
    "mistral": {"5.0.0": "TokenizersBackend"},
    "qwen2": {"5.0.0": "TokenizersBackend", "5.8.0": "Qwen2Tokenizer"},
}


def tokenizer_classes(model_type: str, declared: str | None) -> dict[str, str]:
    """What a checkpoint in Llama form must declare for its tokenizer to be read as before.

    Args:
        model_type: its family before: "mistral" or "qwen2".
        declared: the `tokenizer_class` in its tokenizer_config.json, None where it has none.

    Returns:
        The classes, by the release of transformers from which on they are right; empty where `declared` is for all.
    """
    if model_type == "qwen2" and declared is None:
        return {"4.0.0": "Qwen2Tokenizer"}
    if model_type == "qwen2" and declared in ("Qwen2Tokenizer", "Qwen2TokenizerFast"):
        return {}
    if model_type == "mistral" and declared in _AS_IT_IS:
        return {}
    return {"4.0.0": declared or _OF_FAMILY[model_type]} | _SINCE[model_type]
