"""What a LoRA's config makes of it: which of its kinds it is, or why it cannot be folded from its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastlock.checkpoints.adapters.methods.by_peft import by_peft
from fastlock.checkpoints.adapters.methods.dora import dora
from fastlock.checkpoints.adapters.methods.lora import plain_lora
from fastlock.checkpoints.adapters.methods.method import AdaptedSite, Effect, Method
from fastlock.errors import UnsupportedError, shown

# Initialisations that take something out of the base's W, which a loader does again: W in the files is not what is
# served. The others (gaussian, eva, orthogonal, mica) leave W as it is, and are overwritten by what is stored.
_REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga")
_UNREWRITTEN = (
    "Convert it to a plain LoRA: with PEFT, save_pretrained(NEW, path_initial_model_for_weight_conversion=...). Or "
    "merge it into its base, and relock the result."
)
# The keys of a config with which PEFT computes something else than W x + s B A x, or trains it otherwise.
NOT_PLAIN = (
    "use_dora use_qalora use_bdlora alora_invocation_tokens monteclora_config target_parameters layer_replication "
    "megatron_config arrow_config"
).split()
_MERGE = "Merge it into its base (merge_and_unload, save_pretrained), and relock the result."

# Each of the kinds that change what a LoRA computes, by what its config says.
_KINDS: tuple[tuple[str, Method], ...] = (("use_dora", dora), ("use_bdlora", by_peft))
_REASONS: tuple[tuple[str, str, str], ...] = (
    ("kasa_config", "is a KaSA, and loading it takes the smallest singular values out of its base's weights", _MERGE),
    (
        "alora_invocation_tokens",
        "is an activated LoRA: it acts only after its invocation tokens, and no bias does",
        "Fold the base for the prompts that do not invoke it, or train a plain LoRA.",
    ),
    (
        "arrow_config",
        "is routed by Arrow: which LoRA acts depends on the input, and no bias does",
        "Relock the LoRAs that it routes to, each by itself.",
    ),
    (
        "use_qalora",
        "is a QALoRA, which works on grouped inputs of a GPTQ layer; fastlock has not checked it",
        "Train a plain LoRA.",
    ),
    ("megatron_config", "is for Megatron's own layers, which no Hugging Face base has", _MERGE),
    (
        "layer_replication",
        "gives its model layers that its base does not have, more than once the same",
        "Merge it into its base (merge_and_unload, save_pretrained), and relock the result.",
    ),
)
_PARAMETERS = ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector")
# Of kinds that keep them for training alone.
_TRAINING = ("lora_velora_", "lora_monteclora_")


def lora(at: AdaptedSite) -> Effect:
    """As of `Method`.

    Raises:
        UnsupportedError: of a LoRA that is none, or that changes its base.
    """
    config = at.adapter.config
    _check_initialisation(at, config)
    for key, reason, remedy in _REASONS:
        if config.get(key):
            raise UnsupportedError(f"{at.where}: {reason}. {remedy}")
    _check_target_parameters(at, config.get("target_parameters"))
    kind = next((method for key, method in _KINDS if config.get(key)), plain_lora)
    if kind is not by_peft:
        _check_parameters(at, kind)
    return kind(at)


def check_whole_adapter(config: Mapping[str, Any], where: str) -> None:
    """Refuse a LoRA that changes more of its model than the modules that it names.

    Raises:
        UnsupportedError: it does.
    """
    if config.get("layer_replication"):
        _, reason, remedy = next(entry for entry in _REASONS if entry[0] == "layer_replication")
        raise UnsupportedError(f"{where}: {reason}. {remedy}")


def _check_initialisation(at: AdaptedSite, config: Mapping[str, Any]) -> None:
    name = config.get("init_lora_weights")
    if isinstance(name, str) and name.lower().startswith(_REWRITING):
        raise UnsupportedError(
            f"{at.where}: is initialised as {shown(name)[:40]}, and loading it changes the weights of its base. "
            f"{_UNREWRITTEN}"
        )


def _check_target_parameters(at: AdaptedSite, targets: Any) -> None:
    """Refuse what PEFT does to a bare parameter of this projection, which is no LoRA layer."""
    projection = at.path.rpartition(".")[2]
    names = targets if isinstance(targets, list) else []
    if any(isinstance(name, str) and f".{name}".endswith(f".{projection}.weight") for name in names):
        raise UnsupportedError(
            f"{at.where}: adapts the parameter of this projection (target_parameters), not the layer. {_MERGE}"
        )


def _check_parameters(at: AdaptedSite, kind: Callable[[AdaptedSite], Effect]) -> None:
    for name in at.parameters:
        known = name in _PARAMETERS and (name != "lora_magnitude_vector" or kind is dora)
        if not known and not name.startswith(_TRAINING):
            raise UnsupportedError(
                f"{at.where}: holds {shown(name)[:80]}, which its config does not speak of: PEFT would not load it "
                "(are there several adapters in one file?). Save the adapter by itself, with PEFT."
            )
