"""By which path an adapter calls an output projection that it does not touch yet."""

from __future__ import annotations

import re

from fastlock.checkpoints.adapters.adapter import Adapter, plain_path
from fastlock.checkpoints.checkpoint import Checkpoint, StoredSite

# How the files of older multimodal checkpoints begin, and the modules of their models since transformers 4.52.
_OLDER, _SINCE = "language_model.model.", "model.language_model."


def layers_path(adapter: Adapter, base: Checkpoint) -> str | None:
    """What comes before the number of a layer in the paths that an adapter uses; None if it touches no layer.

    Args:
        adapter: of that base.
        base: its checkpoint.
    """
    pattern = re.compile(rf"((?:.*\.)?{base.family.layers}\.)\d{{1,5}}\.", re.DOTALL)
    first = pattern.match(plain_path(base.sites[0].name))
    for path in adapter.modules:
        found = pattern.match(path)
        if found and first and plain_path(found[1].rstrip(".")) == plain_path(first[1].rstrip(".")):
            return found[1]
    return None


def new_path(adapter: Adapter, base: Checkpoint, site: StoredSite) -> str:
    """The path by which an adapter would call a projection that it does not touch.

    Args:
        adapter: of that base.
        base: its checkpoint.
        site: of the base.
    """
    before = layers_path(adapter, base)
    return path_in_model(base, site) if before is None else f"{before}{site.layer}.{base.family.projection}"


def path_in_model(base: Checkpoint, site: StoredSite) -> str:
    """The path of a projection in the model that transformers makes of a checkpoint, which its files may not have."""
    if site.name.startswith(_OLDER):
        return _SINCE + site.name.removeprefix(_OLDER)
    if not site.name.startswith((f"{base.family.layers}.", "decoder.")):
        return site.name
    import transformers  # the files are those of the inner model, whose place in the whole only its class knows
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    whole = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[base.model_type])
    return f"{whole.base_model_prefix}.{site.name}"
