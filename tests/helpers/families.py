"""A tiny random model of the real class of every family that fastlock supports, random locks that fit, a tokenizer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import fastlock

COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
GQA = {"num_key_value_heads": 2, "intermediate_size": 96}
# head_dim 32 with 4 heads of a hidden size of 64: not hidden_size / num_attention_heads.
WIDE = {**GQA, "head_dim": 32}
WINDOW = {"sliding_window": 4}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
}

# What runs in float64, and in every family.
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}

CONFIGS: dict[str, dict[str, Any]] = {
    "apertus": GQA,
    "arcee": WIDE,
    "bloom": {},
    "codegen": {"n_positions": 64, "rotary_dim": 8},
    "cohere": GQA,
    "cohere2": {**GQA, **WINDOW},
    "dots1": {**GQA, **ROUTED, **WINDOW},
    "ernie4_5": WIDE,
    "ernie4_5_moe": {**GQA, "moe_intermediate_size": 32, "moe_num_experts": 4, "moe_k": 2},
    "exaone4": {**GQA, **WINDOW},
    "falcon": {},
    "gemma": WIDE,
    "gemma2": {**WIDE, **WINDOW},
    "gemma3_text": {**WIDE, **WINDOW},
    "glm": WIDE,
    "glm4": WIDE,
    "glm4_moe": {**GQA, **ROUTED},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global"], 1], [["local"], 2]], "window_size": 4},
    "gpt_neox": {"intermediate_size": 96},
    "gpt_oss": {**WIDE, **MOE, **WINDOW},
    "gptj": {"rotary_dim": 8},
    "granite": GQA,
    "granitemoe": {**GQA, **MOE},
    "helium": {**GQA, "head_dim": 16},
    "hunyuan_v1_dense": WIDE,
    "llama": WIDE,
    "ministral": {**WIDE, **WINDOW},
    "mistral": {**WIDE, "sliding_window": None},
    "mixtral": {**WIDE, **MOE, **WINDOW},
    "mpt": {},
    "nemotron": WIDE,
    "olmo": GQA,
    "olmo2": GQA,
    "olmo3": {**GQA, **WINDOW},
    "olmoe": {**GQA, "num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi": GQA,
    "phi3": {**GQA, **WINDOW},
    "phimoe": {**GQA, **MOE, **WINDOW},
    "qwen2": {**GQA, "head_dim": 32},
    "qwen2_moe": {
        **GQA,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen3": WIDE,
    "qwen3_moe": {**WIDE, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    "seed_oss": WIDE,
    "smollm3": GQA,
    "stablelm": GQA,
    "starcoder2": GQA,
}


def tiny_config(kind: str, **changes: Any) -> Any:
    """The config of a tiny model of a family."""
    keys = {**COMMON, **CONFIGS[kind], **changes}
    names = AutoConfig.for_model(kind).attribute_map
    return AutoConfig.for_model(kind, **{names.get(key, key): value for key, value in keys.items()})


def tiny_model(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> nn.Module:
    """A tiny model of a family's real class with every parameter random, biases and norms included."""
    config = tiny_config(kind, **changes)
    return randomized(AutoModelForCausalLM.from_config(config, dtype=dtype, **EAGER), seed)


def reload(directory: Any) -> nn.Module:
    """What `from_pretrained` makes of a directory, computing as `tiny_model` does, to the bit.

    The weights are copied to addresses that the allocator aligns, as the original's are: where a file begins its
    data depends on the length of its header, and a matrix product of the CPU may round otherwise at other alignments.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", **EAGER)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def tiny_gemma3(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A Gemma 3 with its vision tower, whose decoder sits deeper in the model."""
    text = tiny_config("gemma3_text").to_dict()
    config = transformers.Gemma3Config(text_config=text, vision_config=_TINY_VISION, mm_tokens_per_image=4)
    return randomized(transformers.Gemma3ForConditionalGeneration(config).to(dtype), seed)


def tiny_llava(seed: int = 0) -> nn.Module:
    """A LLaVA of a Llama, which AutoModelForCausalLM does not know."""
    vision = {"model_type": "clip_vision_model"} | _TINY_VISION
    config = transformers.LlavaConfig(text_config=tiny_config("llama").to_dict(), vision_config=vision)
    return randomized(transformers.LlavaForConditionalGeneration(config), seed)


_TINY_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def randomized(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            is_norm = parameter.dim() == 1 and not name.endswith("bias")
            parameter.copy_(1 + 0.2 * noise if is_norm else 0.25 * noise)
    return model.eval()


def random_lock(
    model: nn.Module, rows: list[tuple[int, int]] | None = None, seed: int = 1, **geometry: Any
) -> fastlock.Lock:
    """A random lock on given (layer, head) rows, by default two heads of layer 0 and one of the last layer."""
    config = model.config.get_text_config()
    rows = rows or [(0, 3), (0, 1), (config.num_hidden_layers - 1, 2)]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(len(rows), head_dim, generator=generator)
    return fastlock.Lock(
        layers=torch.tensor([layer for layer, _ in rows]),
        heads=torch.tensor([head for _, head in rows]),
        directions=directions / directions.norm(dim=1, keepdim=True),
        scales=torch.rand(len(rows), generator=generator) + 0.1,
        **geometry,
    )


def gated_lock(
    model: nn.Module, rows: list[tuple[int, int]] | None = None, seed: int = 1, rank: int = 2, constant: bool = True
) -> fastlock.Lock:
    """As `random_lock`, with a random gate besides; or with nothing else."""
    lock = random_lock(model, rows, seed)
    generator = torch.Generator().manual_seed(seed + 1000)
    readers, writers = (0.2 * torch.randn(len(lock), rank, lock.head_dim, generator=generator) for _ in range(2))
    parts = (lock.directions, lock.scales) if constant else (torch.zeros_like(lock.directions), torch.zeros(len(lock)))
    directions, scales = parts
    return replace(lock, directions=directions, scales=scales, readers=readers, writers=writers)


def tokens(length: int = 12, seed: int = 2) -> torch.Tensor:
    """A random prompt, [1, length], free of special tokens."""
    return torch.randint(3, 119, (1, length), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The logits at every position, [1, length, vocab]."""
    with torch.no_grad():
        return model(ids).logits


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every tensor of the model's state, and of the names of its missing biases."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two states hold the same names with the same bits."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(_bits(a[name]), _bits(b[name])) for name in a
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def word_tokenizer(pairs: tuple[fastlock.Pair, ...]) -> PreTrainedTokenizerFast:
    """One token a word."""
    words = Tokenizer(models.WordLevel(unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    texts = [text for pair in pairs for text in (pair.question, pair.safe, pair.unsafe)]
    words.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["?"]))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
