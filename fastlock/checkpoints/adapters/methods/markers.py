"""How the names of a method's parameters begin, by PEFT's `peft_type`: what comes before one is a module's path."""

from __future__ import annotations

# What a LoRA may hold beside its matrices: rows of the embedding.
_TOKENS = "token_adapter."

MARKERS: dict[str, tuple[str, ...]] = {
    "ADALORA": ("lora_", _TOKENS),
    "ADAMSS": ("adamss_",),
    "BEFT": ("beft_",),
    "BOFT": ("boft_",),
    "BONE": ("bone_",),
    "C3A": ("c3a_",),
    "DEFT": ("deft_",),
    "DELORA": ("delora_",),
    "FOURIERFT": ("fourierft_",),
    "FROD": ("frod_",),
    "GLORA": ("glora_",),
    "GRALORA": ("gralora_",),
    "HIRA": ("hira_",),
    "HRA": ("hra_",),
    "IA3": ("ia3_",),
    "LN_TUNING": ("ln_tuning_",),
    "LOHA": ("hada_",),
    "LOKR": ("lokr_",),
    "LORA": ("lora_", _TOKENS),
    "MISS": ("miss_",),
    "OFT": ("oft_",),
    "OSF": ("osf_", "_osf_"),
    "PEANUT": ("peanut_",),
    "PSOFT": ("psoft_",),
    "PVERA": ("pvera_",),
    "RANDLORA": ("randlora_",),
    "ROAD": ("road_",),
    "SHIRA": ("shira_",),
    "SUPERTUNING": ("supertuning_",),
    "TRAINABLE_TOKENS": ("trainable_tokens_", _TOKENS),
    "VBLORA": ("vblora_",),
    "VERA": ("vera_",),
    "WAVEFT": ("waveft_",),
}
