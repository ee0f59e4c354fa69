"""Which form brings a relocked checkpoint's biases to the serving stacks that are asked for."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from typing import Any

from fastlock.architectures.bias_paths import keys_that_use_the_bias
from fastlock.architectures.families import ATTENTION
from fastlock.architectures.llama_form import LLAMA_FORM, llama_config
from fastlock.architectures.serving_stacks import STACKS, acts, architecture, named_architecture, native_flag, needs
from fastlock.checkpoints.checkpoint import Checkpoint
from fastlock.checkpoints.tokenizer import VERSIONS, tokenizer_keys, version_configs
from fastlock.errors import UnsupportedError
from fastlock.locks.receipt import CONFIG_KEY

_LLAMA_TENSOR = re.compile(
    r"(model\.embed_tokens|model\.norm|lm_head)\.weight|model\.layers\.\d+\.("
    r"self_attn\.[qkvo]_proj\.(weight|bias)|mlp\.(gate|up|down)_proj\.weight|(input|post_attention)_layernorm\.weight)"
)
# A quantised projection has other tensors, of the same modules.
_QUANTISED_TENSOR = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.[\w.]+")


@dataclass(frozen=True)
class Carrier:
    """How a checkpoint on disk brings the biases to the stacks that are asked for.

    Attributes:
        form: "native", "llama", or "weights", which needs no bias.
        flag: the config key that switches the biases on; "" where they always are.
        was: whether it was on before.
        config: the new config.json, without a receipt; its architecture is another one where a stack needs that.
        versions: what takes its place for some releases of transformers, by name; without a receipt, too.
        rewritten: the other JSON files that are written anew, by name.
        switched: the modules of a layer that then need a bias, which may be zeros; "lm_head" is the model's.
    """

    form: str
    flag: str
    was: bool
    config: dict[str, Any]
    switched: tuple[str, ...]
    versions: dict[str, dict[str, Any]] = field(default_factory=dict)
    rewritten: dict[str, dict[str, Any]] = field(default_factory=dict)

    def switched_off(self, checkpoint: Checkpoint) -> list[str]:
        """The biases in the files, by name, that the config switches off and this carrier would switch on."""
        head = {"lm_head"} & set(self.switched)
        modules = [] if self.was else [*checkpoint.modules(self.switched), *head]
        if self.form == "llama":  # the model's own class has no place for the projection's bias, whatever the flag
            modules += [site.name for site in checkpoint.sites]
        biases = sorted({f"{path}.bias" for path in modules} & checkpoint.shards.tensors.keys())
        if not checkpoint.quantisation:
            return biases
        # Old releases of AutoGPTQ write a bias of zeros for every projection.
        return [name for name in biases if checkpoint.read_vector(checkpoint.shards.tensors[name]).count_nonzero()]


def choose_carrier(checkpoint: Checkpoint, stacks: tuple[str, ...], constant: bool = True) -> Carrier:
    """The carrier that acts in every one of these stacks: the family's own bias, else the Llama form.

    Args:
        checkpoint: what is to be relocked.
        stacks: where the lock must act.
        constant: whether it has a constant part. A gate alone is in the weights, and acts in every stack.

    Raises:
        UnsupportedError: there is none; it names the stack that would lose the lock, and what would work.
    """
    _check_config(checkpoint, constant)
    model_type, asked = checkpoint.model_type, set(stacks)
    if "llama.cpp" in asked and any(site.quantised for site in checkpoint.sites):
        raise UnsupportedError(
            f"{checkpoint.where}: is quantised, and llama.cpp runs GGUF alone. Relock the unquantised checkpoint, and "
            "convert that. Nothing was written."
        )
    if not constant:
        return Carrier("weights", "", True, copy.deepcopy(checkpoint.raw), ())
    native = acts(model_type)
    if "transformers" in native and asked <= native:
        return _native(checkpoint, stacks, checkpoint.family.bias_flag or "")
    if model_type in LLAMA_FORM and asked <= acts("llama"):
        architecture = (checkpoint.raw.get("architectures") or [LLAMA_FORM[model_type]])[0]
        try:
            return _as_llama(checkpoint, str(architecture))
        except UnsupportedError:
            if not asked <= native:
                raise
    if asked <= native:
        flags = {native_flag(model_type, stack) for stack in stacks}
        if len(flags) == 1:
            return _native(checkpoint, stacks, flags.pop() or "")
    losing = ", ".join(stack for stack in stacks if stack not in native)
    is_quantised = any(site.quantised for site in checkpoint.sites)
    in_weights = "" if is_quantised else " A lock that is a gate alone acts in every stack."
    raise UnsupportedError(
        f"{checkpoint.where}: {losing or ' and '.join(stacks)} would lose the lock in this {model_type} checkpoint, "
        f"without an error. {_what_works(native)}{in_weights} Nothing was written."
    )


def _what_works(native: frozenset[str]) -> str:
    if not native:
        return "No stack has a place for it: relock in memory after loading (fastlock.relock)."
    return f"What works: --for {','.join(stack for stack in STACKS if stack in native)}."


def _native(checkpoint: Checkpoint, stacks: tuple[str, ...], flag: str) -> Carrier:
    config = copy.deepcopy(checkpoint.raw)
    text = config if checkpoint.text_key is None else config.setdefault(checkpoint.text_key, {})
    text.update(keys_that_use_the_bias(checkpoint.model_type, text, checkpoint.where))
    was = not flag or bool(getattr(checkpoint.text_config, flag, False))
    switched = checkpoint.family.switched if flag and flag == checkpoint.family.bias_flag else ()
    switched += tuple(name for stack in stacks for name in needs(checkpoint.model_type, stack))
    if flag:
        text[flag] = True
    if (needed := _architecture(checkpoint, stacks)) is not None:
        config["architectures"] = [needed]
    return Carrier("native", flag, was, config, tuple(dict.fromkeys(switched)))


def _architecture(checkpoint: Checkpoint, stacks: tuple[str, ...]) -> str | None:
    """The architecture that config.json must name for all of these stacks, None where it need not be changed."""
    needed = next((name for stack in stacks if (name := architecture(checkpoint.model_type, stack)) is not None), None)
    if needed is None:
        return None
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    own = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[checkpoint.model_type]
    if named_architecture(checkpoint.raw) not in (None, own, needed):
        raise UnsupportedError(
            f"{checkpoint.where}: vllm's own code would lose the lock in this {checkpoint.model_type} checkpoint, "
            f"without an error, and {needed}, which keeps it, is for {own} alone. What works: --for transformers. "
            "Nothing was written."
        )
    if others := set(stacks) - {"transformers", "vllm"}:
        raise UnsupportedError(
            f"{checkpoint.where}: vllm keeps the lock in this {checkpoint.model_type} checkpoint only if config.json "
            f"names {needed}, which {' and '.join(sorted(others))} would not take. Relock it twice, once for each. "
            "Nothing was written."
        )
    return needed


def _as_llama(checkpoint: Checkpoint, architecture: str) -> Carrier:
    works = "What works: relock in memory after loading (fastlock.relock). Nothing was written."
    config = llama_config(checkpoint.config, checkpoint.raw, architecture, works)
    if foreign := [name for name in checkpoint.shards.tensors if not _is_llamas(name, bool(checkpoint.quantisation))]:
        raise UnsupportedError(f"{checkpoint.where}: {foreign[0][:200]!a} has no place in the Llama form. {works}")
    tokenizer = tokenizer_keys(checkpoint, works)
    config |= tokenizer.config
    return Carrier(
        form="llama",
        flag="attention_bias",
        was=checkpoint.model_type == "qwen2",
        config=config,
        switched=ATTENTION,
        versions=version_configs(config, tokenizer.versions),
        rewritten=tokenizer.rewritten,
    )


def _is_llamas(name: str, quantised: bool) -> bool:
    """Whether a Llama has a place for a tensor of this name."""
    return bool(_LLAMA_TENSOR.fullmatch(name) or (quantised and _QUANTISED_TENSOR.fullmatch(name)))


def _check_config(checkpoint: Checkpoint, constant: bool) -> None:
    """Refuse a config.json whose place another config takes, or code of the checkpoint's own.

    Raises:
        UnsupportedError: it is one.
    """
    if checkpoint.raw.get(VERSIONS) is not None and CONFIG_KEY not in checkpoint.raw:
        raise UnsupportedError(
            f"{checkpoint.where}: its config.json names others that take its place for some releases of transformers "
            f"({VERSIONS}), and they would not {'ask for the bias' if constant else 'hold the receipt'}. Remove that "
            "key, then relock. Nothing was written."
        )
    mapped = checkpoint.raw.get("auto_map")
    names = mapped if isinstance(mapped, dict) else {} if mapped is None else {"AutoModel": mapped}
    code = [str(name) for key, name in names.items() if key.startswith(("AutoConfig", "AutoModel"))]
    if code:
        raise UnsupportedError(
            f"{checkpoint.where}: its config.json names code of its own for the model (auto_map: {code[0][:80]!a}), "
            f"which may {'have no place for the bias' if constant else 'do something else with the weights'}. If "
            "transformers' own class computes the same, remove auto_map from config.json, then relock. Nothing was "
            "written."
        )
