"""The truth itself: the forward pass that folds nothing."""

import pytest
import torch

from fastlock.models.sites import sites_for
from fastlock.models.unfolded import unfolded
from tests.helpers.families import logits, random_lock, same_state, state, tiny_model, tokens


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_d_is_what_the_locked_heads_outputs_get_and_nothing_else(model_type: str) -> None:
    """By the lock's own rows, head by head: what `unfolded` is checked against shares no code with the fold."""
    model = tiny_model(model_type, torch.float64)
    lock, ids = random_lock(model), tokens()
    seen: dict[int, list[torch.Tensor]] = {site.layer: [] for site in sites_for(model, lock)}
    for site in sites_for(model, lock):
        site.module.register_forward_hook(lambda _m, args, _y, layer=site.layer: seen[layer].append(args[0]))
    logits(model, ids)
    with unfolded(model, lock, 2.5):
        logits(model, ids)
    plain, shifted = seen[0]  # of the first locked layer, whose input no other lock has changed
    head_dim = lock.directions.shape[1]
    expected = plain.clone()
    for layer, head, direction, scale in zip(lock.layers, lock.heads, lock.directions, lock.scales, strict=True):
        if layer == 0:
            expected[..., head * head_dim : (head + 1) * head_dim] += 2.5 * scale.double() * direction.double()
    torch.testing.assert_close(shifted, expected, rtol=0, atol=1e-15)


def test_it_touches_nothing_and_goes_away() -> None:
    model = tiny_model("gpt2")
    lock, ids, before = random_lock(model), tokens(), state(model)
    plain = logits(model, ids)
    with unfolded(model, lock, 2.0):
        assert not torch.equal(logits(model, ids), plain)
    with pytest.raises(ZeroDivisionError), unfolded(model, lock, 2.0):
        raise ZeroDivisionError
    assert torch.equal(logits(model, ids), plain)
    assert same_state(state(model), before)
