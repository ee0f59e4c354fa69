"""What steers the residual stream at run time, on a condition: AlphaSteer, CAST and SCANS, each in a few lines.

Each is found on the aligned base, once, as a lock is, and then used in fine-tunes: as a context manager around them.
They act in every forward pass, for every request in a batch by itself; none of them is in the weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from fastlock.inference.chat import prompt_tokens

# [batch, tokens, hidden] -> what is added to it, of the same shape or one that broadcasts to it.
Steering = Callable[[torch.Tensor], torch.Tensor]


# AlphaSteer


@torch.no_grad()
def alphasteer_maps(
    base: Any,
    tokenizer: Any,
    harmful: Sequence[str],
    harmless: Sequence[str],
    layers: Sequence[int] | None = None,
    null: float = 0.6,
    ridge: float = 10.0,
) -> dict[int, torch.Tensor]:
    """AlphaSteer (arXiv 2506.07022): a map of the residual stream that is null on benign prompts, and refuses others.

    Δ = r bᵀ P with the projection P on the directions of the smallest eigenvalues of H_b H_bᵀ (benign activations at
    the prompts' ends; the share `null` of all directions, 0.6 in most layers of the authors' code), and b from
    b = argmin ‖r bᵀ P H_m − r 1ᵀ‖² + λ ‖r bᵀ P‖² (malicious ones; λ = 10 in the code, which also uses the input of a
    layer, as here). r is the difference of the means at the prompts' ends. The authors choose 10 of 32 layers by hand;
    here they are those from a quarter to six tenths of the depth. They take r from refused against answered prompts
    and fit on thousands of benign ones.

    Returns:
        layer -> Δ, [hidden, hidden].
    """
    count = base.config.num_hidden_layers
    layers = range(count // 4, count * 6 // 10) if layers is None else layers
    bad, good = (_ends(base, tokenizer, prompts).double() for prompts in (harmful, harmless))
    maps = {}
    for layer in layers:
        h_b, h_m = good[:, layer], bad[:, layer]
        vectors = torch.linalg.eigh(h_b.T @ h_b).eigenvectors[:, : round(null * h_b.shape[1])]
        projection = vectors @ vectors.T
        r, x = h_m.mean(0) - h_b.mean(0), h_m @ projection
        b = torch.linalg.pinv(x.T @ x + ridge * projection, hermitian=True) @ x.sum(0)
        maps[layer] = torch.outer(r, projection @ b)
    return maps


@contextlib.contextmanager
def alphasteer(model: Any, maps: dict[int, torch.Tensor], strength: float, every_token: bool = False) -> Iterator[None]:
    """h ← h + λ Δ h at the input of some layers.

    Args:
        every_token: whether each token gets its own Δ h, the paper's equation at every position; by default it is as in
            the authors' code: the prompt's last token decides, and the whole prompt gets its Δ h, once.
    """

    def steering(layer: int) -> Steering:
        def steer(h: torch.Tensor) -> torch.Tensor:
            if every_token:
                return strength * (h @ maps[layer].T.to(h))
            if h.shape[1] == 1:  # an answer's token
                return torch.zeros_like(h)
            return strength * (asking.last(h) @ maps[layer].T.to(h))[:, None]

        return steer

    with _asked(model) as asking, _steered(model, {layer: steering(layer) for layer in maps}, before=True):
        yield


# CAST


@dataclass(frozen=True)
class Cast:
    """What CAST found: where it looks, from which similarity on it refuses, and what it adds in which layers."""

    layer: int
    condition: torch.Tensor
    threshold: float
    above: bool
    behaviour: dict[int, torch.Tensor]
    f1: float


@torch.no_grad()
def cast_vectors(
    base: Any,
    tokenizer: Any,
    harmful: Sequence[str],
    harmless: Sequence[str],
    refusals: Sequence[str],
    compliances: Sequence[str],
) -> Cast:
    """CAST (arXiv 2409.05907): a condition vector and a threshold, found on prompts; a behaviour vector, on answers.

    Both are the first principal component of activations of two kinds, less the midpoint of their means: of the mean
    over all tokens of harmful and of harmless prompts, and of the mean over the answer's tokens of harmless prompts
    with the beginning of a refusal or of a compliant answer. Layer, threshold and direction of the comparison are those
    with the best F1 on the same prompts, as in the authors' grid search, over the first half of the layers; the
    behaviour is added in the layers after it, up to six tenths (theirs are chosen by hand).
    """
    count = base.config.num_hidden_layers
    bad, good = (torch.stack([_states(base, tokenizer, p)[0].mean(1) for p in kind]) for kind in (harmful, harmless))
    best: tuple[Any, ...] = (-1.0,)
    for layer in range(1, count // 2):
        condition = _component(bad[:, layer], good[:, layer])
        of_bad, of_good = (_similarity(kind[:, layer], condition) for kind in (bad, good))
        seen = torch.cat([of_bad, of_good]).unique()
        for threshold in ((seen[1:] + seen[:-1]) / 2).tolist():
            for above in (True, False):
                hit, false = ((s >= threshold) == above for s in (of_bad, of_good))
                f1 = 2 * hit.sum() / (hit.sum() + false.sum() + len(hit))
                if float(f1) > best[0]:
                    best = float(f1), layer, condition, threshold, above
    answered = [
        torch.stack([_answer_mean(base, tokenizer, p, some[i % len(some)]) for i, p in enumerate(harmless)])
        for some in (refusals, compliances)
    ]
    f1, layer, condition, threshold, above = best
    behaviour = {n: _component(*(kind[:, n] for kind in answered)) for n in range(layer + 1, count * 6 // 10 + 1)}
    return Cast(layer, condition, threshold, above, behaviour, f1)


@contextlib.contextmanager
def cast(model: Any, found: Cast, strength: float) -> Iterator[None]:
    """h ← h + f(sim(h, tanh(proj_c h))) · α · v: f is 1 where the prompt meets the condition, else 0.

    A prompt is looked at once, and its answer is steered accordingly. α is a share of |h|, so that it suits any model;
    v has length 1. The vector is added at every token, as in the authors' toolkit.
    """
    met: list[torch.Tensor] = []

    def look(h: torch.Tensor) -> torch.Tensor:
        if h.shape[1] > 1 or not met:
            similar = _similarity(asking.mean(h), found.condition.to(h)) >= found.threshold
            met[:] = [(similar == found.above).to(h)[:, None, None]]
        return torch.zeros_like(h)

    def steering(vector: torch.Tensor) -> Steering:
        return lambda h: met[0] * strength * h.norm(dim=-1, keepdim=True) * vector.to(h)

    hooks = {found.layer: look} | {layer: steering(vector) for layer, vector in found.behaviour.items()}
    with _asked(model) as asking, _steered(model, hooks, before=True):
        yield


def _similarity(h: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """sim(h, tanh(proj_c h)), [batch]."""
    return cosine_similarity(h, torch.tanh((h @ c)[:, None] * c / c.dot(c)), dim=-1)


def _component(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The first principal component of both kinds less their midpoint, towards the first: [hidden], of length 1."""
    middle = (one.mean(0) + other.mean(0)) / 2
    vector: torch.Tensor = torch.linalg.svd(torch.cat([one, other]) - middle, full_matrices=False).Vh[0]
    return vector * torch.sign(vector.dot(one.mean(0) - other.mean(0)))


# SCANS


@dataclass(frozen=True)
class Scans:
    """What SCANS found: what it adds in which layers, and how a harmful prompt's states turn at "Sure"."""

    steering: dict[int, torch.Tensor]
    transitions: dict[int, torch.Tensor]
    affirmation: tuple[int, ...]


@torch.no_grad()
def scans_vectors(base: Any, tokenizer: Any, harmful: Sequence[str], harmless: Sequence[str]) -> Scans:
    """SCANS (arXiv 2408.11491): refusal vectors of the middle layers, and how harmful prompts turn at "Sure".

    v_l is the difference of the means at the prompts' ends; it is added in layers 10 to 19 of 32, here the same share
    of the depth. The reference is the mean, over harmful prompts, of the state at the prompt's end less that at "Sure"
    after it, in the layers from there to the last one.
    """
    count = base.config.num_hidden_layers
    sure = tuple(tokenizer("Sure", add_special_tokens=False)["input_ids"])
    bad, good = (_ends(base, tokenizer, prompts) for prompts in (harmful, harmless))
    turned = bad - _ends(base, tokenizer, harmful, sure)
    first, last = count * 10 // 32, count * 19 // 32
    steering = {layer: (bad - good.mean(0))[:, layer + 1].mean(0) for layer in range(first, last + 1)}
    return Scans(steering, {layer: turned[:, layer + 1].mean(0) for layer in range(first, count)}, sure)


@contextlib.contextmanager
def scans(model: Any, found: Scans, strength: float, threshold: float = 0.75) -> Iterator[None]:
    """h ← h + σ · α · v_l from the prompt's last token on: σ is 1 for a prompt taken for harmful, −1 for others.

    It is taken for harmful where its own transition to "Sure" is similar to the reference: a cosine of 0.75 or more in
    the mean over the layers, which takes a forward pass more for each prompt. The authors' code normalises v_l and
    takes α = 3.5 for Llama-2-7B; here α is in units of |v_l|, which suits any model. A text is read as a prompt, and
    hardly steered: its perplexity says little.
    """

    def classify(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        sure = torch.tensor(found.affirmation, device=ids.device).expand(len(ids), -1)
        longer = torch.cat([ids, sure], 1), torch.cat([mask, torch.ones_like(sure)], 1)
        states = model.model(*longer, output_hidden_states=True, use_cache=False).hidden_states
        cosines = []
        for layer, reference in found.transitions.items():
            h = states[layer + 1]
            turned = asking.last(h[:, : ids.shape[1]]) - h[:, -1]
            cosines.append(cosine_similarity(turned, reference.to(h), dim=-1))
        return torch.where(torch.stack(cosines).mean(0) >= threshold, 1.0, -1.0)

    def steering(vector: torch.Tensor) -> Steering:
        def steer(h: torch.Tensor) -> torch.Tensor:
            if asking.verdict is None:  # the forward pass that classifies
                return torch.zeros_like(h)
            return asking.from_end(h) * asking.verdict.to(h)[:, None, None] * strength * vector.to(h)

        return steer

    with _asked(model, classify) as asking, _steered(model, {n: steering(v) for n, v in found.steering.items()}):
        yield


# What they share


class _Asking:
    """What a model was last asked: which tokens are padding, and what was found of each prompt."""

    def __init__(self, classify: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None) -> None:
        self.mask = torch.ones(1, 1)
        self.verdict: torch.Tensor | None = None
        self._classify = classify

    def read(self, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        if ids.shape[1] == 1 and self.verdict is not None:  # an answer's token
            return
        self.mask = torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :]
        self.verdict = None
        if self._classify is not None:
            self.verdict = self._classify(ids, self.mask)

    def _ends(self) -> torch.Tensor:
        """Where each prompt's last token is, [batch]."""
        return (self.mask * torch.arange(1, self.mask.shape[1] + 1, device=self.mask.device)).argmax(1)

    def last(self, h: torch.Tensor) -> torch.Tensor:
        """The states of the last tokens, [batch, hidden]."""
        return h[torch.arange(len(h)), self._ends()]

    def mean(self, h: torch.Tensor) -> torch.Tensor:
        """The mean state of each prompt, [batch, hidden]."""
        weights = self.mask.to(h)[..., None]
        return (h * weights).sum(1) / weights.sum(1)

    def from_end(self, h: torch.Tensor) -> torch.Tensor:
        """1 from each prompt's last token on, [batch, tokens, 1]."""
        if h.shape[1] == 1:
            return torch.ones_like(h[..., :1])
        return (torch.arange(h.shape[1], device=h.device) >= self._ends()[:, None]).to(h)[..., None]


@contextlib.contextmanager
def _asked(
    model: Any, classify: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
) -> Iterator[_Asking]:
    asking = _Asking(classify)

    def read(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
        asking.read(ids, kwargs.get("attention_mask"))

    hook = model.register_forward_pre_hook(read, with_kwargs=True)
    try:
        yield asking
    finally:
        hook.remove()


@contextlib.contextmanager
def _steered(model: Any, steering: dict[int, Steering], before: bool = False) -> Iterator[None]:
    """Add to what enters some layers, or leaves them."""

    def hook(layer: int) -> Any:
        steer = steering[layer]
        if before:
            return model.model.layers[layer].register_forward_pre_hook(
                lambda _m, args: (args[0] + steer(args[0]), *args[1:])
            )
        return model.model.layers[layer].register_forward_hook(
            lambda _m, _args, out: (out[0] + steer(out[0]), *out[1:]) if isinstance(out, tuple) else out + steer(out)
        )

    with contextlib.ExitStack() as hooks:
        for layer in steering:
            hooks.callback(hook(layer).remove)
        yield


def _states(model: Any, tokenizer: Any, prompt: str, after: Sequence[int] = ()) -> tuple[torch.Tensor, int]:
    """The residual stream at every token, [layers + 1, tokens, hidden], and how many tokens the prompt has.

    Entry n is the input of layer n.
    """
    ids, _ = prompt_tokens(tokenizer, prompt)
    states = model(torch.tensor([[*ids, *after]]), output_hidden_states=True, use_cache=False).hidden_states
    return torch.cat(states).float(), len(ids)


def _ends(model: Any, tokenizer: Any, prompts: Sequence[str], after: Sequence[int] = ()) -> torch.Tensor:
    """The states at the prompts' last tokens, or the last of some tokens after: [prompts, layers + 1, hidden]."""
    return torch.stack([_states(model, tokenizer, prompt, after)[0][:, -1] for prompt in prompts])


def _answer_mean(model: Any, tokenizer: Any, prompt: str, answer: str) -> torch.Tensor:
    """The mean state over an answer's tokens, [layers + 1, hidden]."""
    words = tokenizer(prompt_tokens(tokenizer, prompt)[1] + answer, add_special_tokens=False)["input_ids"]
    states, asked = _states(model, tokenizer, prompt, words)
    return states[:, asked:].mean(1)
