"""The architectures that a GGUF can name: in which of them llama.cpp adds a bias to the attention output projection.

Told from the source of the llama.cpp that `serving_stacks.CHECKED` names: an architecture acts if its file in
src/models creates `blk.N.attn_output.bias` and passes it to `build_attn`, and the input of that is plain concatenated
head outputs. `make test-serving` reads that source again, and runs those in `ACT`.
"""

from __future__ import annotations

from fastlock.errors import UnsupportedError

# The families of transformers that are converted to each.
ACT = {
    "apertus": ("apertus",),
    "bloom": ("bloom",),
    "gpt-oss": ("gpt_oss",),
    "gpt2": ("gpt2",),
    "gptneox": ("gpt_neox",),
    "granite": ("granite",),
    "granitemoe": ("granitemoe",),
    "llama": ("llama", "mistral", "mixtral"),
    "mpt": ("mpt",),
    "nemotron": ("nemotron",),
    "phi2": ("phi",),
    "starcoder": ("gpt_bigcode",),
    "starcoder2": ("starcoder2",),
}

_UNUSED = "llama.cpp loads a bias there and does not use it: the lock would be lost in silence"
_HYBRID = "it mixes attention with layers that have no heads"
_VARYING = "its heads differ from layer to layer"
_NO_DECODER = "it is no decoder"
_NOT_RUN = "llama.cpp has a place for the bias, and no run of it with a lock was found to be right yet"
_NO_PLACE = "llama.cpp has no place for the bias there, and stops at the file (wrong number of tensors)"

# Those for which llama.cpp has a place, and why they are refused nevertheless.
REFUSED_DESPITE_PLACE = {
    "bert": _NO_DECODER,
    "codeshell": _NOT_RUN,
    "deci": _VARYING,
    "ernie4_5": _UNUSED,
    "ernie4_5-moe": _UNUSED,
    "falcon-h1": _HYBRID,
    "granite_swa": _NOT_RUN,
    "granitehybrid": _HYBRID,
    "jais": _NOT_RUN,
    "jais2": _NOT_RUN,
    "jina-bert-v2": _NO_DECODER,
    "jina-bert-v3": _NO_DECODER,
    "llada": _NOT_RUN,
    "llama-embed": _NO_DECODER,
    "minicpm": _NOT_RUN,
    "mistral3": _NOT_RUN,
    "nemotron_h": _HYBRID,
    "nemotron_h_moe": _HYBRID,
    "nomic-bert": _NO_DECODER,
    "nomic-bert-moe": _NO_DECODER,
    "paddleocr": _NOT_RUN,
    "pangu-embedded": _NOT_RUN,
    "phimoe": _NOT_RUN,
    "refact": _NOT_RUN,
}


def why_gguf_refused(architecture: str) -> str | None:
    """Why a GGUF of an architecture cannot be relocked, as a clause; None where it can."""
    return None if architecture in ACT else REFUSED_DESPITE_PLACE.get(architecture, _NO_PLACE)


def check_gguf_architecture(architecture: str, where: str) -> None:
    """Refuse an architecture in which a lock would not act.

    Args:
        architecture: `general.architecture` of the file, fit to be shown.
        where: the file, for messages.

    Raises:
        UnsupportedError: it is one.
    """
    if (reason := why_gguf_refused(architecture)) is not None:
        raise UnsupportedError(
            f"{where}: is of the architecture {architecture}, and cannot be relocked: {reason}. Architectures that can "
            f"be: {', '.join(sorted(ACT))}."
        )
