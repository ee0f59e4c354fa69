"""The families: where each keeps its output projection, and whether a bias there is kept; and those we refuse."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from fastlock.errors import MismatchError, UnsupportedError

if TYPE_CHECKING:  # the command's help reads these tables, and imports no torch for it
    from fastlock.locks.lock import Lock

# The modules of a layer to which most families' flag gives a bias.
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")


class Family(NamedTuple):
    """How one model family of transformers keeps its attention output projection.

    Attributes:
        layers: last part of the path of the decoder's list of layers.
        projection: path of the output projection inside a layer.
        bias_flag: the config key that gives the projection a bias; "" where it always has one; None where the
            family cannot have one: transformers then drops it, without an error, when a checkpoint is loaded.
        switched: the modules of a layer to which that key gives a bias; "lm_head" is the model's.
        transposed: whether its weight is kept as [num_heads * head_dim, hidden] (GPT-2's Conv1D).
    """

    layers: str = "layers"
    projection: str = "self_attn.o_proj"
    bias_flag: str | None = "attention_bias"
    switched: tuple[str, ...] = ATTENTION
    transposed: bool = False


_NEVER = Family(bias_flag=None)

_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

_SHARED_EXPERTS = ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj", "mlp.shared_experts.down_proj")

# By model_type.
FAMILIES = {
    "apertus": Family(),
    "arcee": Family(),
    "bloom": Family("h", "self_attention.dense", ""),
    "codegen": Family("h", "attn.out_proj", None),
    "cohere": Family(),
    "cohere2": Family(),
    "dots1": Family(),
    "ernie4_5": Family(bias_flag="use_bias", switched=ATTENTION + _MLP),
    "ernie4_5_moe": Family(bias_flag="use_bias", switched=ATTENTION + _MLP + _SHARED_EXPERTS + ("lm_head",)),
    "exaone4": _NEVER,
    "falcon": Family(
        "h",
        "self_attention.dense",
        "bias",
        ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
    "gemma": Family(),
    "gemma2": Family(),
    "gemma3_text": Family(),
    "glm": _NEVER,
    "glm4": _NEVER,
    "glm4_moe": _NEVER,
    "gpt2": Family("h", "attn.c_proj", "", transposed=True),
    "gpt_bigcode": Family("h", "attn.c_proj", ""),
    "gpt_neo": Family("h", "attn.attention.out_proj", ""),
    "gpt_neox": Family(projection="attention.dense", switched=("attention.query_key_value", "attention.dense")),
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
    "opt": Family(
        projection="self_attn.out_proj",
        bias_flag="enable_bias",
        switched=(*ATTENTION[:3], "self_attn.out_proj", "fc1", "fc2"),
    ),
    "phi": Family(projection="self_attn.dense", bias_flag=""),
    "phi3": _NEVER,
    "phimoe": Family(),
    "qwen2": _NEVER,
    "qwen2_moe": _NEVER,
    "qwen3": Family(),
    "qwen3_moe": Family(),
    "seed_oss": Family(bias_flag="attention_out_bias", switched=("self_attn.o_proj",)),
    "smollm3": Family(),
    "stablelm": _NEVER,
    "starcoder2": Family(bias_flag="use_bias", switched=(*ATTENTION, "mlp.c_fc", "mlp.c_proj")),
}

_REASONS = {
    "multiplies the head outputs by a gate before the output projection: a shift of them is not a constant bias": (
        "afmoe hrm_text laguna minimax qwen3_5_moe_text qwen3_5_text qwen3_next"
    ),
    "normalises the head outputs before the output projection: a shift of them is not a constant bias": "bitnet",
    "subtracts two attentions and normalises the result before the output projection": "diffllama",
    "uses multi-head latent attention, whose heads have several widths; fastlock does not support it yet": (
        "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 glm4_moe_lite glm_moe_dsa hy_v4 kimi_linear "
        "longcat_flash minicpm3 youtu"
    ),
    "mixes attention with layers that have no heads (state space, convolution or linear attention)": (
        "bamba falcon_h1 granitemoehybrid jamba lfm2 lfm2_moe nemotron_h olmo_hybrid recurrent_gemma zamba zamba2"
    ),
    "has no attention heads": "falcon_mamba mamba mamba2 rwkv xlstm",
    "has an output projection per expert": "jetmoe",
    "has heads of different widths in different layers; fastlock does not support it yet": (
        "gemma4_text gemma4_unified_text"
    ),
}

# The reason of each model_type, in words that can follow its name.
REFUSED = {model_type: reason for reason, model_types in _REASONS.items() for model_type in model_types.split()}


def family_of_config(config: Any, name: str) -> Family:
    """The family of a decoder.

    Args:
        config: the decoder's config, as transformers reads it.
        name: whose config it is, for messages.

    Raises:
        UnsupportedError: the fold would not be exact in this family, or nobody has checked whether it is.
    """
    model_type = config.model_type
    if model_type in REFUSED:
        raise refused_family(model_type, name)
    if model_type not in FAMILIES:
        raise UnsupportedError(
            f"{name}: fastlock does not know the family {model_type}. Nobody has checked that its output projection "
            f"takes plain concatenated head outputs. Known families: {', '.join(sorted(FAMILIES))}."
        )
    if model_type == "bloom" and config.slow_but_exact and config.pretraining_tp > 1:
        raise UnsupportedError(
            f"{name}: with slow_but_exact it leaves out the output projection's bias. "
            "Load it with slow_but_exact=False, then relock."
        )
    return FAMILIES[model_type]


def refused_family(model_type: str, name: str) -> UnsupportedError:
    """The error for a family of `REFUSED`; `name` says whose it is."""
    return UnsupportedError(f"{name} ({model_type}) {REFUSED[model_type]}. It cannot be relocked exactly.")


def head_geometry(config: Any) -> tuple[int, int]:
    """num_heads and head_dim of a decoder's config."""
    num_heads: int = config.num_attention_heads
    return num_heads, getattr(config, "head_dim", None) or config.hidden_size // num_heads


def check_lock_fits(lock: Lock, num_layers: int, config: Any, name: str) -> None:
    """Refuse a lock whose geometry is not that of a decoder.

    Args:
        lock: the lock.
        num_layers: how many layers the decoder has.
        config: the decoder's config, as transformers reads it.
        name: whose config it is, for messages.

    Raises:
        MismatchError: the lock is of another geometry.
    """
    where = lock.source or "the lock"
    num_heads, head_dim = head_geometry(config)
    remedy = "Use the lock that was extracted from this model's own aligned base."
    if lock.head_dim != head_dim:
        raise MismatchError(f"{where}: directions of head_dim {lock.head_dim}, but {name} has {head_dim}. {remedy}")
    for row, (layer, head) in enumerate(zip(lock.layers.tolist(), lock.heads.tolist(), strict=True)):
        if layer >= num_layers or head >= num_heads:
            raise MismatchError(
                f"{where}: row {row} is layer {layer}, head {head}, but {name} has {num_layers} layers of "
                f"{num_heads} heads. {remedy}"
            )
    geometry = {"num_layers": num_layers, "num_heads": num_heads, "hidden_size": config.hidden_size}
    for key, value in geometry.items():
        recorded = getattr(lock, key)
        if recorded not in (None, value):
            raise MismatchError(f"{where}: its base has {key} {recorded}, but {name} has {value}. {remedy}")
