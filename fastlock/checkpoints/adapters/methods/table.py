"""PEFT's methods, by `peft_type`: how each shifts an output projection, or why that cannot be said.

Every `peft_type` of PEFT 0.21 stands in one of these tables; a test fails when a release brings another.
"""

from __future__ import annotations

from fastlock.checkpoints.adapters.adapter import Adapter
from fastlock.checkpoints.adapters.methods.adalora import adalora
from fastlock.checkpoints.adapters.methods.by_peft import by_peft
from fastlock.checkpoints.adapters.methods.ia3 import ia3
from fastlock.checkpoints.adapters.methods.lora_kinds import lora
from fastlock.checkpoints.adapters.methods.method import Method
from fastlock.checkpoints.adapters.methods.vera import vera
from fastlock.errors import UnsupportedError, shown

METHODS: dict[str, Method] = {
    "ADALORA": adalora,
    "BEFT": by_peft,
    "BOFT": by_peft,
    "BONE": by_peft,
    "DELORA": by_peft,
    "FOURIERFT": by_peft,
    "GRALORA": by_peft,
    "HIRA": by_peft,
    "HRA": by_peft,
    "IA3": ia3,
    "LOHA": by_peft,
    "LOKR": by_peft,
    "LORA": lora,
    "MISS": by_peft,
    "OFT": by_peft,
    "PEANUT": by_peft,
    "PVERA": by_peft,
    "RANDLORA": by_peft,
    "ROAD": by_peft,
    "SHIRA": by_peft,
    "SUPERTUNING": by_peft,
    "VBLORA": by_peft,
    "VERA": vera,
    "WAVEFT": by_peft,
}

# They change what goes into the first layer, what attention reads, or norms: no output projection. A displacement at
# every position is one at the positions that they add, too, and so is a bias.
ELSEWHERE = frozenset(
    (
        "CARTRIDGE",
        "CPT",
        "LN_TUNING",
        "MULTITASK_PROMPT_TUNING",
        "PREFIX_TUNING",
        "PROMPT_TUNING",
        "P_TUNING",
        "TRAINABLE_TOKENS",
    )
)

# Refused where they touch a locked projection.
REFUSED_AT_SITES: dict[str, str] = {
    "ADAMSS": "starts from a decomposition of its base's weights that loading makes anew",
    "C3A": "is computed in float32 by PEFT, and a fold would not be exact",
    "DEFT": "is computed from decompositions that PEFT makes in float32, and a fold would not be exact",
    "FROD": "starts from a decomposition of all its base's weights that loading makes anew",
    "GLORA": "scales its base's bias and adds to it, which fastlock has not checked",
    "OSF": "starts from a decomposition of its base's weights that loading makes anew",
    "PSOFT": "starts from a decomposition of its base's weights that loading makes anew",
}

# Refused at all: which projections they touch, or how, cannot be told from the tensors of one.
REFUSED_METHODS: dict[str, str] = {
    "ADAPTION_PROMPT": "sends a second attention through the output projection, whose bias then acts twice",
    "LILY": "mixes what layers share by a router, which depends on the input",
    "POLY": "mixes LoRAs by the task that a request names",
    "SHADOW": "runs a second network beside its base",
    "TINYLORA": "keeps what it trains in vectors that modules share, and says nowhere which share one",
    "UNILORA": "keeps all that it trains in one vector, and says nowhere which modules use it",
    "XLORA": "mixes LoRAs by a network that depends on the input",
}

_MERGE = "Merge it into its base (merge_and_unload, save_pretrained) if PEFT can, and relock the result."


def check_method(adapter: Adapter) -> None:
    """Refuse an adapter of a method of which nothing can be said, wherever it acts.

    Raises:
        UnsupportedError: it is.
    """
    method = adapter.method
    if method in REFUSED_METHODS:
        raise UnsupportedError(f"{adapter.where}: is of the method {method}, which {REFUSED_METHODS[method]}. {_MERGE}")
    if method not in METHODS and method not in ELSEWHERE and method not in REFUSED_AT_SITES:
        raise UnsupportedError(
            f"{adapter.where}: is of the method {shown(method)[:40]}, which fastlock does not know. {_MERGE}"
        )


def method_at(adapter: Adapter, path: str) -> Method:
    """How an adapter's method shifts a projection that it touches.

    Raises:
        UnsupportedError: that cannot be said.
    """
    if (method := METHODS.get(adapter.method)) is not None:
        return method
    reason = REFUSED_AT_SITES.get(adapter.method, "is not known to touch output projections, but does")
    raise UnsupportedError(f"{adapter.where}: {path}: is of the method {adapter.method}, which {reason}. {_MERGE}")
