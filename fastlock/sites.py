"""Where each architecture keeps its attention output projection, and whether a bias there is kept or lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastlock.errors import FastlockError
from fastlock.lock import Lock

# The dtypes of weights that can be folded, by the names that receipts give them.
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


@dataclass(frozen=True)
class Family:
    """How one model family of transformers keeps its attention output projection.

    Attributes:
        layers: last part of the path of the decoder's list of layers.
        projection: path of the output projection inside a layer.
        bias_flag: the config key that gives the projection a bias; "" where it always has one; None where the
            family can't have one, so that transformers drops it, in silence, when a checkpoint is loaded.
    """

    layers: str = "layers"
    projection: str = "self_attn.o_proj"
    bias_flag: str | None = "attention_bias"


@dataclass(frozen=True, eq=False)
class Site:
    """One layer's attention output projection.

    Attributes:
        layer: the decoder layer.
        name: the module's path in the model.
        module: an `nn.Linear`, or transformers' `Conv1D` (GPT-2), which keeps its weight transposed.
        num_heads, head_dim: its input is num_heads plain head outputs of head_dim numbers each.
    """

    layer: int
    name: str
    module: Any
    num_heads: int
    head_dim: int

    @property
    def weight(self) -> torch.Tensor:
        """W, [hidden, num_heads * head_dim]: a view, whichever way the module keeps it."""
        weight: torch.Tensor = self.module.weight.detach()
        return weight if isinstance(self.module, nn.Linear) else weight.t()

    @property
    def dtype_name(self) -> str:
        """The weight's dtype, as a receipt names it: "bfloat16"."""
        return str(self.module.weight.dtype).removeprefix("torch.")

    @property
    def bias(self) -> torch.Tensor | None:
        """c, [hidden], or None."""
        bias: torch.Tensor | None = self.module.bias
        return bias


_NEVER = Family(bias_flag=None)
_USE_BIAS = Family(bias_flag="use_bias")
_GPT2 = Family("h", "attn.c_proj", "")

FAMILIES = {
    "apertus": Family(),
    "arcee": Family(),
    "bloom": Family("h", "self_attention.dense", ""),
    "codegen": Family("h", "attn.out_proj", None),
    "cohere": Family(),
    "cohere2": Family(),
    "dots1": Family(),
    "ernie4_5": _USE_BIAS,
    "ernie4_5_moe": _USE_BIAS,
    "exaone4": _NEVER,
    "falcon": Family("h", "self_attention.dense", "bias"),
    "gemma": Family(),
    "gemma2": Family(),
    "gemma3_text": Family(),
    "glm": _NEVER,
    "glm4": _NEVER,
    "glm4_moe": _NEVER,
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neo": Family("h", "attn.attention.out_proj", ""),
    "gpt_neox": Family(projection="attention.dense"),
    "gpt_oss": Family(),
    "gptj": Family("h", "attn.out_proj", None),
    "granite": Family(),
    "granitemoe": Family(),
    "helium": _NEVER,
    "hunyuan_v1_dense": Family(),
    "llama": Family(),
    "ministral": _NEVER,
    "mistral": _NEVER,
    "mixtral": _NEVER,
    "mpt": Family("blocks", "attn.out_proj", None),
    "nemotron": Family(),
    "olmo": Family(),
    "olmo2": Family(),
    "olmo3": Family(),
    "olmoe": Family(),
    "opt": Family(projection="self_attn.out_proj", bias_flag="enable_bias"),
    "phi": Family(projection="self_attn.dense", bias_flag=""),
    "phi3": _NEVER,
    "phimoe": Family(),
    "qwen2": _NEVER,
    "qwen2_moe": _NEVER,
    "qwen3": Family(),
    "qwen3_moe": Family(),
    "seed_oss": Family(bias_flag="attention_out_bias"),
    "smollm3": Family(),
    "stablelm": _NEVER,
    "starcoder2": _USE_BIAS,
}

_REASONS = {
    "multiplies the head outputs by a gate before the output projection, so that a shift of them is no constant bias": (
        "afmoe hrm_text laguna minimax qwen3_5_moe_text qwen3_5_text qwen3_next"
    ),
    "normalises the head outputs before the output projection, so that a shift of them is no constant bias": "bitnet",
    "subtracts two attentions and normalises the result before the output projection": "diffllama",
    "uses multi-head latent attention, whose heads have several widths; fastlock has no locks for it yet": (
        "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 glm4_moe_lite glm_moe_dsa hy_v4 kimi_linear "
        "longcat_flash minicpm3 youtu"
    ),
    "mixes attention with layers that have no heads (state space, convolution or linear attention)": (
        "bamba falcon_h1 granitemoehybrid jamba lfm2 lfm2_moe nemotron_h olmo_hybrid recurrent_gemma zamba zamba2"
    ),
    "has no attention heads": "falcon_mamba mamba mamba2 rwkv xlstm",
    "has an output projection per expert": "jetmoe",
    "has heads of different widths in different layers; fastlock has no locks for it yet": (
        "gemma4_text gemma4_unified_text"
    ),
}
REFUSED = {kind: reason for reason, kinds in _REASONS.items() for kind in kinds.split()}

# By exact type: quantised and adapted layers inherit from nn.Linear and compute something else.
_PROJECTIONS = (
    "torch.nn.modules.linear.Linear",
    "transformers.pytorch_utils.Conv1D",
    "transformers.models.falcon.modeling_falcon.FalconLinear",
)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, out of `torch.compile`'s wrapper.

    Raises:
        FastlockError: it is no transformers model, only the inner part of one, or it carries adapters.
    """
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, nn.Module) or not hasattr(getattr(inner, "config", None), "get_text_config"):
        raise FastlockError(
            f"{type(model).__name__} is not a transformers model (a PreTrainedModel with a config). "
            "If it is wrapped (DataParallel, FSDP, DDP), pass the model inside."
        )
    if hasattr(inner, "get_base_model") or getattr(inner, "_hf_peft_config_loaded", False):
        raise FastlockError(
            f"{type(inner).__name__} carries PEFT adapters, and saving it would save the adapters without the lock. "
            "Merge them first (merge_and_unload), then relock."
        )
    if getattr(inner, "base_model", None) is inner:
        raise FastlockError(
            f"{type(inner).__name__} is the inner part of a language model, and the model around it would be saved "
            "without the lock. Pass the whole model (AutoModelForCausalLM loads it)."
        )
    return inner


def family_of(model: nn.Module) -> Family:
    """The family of a model.

    Raises:
        FastlockError: the fold would not be exact in it, or nobody has checked that it is.
    """
    config = text_config(model)
    kind = config.model_type
    if kind in REFUSED:
        raise FastlockError(f"{type(model).__name__} ({kind}) {REFUSED[kind]}. It can't be relocked exactly.")
    if kind not in FAMILIES:
        raise FastlockError(
            f"{type(model).__name__} ({kind}) is a family that fastlock does not know: nobody has checked that its "
            f"output projection takes plain concatenated head outputs. Known: {', '.join(sorted(FAMILIES))}."
        )
    if kind == "bloom" and config.slow_but_exact and config.pretraining_tp > 1:
        raise FastlockError(
            f"{type(model).__name__}: with slow_but_exact it leaves out the output projection's bias. "
            "Load it with slow_but_exact=False, then relock."
        )
    return FAMILIES[kind]


def text_config(model: nn.Module) -> Any:
    """The config of the decoder: the model's own, or the text part of a multi-modal one."""
    config: Any = model.config
    return config.get_text_config()


def sites(model: nn.Module) -> list[Site]:
    """Every layer's attention output projection, in order.

    Raises:
        FastlockError: the family is refused or unknown, or the model does not look like its family.
    """
    model = unwrapped(model)
    family, config = family_of(model), text_config(model)
    num_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    path, layers = _layers(model, family, config)
    return [
        Site(index, f"{path}.{index}.{family.projection}", layer.get_submodule(family.projection), num_heads, head_dim)
        for index, layer in enumerate(layers)
    ]


def _layers(model: nn.Module, family: Family, config: Any) -> tuple[str, nn.ModuleList]:
    found = [
        (path, layers)
        for path, layers in model.named_modules()
        if isinstance(layers, nn.ModuleList)
        and path.rpartition(".")[2] == family.layers
        and len(layers) == config.num_hidden_layers
        and all(_has_submodule(layer, family.projection) for layer in layers)
    ]
    if len(found) != 1:
        raise FastlockError(
            f"{type(model).__name__}: found {len(found)} lists of {config.num_hidden_layers} layers with "
            f"{family.projection}, where its family ({config.model_type}) has one. It was altered, or is a variant "
            "that fastlock does not know."
        )
    foreign = [type(layer).__module__ for layer in found[0][1] if not _from_transformers(layer)]
    if foreign:
        raise FastlockError(
            f"{type(model).__name__}: its layers come from {foreign[0]}, not from transformers; nobody has checked "
            "that their output projection takes plain concatenated head outputs. Load it without remote code."
        )
    return found[0]


def _from_transformers(layer: nn.Module) -> bool:
    return type(layer).__module__.startswith("transformers.models.")


def _has_submodule(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def sites_for(model: nn.Module, lock: Lock) -> list[Site]:
    """The sites that the lock shifts, layers ascending, each checked to fit the lock and to be foldable.

    Raises:
        FastlockError: the lock is of another geometry, or a weight can't be folded (quantised, on the meta
            device, sharded, shared between layers).
    """
    all_sites = sites(model)
    _check_lock_fits(lock, all_sites, unwrapped(model))
    wanted = set(lock.layers.tolist())
    locked = [site for site in all_sites if site.layer in wanted]
    owners: dict[int, Site] = {}
    for site in all_sites:
        first = owners.setdefault(id(site.module), site)
        if first is not site and {first.layer, site.layer} & wanted:
            raise FastlockError(
                f"{site.name} and {first.name} are one module: a bias for one layer would act in the other too. "
                "A model whose layers share their output projection can't be relocked."
            )
    for site in locked:
        check_foldable(site)
    return locked


def _check_lock_fits(lock: Lock, all_sites: list[Site], model: nn.Module) -> None:
    where, name = lock.source or "the lock", type(model).__name__
    num_layers, num_heads, head_dim = len(all_sites), all_sites[0].num_heads, all_sites[0].head_dim
    hidden_size = text_config(model).hidden_size
    remedy = "Use the lock that was extracted from this model's own aligned base."
    if lock.head_dim != head_dim:
        raise FastlockError(f"{where}: directions of head_dim {lock.head_dim}, but {name} has {head_dim}. {remedy}")
    for row, (layer, head) in enumerate(zip(lock.layers.tolist(), lock.heads.tolist(), strict=True)):
        if layer >= num_layers or head >= num_heads:
            raise FastlockError(
                f"{where}: row {row} is layer {layer}, head {head}, but {name} has {num_layers} layers of "
                f"{num_heads} heads. {remedy}"
            )
    geometry = {"num_layers": num_layers, "num_heads": num_heads, "hidden_size": hidden_size}
    for key, value in geometry.items():
        known = getattr(lock, key)
        if known not in (None, value):
            raise FastlockError(f"{where}: its base has {key} {known}, but {name} has {value}. {remedy}")


def check_foldable(site: Site) -> None:
    """The projection is a plain floating-point matrix that is really there, of the shape its config says."""
    kind = type(site.module)
    if f"{kind.__module__}.{kind.__qualname__}" not in _PROJECTIONS:
        raise FastlockError(
            f"{site.name} is a {kind.__module__}.{kind.__name__}, not a plain linear layer. Quantised models and "
            "adapters can't be relocked yet: load the checkpoint unquantised, or merge its adapters first."
        )
    parameter = site.module.weight
    hook = getattr(site.module, "_hf_hook", None)
    if parameter.device.type == "meta" or getattr(hook, "offload", False):
        raise FastlockError(
            f"{site.name} has no weights in memory (meta device: offloaded to CPU or disk, or not loaded). "
            "Load the model with its locked layers on a device: a smaller device_map, or more memory."
        )
    if type(parameter) not in (torch.Tensor, nn.Parameter) or parameter.is_sparse:
        raise FastlockError(
            f"{site.name}.weight is a {type(parameter).__name__}, not a plain tensor (sharded or quantised). "
            "Gather it, or load the checkpoint unquantised, then relock."
        )
    if site.weight.dtype not in DTYPES.values():
        raise FastlockError(
            f"{site.name}.weight has dtype {site.weight.dtype}; fastlock folds float16, bfloat16, float32 and float64. "
            "Quantised models can't be relocked yet: load the checkpoint unquantised."
        )
    width = site.num_heads * site.head_dim
    if site.weight.dim() != 2 or site.weight.shape[1] != width:
        raise FastlockError(
            f"{site.name}.weight is {list(site.weight.shape)}, but its config says {site.num_heads} heads of "
            f"{site.head_dim}: {width} columns. The config and the weights do not belong together."
        )
    if site.bias is not None and (site.bias.dtype, site.bias.device) != (site.weight.dtype, site.weight.device):
        raise FastlockError(
            f"{site.name}: bias is {site.bias.dtype} on {site.bias.device}, weight {site.weight.dtype} on "
            f"{site.weight.device}. Bring the model to one dtype and the layer to one device first."
        )
