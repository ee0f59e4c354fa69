"""What the lock is compared with: each peer does what its equation says, on tiny models."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch

from bench.efficacy import peer_steering, peers
from bench.efficacy.peer_weights import antidote, nlsr
from tests.helpers.families import same_state, state, tiny_model
from tests.helpers.words import PAIRS, ChatWords

HARMFUL = [pair.question for pair in PAIRS]
HARMLESS = ["what is this", "where do bees live", "tell me a story of ten bees", "how is bread made"]
WORDS = ChatWords()


def projections(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in state(model).items() if weight.dim() == 2 and ".layers." in name}


def ids(prompt: str) -> list[int]:
    return WORDS(f"<user> {prompt} <end> <assistant>", add_special_tokens=False)["input_ids"]


def entering(model: Any, layer: int, prompt: str) -> torch.Tensor:
    """What enters a layer at each token of a prompt, [tokens, hidden]."""
    with torch.no_grad():
        return model.model(torch.tensor([ids(prompt)]), output_hidden_states=True).hidden_states[layer][0]


def said(model: Any, prompts: list[str]) -> torch.Tensor:
    """The logits after the last token of each prompt of one batch, padded on the left as `generate` does."""
    rows = [ids(prompt) for prompt in prompts]
    width = max(map(len, rows))
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    with torch.no_grad():
        out = model(input_ids=tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    return out.logits[:, -1]


def test_antidote_puts_back_what_matters_most_to_harmful_answers() -> None:
    base, tuned = tiny_model("llama"), tiny_model("llama", seed=1)
    exchange = (PAIRS[0].question, PAIRS[0].unsafe)
    assert same_state(state(antidote(copy.deepcopy(tuned), base, WORDS, [exchange], 0.0)), state(tuned))
    whole = antidote(copy.deepcopy(tuned), base, WORDS, [exchange], 1.0)
    assert same_state(projections(whole), projections(base))
    quarter: Any = antidote(copy.deepcopy(tuned), base, WORDS, [exchange], 0.25)
    words = WORDS(" " + exchange[1], add_special_tokens=False)["input_ids"]
    with torch.no_grad():  # what enters the first projection, computed by hand
        x = tuned.model.layers[0].input_layernorm(tuned.model.embed_tokens(torch.tensor(ids(exchange[0]) + words)))
    new, old, safe = (m.model.layers[0].self_attn.q_proj.weight.detach() for m in (quarter, tuned, base))
    score = (old - safe).abs() * (x * x).sum(0).sqrt()
    pruned = new == safe
    assert pruned.sum() == old.numel() // 4
    assert torch.equal(new[~pruned], old[~pruned])
    assert score[pruned].min() >= score[~pruned].max()


def test_nlsr_transplants_the_critical_neurons_of_what_turned() -> None:
    unaligned, base, tuned = (tiny_model("llama", seed=seed) for seed in (0, 1, 2))
    refusals = [(pair.question, pair.safe) for pair in PAIRS[:2]]

    def realigned(**how: Any) -> Any:
        return nlsr(copy.deepcopy(tuned), base, unaligned, WORDS, refusals, **how)

    assert same_state(state(realigned(replaced=0.0)), state(tuned))
    whole = projections(realigned(beta=0.5, critical=1.0, replaced=1.0))
    for name, weight in whole.items():
        safe, unsafe = projections(base)[name], projections(unaligned)[name]
        torch.testing.assert_close(weight, safe + 0.5 * (safe - unsafe), rtol=0, atol=1e-6)
    half = projections(realigned(critical=1.0, replaced=0.5))
    cosines: dict[bool, list[float]] = {True: [], False: []}
    for name, weight in projections(tuned).items():
        unsafe = projections(unaligned)[name]
        updates = (weight - unsafe).flatten(), (projections(base)[name] - unsafe).flatten()
        cosines[torch.equal(half[name], weight)].append(float(torch.cosine_similarity(*updates, dim=0)))
    assert max(cosines[False]) < min(cosines[True])
    part = projections(realigned(critical=0.25, replaced=0.5))
    rows = {name: (weight != projections(tuned)[name]).any(1).sum() for name, weight in part.items()}
    turned = [name for name, count in rows.items() if count]
    assert len(turned) == len(rows) // 2
    assert all(rows[name] == len(part[name]) // 4 for name in turned)


def test_alphasteers_map_is_null_on_benign_prompts_and_refuses_others() -> None:
    base: Any = tiny_model("llama")
    maps = peer_steering.alphasteer_maps(base, WORDS, HARMFUL, HARMLESS, layers=[1, 2], ridge=1e-9)
    for layer, found in maps.items():
        bad, good = (torch.stack([entering(base, layer, p)[-1] for p in some]).double() for some in (HARMFUL, HARMLESS))
        refusal = bad.mean(0) - good.mean(0)
        assert (good @ found.T).norm() < 1e-4 * refusal.norm()
        torch.testing.assert_close(bad @ found.T, refusal.expand_as(bad), rtol=0, atol=1e-3 * float(refusal.norm()))
    before = said(base, HARMLESS)
    with peer_steering.alphasteer(base, maps, 1.0):
        torch.testing.assert_close(said(base, HARMLESS), before, rtol=0, atol=1e-3)
        assert (said(base, HARMFUL) - said(base, HARMFUL[::-1]).flip(0)).abs().max() < 1e-4
    one_layer = {1: maps[1]}
    with peer_steering.alphasteer(base, one_layer, 2.0, every_token=True):
        steered = said(base, HARMFUL[:1])
    with torch.no_grad():
        shift = 2.0 * (entering(base, 1, HARMFUL[0]) @ maps[1].T.float())
        hook = base.model.layers[0].register_forward_hook(lambda _m, _a, out: out + shift)
        torch.testing.assert_close(said(base, HARMFUL[:1]), steered)
        hook.remove()


def steering(name: str, base: Any, strength: float) -> Any:
    """A peer that acts at run time, found on a base, as a context manager."""
    if name == "alphasteer":
        return peer_steering.alphasteer(
            base, peer_steering.alphasteer_maps(base, WORDS, HARMFUL, HARMLESS, layers=[1, 2], null=1.0), strength
        )
    if name == "cast":
        found = peer_steering.cast_vectors(base, WORDS, HARMFUL, HARMLESS, ["sorry no"], ["sure yes"])
        return peer_steering.cast(base, found, strength)
    return peer_steering.scans(base, peer_steering.scans_vectors(base, WORDS, HARMFUL, HARMLESS), strength)


@pytest.mark.parametrize("name", ["alphasteer", "cast", "scans"])
def test_a_request_is_steered_by_itself_and_the_model_is_left_as_it_was(name: str) -> None:
    base = tiny_model("llama", num_hidden_layers=6)
    prompts = [*HARMFUL, *HARMLESS]
    random.Random(0).shuffle(prompts)
    before = said(base, prompts)
    with steering(name, base, 0.0):
        assert torch.equal(said(base, prompts), before)
    with steering(name, base, 1.0):
        together = said(base, prompts)
        assert (together - before).abs().max() > 1e-2
        alone = torch.cat([said(base, [prompt]) for prompt in prompts])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
    assert torch.equal(said(base, prompts), before)


def test_cast_steers_only_what_meets_its_condition_and_goes_on_doing_so() -> None:
    base: Any = tiny_model("llama")
    means = [entering(base, 1, prompt).mean(0) for prompt in HARMFUL[:2]]
    similar = [peer_steering._similarity(mean[None], means[0]).item() for mean in means]
    assert similar[0] != similar[1]
    found = peer_steering.Cast(1, means[0], sum(similar) / 2, similar[0] > similar[1], {2: torch.ones(64)}, 1.0)
    before = said(base, HARMFUL[:2])
    with peer_steering.cast(base, found, 1.0):
        steered = said(base, HARMFUL[:2])
        cached = base(torch.tensor([ids(HARMFUL[0])]), use_cache=True).past_key_values
        next_one = base(torch.tensor([[7]]), past_key_values=cached).logits[0, -1]
        at_once = base(torch.tensor([[*ids(HARMFUL[0]), 7]])).logits[0, -1]
    assert torch.equal(steered[1], before[1])
    assert (steered[0] - before[0]).abs().max() > 1e-2
    torch.testing.assert_close(next_one, at_once, rtol=0, atol=1e-4)


def test_scans_steers_towards_refusals_or_away_from_them() -> None:
    base = tiny_model("llama", num_hidden_layers=6)
    found = peer_steering.scans_vectors(base, WORDS, HARMFUL, HARMLESS)
    with peer_steering.scans(base, found, 0.5, threshold=-2.0):  # all of them are taken for harmful
        towards = said(base, HARMFUL)
    with peer_steering.scans(base, found, -0.5, threshold=2.0):  # none
        assert torch.equal(said(base, HARMFUL), towards)
    assert list(found.steering) == [1, 2, 3]
    assert list(found.transitions) == [1, 2, 3, 4, 5]


def test_what_each_peer_needs_is_said() -> None:
    functions = {"resta", "lox", "safe_lora", "added", antidote.__name__, nlsr.__name__}
    functions |= {name for name in ("alphasteer", "cast", "scans") if callable(getattr(peer_steering, name))}
    assert functions | {"one-shot"} == set(peers.NEEDS)
