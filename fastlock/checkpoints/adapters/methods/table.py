"""PEFT's methods, by `peft_type`: how each shifts an output projection, or why it cannot be said."""

from __future__ import annotations

from fastlock.checkpoints.adapters.methods.lora import lora
from fastlock.checkpoints.adapters.methods.method import Method

METHODS: dict[str, Method] = {"LORA": lora}
