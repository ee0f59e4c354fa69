"""Training a lock: what it minimises, measured on the relocked model itself."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastlock
from fastlock.cli import main as cli
from fastlock.errors import FastlockError
from fastlock.models.sites import sites
from fastlock.recipes import constant_training as module
from fastlock.recipes import training
from fastlock.recipes.head_scores import largest
from fastlock.recipes.lessons import Row
from fastlock.recipes.training import train_lock
from tests.helpers.families import tiny_model, word_tokenizer

PAIRS = fastlock.shipped_pairs()[:6]
TEXTS: dict[str, Any] = {"harmless": ("what is a harp", "name a fruit"), "texts": ("the quick brown fox", "a b c")}
OPTIONS = TEXTS | {"rank": 0}


def model_of(seed: int, **changes: Any) -> Any:
    """The base is of seed 0, its fine-tunes of others: they keep its output projections, by which a base is told."""
    model, base = (
        tiny_model("llama", seed=s, **({"num_hidden_layers": 3, "vocab_size": 4096} | changes)) for s in (seed, 0)
    )
    for own, of_base in zip(sites(model), sites(base), strict=True):
        own.weight.copy_(of_base.weight)
    return model


def tokenizer() -> Any:
    return word_tokenizer(fastlock.shipped_pairs())


def refusal_loss(model: Any, words: Any) -> float:
    """Mean cross-entropy of the safe answers' first 12 tokens, row by row, without anything of `fastlock.train`."""
    total, count = 0.0, 0
    for pair in PAIRS:
        prompt = words(f"Question: {pair.question}\nAnswer:")["input_ids"]
        answer = words(f" {pair.safe}", add_special_tokens=False)["input_ids"][:12]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total += float(nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
        count += len(answer)
    return total / count


def test_the_relocked_model_refuses_more_and_the_weights_are_as_they_were() -> None:
    words, models = tokenizer(), [model_of(1), model_of(2)]
    models[0].train()
    models[1].lm_head.weight.requires_grad_(False)
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]
    lock = train_lock(model_of(0), models, words, PAIRS, steps=30, **OPTIONS)
    assert len(lock) == 3 * 4  # all heads
    assert lock.strength == 1.0
    for model, weights in zip(models, before, strict=True):
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(module_.training for module_ in models[0].modules())
    assert not any(module_.training for module_ in models[1].modules())
    assert [name for name, p in models[1].named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert all(p.grad is None for model in models for p in model.parameters())
    for model in models:
        model.eval()
        without = refusal_loss(model, words)
        with fastlock.relocked(model, lock, 1.0):
            assert refusal_loss(model, words) < without - 0.05


def test_what_is_said_to_harmless_requests_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """The more it weighs, the less the probabilities of ordinary text move."""
    words, model = tokenizer(), model_of(1)
    ids = torch.tensor([words(OPTIONS["texts"][0])["input_ids"]])
    moved = []
    for weight in (0.0, 30.0):
        monkeypatch.setattr(module, "TEXT_WEIGHT", weight)
        monkeypatch.setattr(module, "OWN_WEIGHT", weight)
        lock = train_lock(model_of(0), [model], words, PAIRS, steps=20, **OPTIONS)
        with torch.no_grad():
            before = model(input_ids=ids).logits.softmax(-1)
            with fastlock.relocked(model, lock, 1.0):
                moved.append(float((model(input_ids=ids).logits.softmax(-1) - before).abs().sum()))
    assert moved[1] < moved[0] / 2


def test_what_is_trained_is_what_relocking_does() -> None:
    """The displacement during training against the relocked model's logits, on random displacements."""
    model = model_of(1)
    d = torch.randn(3, 4, 32)
    ids = torch.randint(0, 4096, (2, 7))
    lock = training._constant_lock(d, model, 1, 1, 0, "0" * 64)
    with torch.no_grad():
        with module._displaced(sites(model), d):
            displaced = model(input_ids=ids).logits
        plain = model(input_ids=ids).logits
        with fastlock.relocked(model, lock, 1.0):
            relocked = model(input_ids=ids).logits
    torch.testing.assert_close(displaced, relocked, rtol=1e-4, atol=1e-4)
    assert (displaced - plain).abs().max() > 0.1


def test_predictions_are_those_of_each_row_alone() -> None:
    model = model_of(1)
    rows = [Row([5, 6, 7, 8, 9], 2), Row([11, 12, 13], 1), Row([20, 21, 22, 23], 3)]
    with torch.no_grad():
        predicted, targets = module._predictions(model, rows)
        alone = [model(input_ids=torch.tensor([row.ids])).logits[0, -row.counted - 1 : -1] for row in rows]
    assert targets.tolist() == [8, 9, 13, 21, 22, 23]
    torch.testing.assert_close(predicted, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_the_heads_that_moved_most_are_kept() -> None:
    lock = train_lock(model_of(0), [model_of(1)], tokenizer(), PAIRS, steps=6, heads=5, **OPTIONS)
    assert len(lock) == 5
    assert lock.recipe == "trained: 5 heads, 6 steps on 1 fine-tunes, seed 42"
    d = torch.zeros(2, 3, 4)
    d[0, 1], d[1, 2], d[1, 0] = 3.0, 2.0, 1.0
    assert largest(d.norm(dim=-1), 2).tolist() == [[0, 1, 0], [0, 0, 1]]


def test_the_same_inputs_give_the_same_lock() -> None:
    def lock(seed: int) -> str:
        return train_lock(model_of(0), [model_of(1)], tokenizer(), PAIRS, steps=4, seed=seed, **OPTIONS).digest

    assert lock(1) == lock(1) != lock(2)


def test_without_refusals_the_safe_answers_are_learnt() -> None:
    base, words = model_of(0), tokenizer()
    lessons = next(module._lessons(base, [model_of(1)], words, PAIRS, *TEXTS.values()))
    expected = words(f" {PAIRS[0].safe}", add_special_tokens=False)["input_ids"][:12]
    assert lessons.refusals[0].ids[-len(expected) :] == expected
    assert lessons.refusals[0].counted == len(expected)
    assert [row.counted for row in lessons.texts] == [len(words(text)["input_ids"]) - 1 for text in OPTIONS["texts"]]


@pytest.mark.parametrize(
    ("fine_tunes", "options", "message"),
    [
        ([], {}, "fine_tunes: there are none"),
        ([model_of(1)], {"pairs": []}, "pairs: there are none"),
        ([model_of(1)], {"harmless": []}, "harmless: there are none"),
        ([model_of(1)], {"texts": []}, "texts: there are none"),
        ([model_of(1)], {"heads": 13}, "heads is 13; it must be an integer from 1 to 12"),
        ([model_of(1)], {"texts": ["a", "b"]}, "texts: none of them has two tokens"),
        ([model_of(1)], {"steps": 0}, "steps is 0"),
        ([model_of(1)], {"steps": 1, "heads": 3}, "steps is 1; it must be an integer from 2"),
        ([model_of(1)], {"batch_size": 1.5}, "batch_size is 1.5"),
        ([model_of(1)], {"seed": True}, "seed is True"),
        (
            [model_of(1), model_of(1, num_hidden_layers=2)],
            {},
            "fine-tune 2 has 2 layers of 4 heads of 32",
        ),
    ],
)
def test_what_is_refused(fine_tunes: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(FastlockError, match=message) as error:
        train_lock(model_of(0), fine_tunes, tokenizer(), **({"pairs": PAIRS} | OPTIONS | options))
    assert isinstance(error.value, fastlock.MismatchError) == ("fine-tune 2 has" in message)


def test_gradients_that_are_off_around_it() -> None:
    expected = train_lock(model_of(0), [model_of(1)], tokenizer(), PAIRS, steps=2, **OPTIONS)
    with torch.no_grad():
        lock = train_lock(model_of(0), [model_of(1)], tokenizer(), PAIRS, steps=2, **OPTIONS)
    assert lock.digest == expected.digest


def test_a_relocked_model_and_a_damaged_one_are_refused() -> None:
    lock = train_lock(model_of(0), [model_of(1)], tokenizer(), PAIRS, steps=1, **OPTIONS)
    relocked = model_of(1)
    fastlock.relock(relocked, lock, 1.0)
    with pytest.raises(FastlockError, match="fine-tune 1 is relocked"):
        train_lock(model_of(0), [relocked], tokenizer(), PAIRS, steps=1, **OPTIONS)
    damaged = model_of(1)
    damaged.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(fastlock.DamagedError, match="fine-tune 1 says nothing to any harmless request"):
        train_lock(model_of(0), [damaged], tokenizer(), PAIRS, steps=1, **OPTIONS)


def test_a_loss_that_is_no_number_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = module._predictions

    def overflowing(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        predicted, targets = real(*args)
        return predicted * float("inf"), targets

    monkeypatch.setattr(module, "_predictions", overflowing)
    with pytest.raises(fastlock.DamagedError, match=r"step 1: the loss is nan. The weights are damaged"):
        train_lock(model_of(0), [model_of(1)], tokenizer(), PAIRS, steps=1, **OPTIONS)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, name in enumerate(("BASE", "A", "B")):
        model_of(seed).save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["fastlock", "train", "BASE", "A", "B", "--out", "l.safetensors", "--steps", "2", "--rank", "0"]
    )
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    lock = fastlock.Lock.load("l.safetensors")
    assert (len(lock), lock.base_model) == (12, "BASE")
    assert lock.recipe == "trained: 12 heads, 2 steps on 2 fine-tunes, seed 42"
