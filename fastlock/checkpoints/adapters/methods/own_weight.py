"""`modules_to_save`: the adapter has a projection of its own, W′ x + c′, instead of its base's."""

from __future__ import annotations

from fastlock.checkpoints.adapters.methods.method import AdaptedSite, Effect, stored
from fastlock.checkpoints.adapters.methods.products import displaced

# What PEFT calls the bias of an adapted layer of its base, which the adapter holds instead of the base's.
OWN_BIASES = ("bias", "base_layer.bias")
OWN_WEIGHT = "weight"


def own_weight(at: AdaptedSite) -> Effect:
    """As of `Method`."""
    shape = (at.site.hidden_size, at.width)
    weight = stored(at, OWN_WEIGHT, shape[::-1] if at.site.transposed else shape)
    return Effect(displaced(at, weight.t() if at.site.transposed else weight), "replaced", None, None, (weight,))
