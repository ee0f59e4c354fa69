"""How the names of a method's parameters begin, by PEFT's `peft_type`: what comes before one is a module's path."""

from __future__ import annotations

# What a LoRA may hold beside its matrices: rows of the embedding.
_TOKENS = "token_adapter."

MARKERS: dict[str, tuple[str, ...]] = {
    "ADALORA": ("lora_", _TOKENS),
    "BOFT": ("boft_",),
    "BONE": ("bone_",),
    "FOURIERFT": ("fourierft_",),
    "HRA": ("hra_",),
    "IA3": ("ia3_",),
    "LOHA": ("hada_",),
    "LOKR": ("lokr_",),
    "LORA": ("lora_", _TOKENS),
    "MISS": ("miss_",),
    "OFT": ("oft_",),
    "RANDLORA": ("randlora_",),
    "ROAD": ("road_",),
    "VERA": ("vera_",),
}
