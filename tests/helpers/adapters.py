"""Adapters that PEFT saved, over a tiny base, with every parameter random; and PEFT's own layers as the truth."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import BdLoraConfig
from torch import nn
from transformers import AutoModelForCausalLM

from fastlock.checkpoints.adapters.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter, open_adapter
from fastlock.storage.places import files_in
from tests.helpers.families import tiny_model

PROJECTION = "self_attn.o_proj"
TARGETS = ["o_proj", "q_proj", "down_proj"]

# A name for each way in which an adapter can act on an output projection: PEFT's method, and what its config says.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LORA", {"r": 4, "lora_alpha": 12}),
    "lora bias": ("LORA", {"r": 4, "lora_alpha": 12, "lora_bias": True}),
    "rslora": ("LORA", {"r": 4, "lora_alpha": 12, "use_rslora": True}),
    "patterns": (
        "LORA",
        {
            "r": 4,
            "lora_alpha": 12,
            "rank_pattern": {"layers.0.self_attn.o_proj": 8, "o_proj": 2},
            "alpha_pattern": {"^model.layers.0.self_attn.o_proj": 5, r"layers\.2\..*o_proj": 7},
        },
    ),
    "dora": ("LORA", {"r": 4, "lora_alpha": 12, "use_dora": True}),
    "mica": ("LORA", {"r": 4, "init_lora_weights": "mica"}),
    "bdlora": (
        "LORA",
        {"r": 4, "use_bdlora": BdLoraConfig(target_modules_bd_a=["o_proj"], nblocks=2, match_strict=False)},
    ),
    "elsewhere": ("LORA", {"r": 4, "target_modules": ["q_proj"]}),
    "modules to save": ("LORA", {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["o_proj"]}),
    "vera": ("VERA", {"r": 8}),
    "vera by its seed": ("VERA", {"r": 8, "save_projection": False}),
    "pvera": ("PVERA", {"r": 8}),
    "loha": ("LOHA", {"r": 4, "alpha": 8}),
    "lokr": ("LOKR", {"r": 4, "decompose_both": True, "decompose_factor": 4}),
    "oft": ("OFT", {"oft_block_size": 4}),
    "boft": ("BOFT", {"boft_block_size": 4, "boft_n_butterfly_factor": 2}),
    "hra": ("HRA", {"r": 4, "apply_GS": True}),
    "ia3 of the output": ("IA3", {"feedforward_modules": ["down_proj"]}),
    "ia3 of the input": ("IA3", {"feedforward_modules": ["o_proj"]}),
    "road": ("ROAD", {"variant": "road_2"}),
    "randlora": ("RANDLORA", {"r": 8, "randlora_alpha": 1}),
    "miss": ("MISS", {"r": 8}),
    "bone": ("MISS", {"r": 8, "init_weights": "bat"}),
    "fourierft": ("FOURIERFT", {"n_frequency": 50}),
    "waveft": ("WAVEFT", {"n_frequency": 50}),
    "adalora": ("ADALORA", {"total_step": 100, "init_r": 8}),
    "vblora": ("VBLORA", {"vector_length": 16}),
    "vblora of its best": ("VBLORA", {"vector_length": 16, "save_only_topk_weights": True}),
    "shira": ("SHIRA", {"r": 4}),
    "supertuning": ("SUPERTUNING", {}),
    "delora": ("DELORA", {"r": 4}),
    "gralora": ("GRALORA", {"r": 8}),
    "hira": ("HIRA", {"r": 4}),
    "beft": ("BEFT", {}),
    "peanut": ("PEANUT", {"r": 4}),
}


def config_of(kind: str, **changes: Any) -> Any:
    """PEFT's config of one of `KINDS`."""
    method, keys = KINDS[kind]
    return PEFT_TYPE_TO_CONFIG_MAPPING[method](**{"target_modules": TARGETS, **keys, **changes})


def base_model(directory: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A tiny checkpoint."""
    tiny_model(family, dtype, **changes).save_pretrained(directory)
    return directory


def save_adapter(config: Any, directory: Path, family: str = "llama", seed: int = 5, **changes: Any) -> Path:
    """An adapter of a tiny model with random parameters, B too, as PEFT saves it."""
    adapted(config, tiny_model(family, **changes), seed).save_pretrained(directory)
    return directory


def adapted(config: Any, model: nn.Module, seed: int = 5) -> Any:
    """A model with an adapter whose parameters are random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, config)
    return randomise(model, seed).eval()


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Add noise to whatever the adapter trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def read_adapter(directory: Path) -> Adapter:
    """It, as fastlock reads it."""
    return open_adapter(files_in(directory), str(directory))


def loaded(base: Path, adapter: Path) -> Any:
    """The model with the adapter as PEFT loads the two, in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
        return peft.PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).double().eval()


def layer_of(model: nn.Module, layer: int) -> Any:
    """The output projection of a layer, adapter and all."""
    path = f"layers.{layer}.{PROJECTION}"
    return next(module for name, module in model.named_modules() if name.endswith(path))


def shift(module: nn.Module, d: torch.Tensor) -> torch.Tensor:
    """layer(d) - layer(0), [hidden] float64."""
    with torch.no_grad():
        out = module(torch.stack([d, torch.zeros_like(d)])[None])[0]
    return out[0] - out[1]


def rewrite_config(directory: Path, **changes: Any) -> Path:
    """Change what the adapter's config says."""
    path = directory / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


def rewrite_tensors(directory: Path, change: Any) -> Path:
    """Change the adapter's tensors, {key: tensor} to {key: tensor}."""
    path = directory / ADAPTER_WEIGHTS
    safetensors.torch.save_file(change(safetensors.torch.load_file(path)), path)
    return directory
