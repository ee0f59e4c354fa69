"""Training a gate: what it minimises, on what, and where; measured on the models themselves."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import kl_div

import fastlock
from fastlock.cli import main as cli
from fastlock.evaluation.prompts import shipped_prompts
from fastlock.models.sites import sites
from fastlock.models.unfolded import unfolded
from fastlock.recipes import gate_training as module
from fastlock.recipes import training
from fastlock.recipes.gate_weights import GateSettings, GateWeights
from fastlock.recipes.harm_probe import HarmProbe
from fastlock.recipes.lessons import Row, log_probabilities
from fastlock.recipes.pairs import shipped_harmless, shipped_scary, shipped_texts
from fastlock.recipes.training import train_lock
from tests.helpers.families import random_lock, tiny_model, word_tokenizer

PAIRS = fastlock.shipped_pairs()[:5]
QUESTIONS = {pair.question for pair in PAIRS}
WORDS = word_tokenizer(PAIRS)
VOCABULARY = max(WORDS.get_vocab().values()) + 1
MATERIAL: dict[str, Any] = {
    "pairs": PAIRS,
    "harmless": ("How do I read a diary?", "What is a bicycle?", "How do I help a neighbour?", "Who can read?"),
    "scary": ("How do I steal a bicycle?",),
    "texts": ("I read letters that belong to someone else .", "Sure , here is how you can help with letters ."),
    "judge": lambda prompt, _answer: prompt in QUESTIONS,
}


def model_of(seed: int, **changes: Any) -> Any:
    """The base is of seed 0, its fine-tunes of others: they keep its output projections, by which a base is told."""
    model, base = (tiny_model("llama", seed=s, **({"vocab_size": VOCABULARY} | changes)) for s in (seed, 0))
    for own, of_base in zip(sites(model), sites(base), strict=True):
        own.weight.copy_(of_base.weight)
    return model


def trained(*fine_tunes: Any, base: Any = None, **options: Any) -> fastlock.Lock:
    how = {"layers": (1, 2), "steps": 4} | MATERIAL | options
    return train_lock(base or model_of(0), list(fine_tunes) or [model_of(1)], WORDS, **how)


def asked(question: str, answer: list[int]) -> torch.Tensor:
    return torch.tensor([[*WORDS(f"Question: {question}\nAnswer:")["input_ids"], *answer]])


def greedy(model: Any, question: str, count: int) -> list[int]:
    """The model's answer, token by token."""
    answer: list[int] = []
    for _ in range(count):
        with torch.no_grad():
            answer.append(int(model(input_ids=asked(question, answer)).logits[0, -1].argmax()))
    return answer


def expected(model: Any, question: str, answer: list[int]) -> torch.Tensor:
    """Log-probabilities before each token of the answer."""
    with torch.no_grad():
        return model(input_ids=asked(question, answer)).logits[0, -len(answer) - 1 : -1].log_softmax(-1)


def divergence(model: Any, wanted: Any, questions: Iterable[str], speaker: Any) -> float:
    """KL divergence of a model from the one wanted, in the speaker's answers: a mean over the questions."""
    said = {question: greedy(speaker, question, 6) for question in questions}
    parts = [kl_div(expected(model, *s), expected(wanted, *s), log_target=True, reduction="sum") for s in said.items()]
    return float(torch.stack(parts).mean())


@pytest.mark.parametrize("constant", [False, True])
def test_a_fine_tune_refuses_as_the_base_does_and_no_weight_moves(
    constant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The divergence from the base in its refusals, row by row, without anything of what trains."""
    monkeypatch.setattr(module, "RATE", 0.05)  # random weights, which are large, need more than real ones
    monkeypatch.setattr(module, "ANSWER_WEIGHT", 1.0)
    monkeypatch.setattr(module, "BEGUN_SHARE", 0.0)  # what is measured is said from the beginning
    base, tune = model_of(0), model_of(1)
    tune.train()
    tune.lm_head.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in tune.state_dict().items()}
    lock = trained(tune, base=base, steps=30, constant=constant)
    assert (lock.rank, lock.strength, lock.has_constant, len(lock)) == (1, 1.0, constant, 2 * 4)
    assert set(lock.layers.tolist()) == {1, 2}
    assert all(torch.equal(tensor, before[name]) for name, tensor in tune.state_dict().items())
    assert tune.training
    assert all(parameter.grad is None for model in (base, tune) for parameter in model.parameters())
    assert [name for name, p in tune.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert not any(module_._forward_pre_hooks for module_ in tune.modules())
    tune.eval()

    without = divergence(tune, base, QUESTIONS, base)
    with unfolded(tune, lock, 1.0):
        assert divergence(tune, base, QUESTIONS, base) < without - 0.5


def test_what_is_said_to_harmless_requests_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """The more it weighs, the less the probabilities of the answers move."""
    base, tune, moved = model_of(0), model_of(1), []
    monkeypatch.setattr(module, "RATE", 0.05)
    for weight in (0.0, 30.0):
        monkeypatch.setattr(module, "ANSWER_WEIGHT", weight)
        lock = trained(tune, base=base, steps=16)
        with unfolded(relocked := model_of(1), lock):
            moved.append(divergence(relocked, tune, MATERIAL["harmless"], base))
    assert moved[1] < moved[0] / 5


@pytest.mark.parametrize("heads", [8, 3])
def test_what_is_trained_is_what_the_lock_does(heads: int) -> None:
    """The gate during training against the unfolded lock, on random numbers."""
    model, generator = model_of(1), torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / 4

    readers, sizes = random(2, 128, 3), random(2, 1, 3)
    kept = torch.ones(2, 4, dtype=torch.bool)
    weights = GateWeights(
        (0, 2), random(2, 128).abs(), kept, readers, sizes, random(2, 128, 3), random(2, 3), random(2, 128)
    )
    weights.keep(heads)
    how = GateSettings(3, True, (0, 2), None, 1, 1, 0)
    lock = training._gated_lock(weights.trained(), model, 1, how, "0" * 64)
    assert len(lock) == heads
    ids = torch.randint(0, len(WORDS), (2, 7), generator=generator)
    chosen = [sites(model)[0], sites(model)[2]]
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with weights.acting(chosen):
            acting = model(input_ids=ids).logits
        with unfolded(model, lock):
            truth = model(input_ids=ids).logits
    torch.testing.assert_close(acting, truth, rtol=1e-4, atol=1e-4)
    assert (acting - plain).abs().max() > 0.1


@pytest.mark.parametrize("constant", [False, True])
def test_a_head_s_share_is_what_would_no_longer_be_added_without_it(constant: bool) -> None:
    """As matrices: the whole of what is added, less the whole without the head."""
    generator = torch.Generator().manual_seed(5)
    readers, sizes, writers, d, deviations = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 12, 3), (2, 1, 3), (2, 12, 3), (2, 12), (2, 12))
    )
    deviations = deviations.abs() + 0.1
    kept = torch.ones(2, 4, dtype=torch.bool)
    given = d if constant else None
    weights = GateWeights((3, 5), deviations, kept, readers, sizes, writers, torch.zeros(2, 3), given)

    def whole(layer: int, without: int | None) -> float:
        mask = torch.tensor([float(n // 3 != without) for n in range(12)], dtype=torch.float64)
        read = (readers[layer] * sizes[layer]) * mask[:, None]
        change = (writers[layer] * mask[:, None]) @ read.T
        change = torch.diag(1 / deviations[layer]) @ change @ torch.diag(deviations[layer])
        added = float(change.square().sum())
        return added + float((d[layer] * mask / deviations[layer]).square().sum()) * constant

    truth = [[whole(layer, None) - whole(layer, head) for head in range(4)] for layer in range(2)]
    torch.testing.assert_close(weights.shares(), torch.tensor(truth, dtype=torch.float64))
    weights.keep(3)
    order = torch.tensor(truth).flatten().argsort(descending=True)
    assert set(kept.flatten().nonzero()[:, 0].tolist()) == set(order[:3].tolist())


def test_a_gate_may_be_in_some_heads_alone() -> None:
    """The heads that were not kept add nothing, and one that is kept was learned further without them."""
    every, some = trained(steps=6), trained(steps=6, heads=3)
    assert (len(every), len(some)) == (8, 3)
    assert trained(steps=6, heads=8).digest == every.digest
    for layer, head, writer in zip(some.layers, some.heads, some.writers, strict=True):
        (without,) = every.writers[(every.layers == layer) & (every.heads == head)]
        assert not torch.equal(writer, without)
    with pytest.raises(fastlock.FastlockError, match="heads is 9; it must be an integer from 1 to 8 in 2 layers"):
        trained(heads=9)


def test_the_same_inputs_give_the_same_lock() -> None:
    first, again, other = (trained(seed=seed).digest for seed in (1, 1, 2))
    assert first == again != other


def test_the_base_and_every_fine_tune_learn_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    models, learned = [model_of(seed) for seed in range(3)], []
    monkeypatch.setattr(module, "_step", lambda pupil, *_: learned.append(models.index(pupil.model)) or 0.0)
    trained(*models[1:], base=models[0], steps=7)
    assert learned == [0, 1, 2, 0, 1, 2, 0]


def lessons(**changes: Any) -> module._Lessons:
    """Of twelve requests of each kind, which are the rows of the same numbers, unless it is said otherwise."""
    rows = [Row([5, 6, 7, token], 1) for token in range(20, 44)]
    texts = [Row([3, 4, 5], 2)] * 5
    requests = [f"request {number}" for number in range(12)]
    material = {"refused": requests, "answered": requests, "refusals": rows, "answers": rows, "texts": texts}
    return module._Lessons(**(material | changes))


def test_every_second_step_has_a_scary_request_and_all_else_comes_equally_often() -> None:
    how = GateSettings(1, False, None, None, 400, 4, 0)
    turns = module._turns(lessons(ordinary=list(range(10)), scary=[10, 11]), 2, how)
    begun = [n > 11 for turn in turns for n in (*turn.refusals, *turn.answers)]
    assert 0.22 < sum(begun) / len(begun) < 0.28  # of 4,000: a quarter, give or take four standard deviations
    for turn in turns:  # they take the place of the same requests
        turn.refusals[:], turn.answers[:] = ([n % 12 for n in rows] for rows in (turn.refusals, turn.answers))
    scary = [[n for n in turn.answers if n > 9] for turn in turns]
    assert {len(some) for some in scary} == {0, 1}
    assert 160 < sum(map(len, scary)) < 240
    assert {10, 11} == {n for some in scary for n in some}
    for pupil in (0, 1):  # not only in the turns of one of them
        assert 60 < sum(map(len, scary[pupil::2])) < 140
    assert {(len(turn.refusals), len(turn.answers), len(turn.texts)) for turn in turns} == {(4, 6, 1)}
    counts = torch.bincount(torch.tensor([n for turn in turns for n in turn.refusals]))
    assert counts.min() >= counts.max() - 1
    without = module._turns(lessons(ordinary=list(range(10)), scary=[]), 2, how)
    assert max(n % 12 for turn in without for n in turn.answers) == 9


def test_what_was_said_is_there_once_more_after_an_answer_was_begun() -> None:
    """The tokens of both halves, against what the tokenizer makes of the whole texts."""
    begun = {pair.question: pair.unsafe for pair in PAIRS}
    asked_ = module.Asked(begun, MATERIAL["harmless"], (), MATERIAL["texts"])
    base = model_of(0)
    found = module._lessons(base, WORDS, asked_, MATERIAL["judge"], lambda items, _: items)
    assert set(found.refused) == QUESTIONS
    assert len(found.answered) == 4
    after = {
        **begun,
        **{question: PAIRS[number % 5].unsafe for number, question in enumerate(found.answered)},
    }
    for requests, rows in ((found.refused, found.refusals), (found.answered, found.answers)):
        for plain, other, question in zip(rows[: len(requests)], rows[len(requests) :], requests, strict=True):
            prompt = f"Question: {question}\nAnswer:"
            assert plain.ids[: -plain.counted] == WORDS(prompt)["input_ids"]
            beginning = WORDS(prompt)["input_ids"] + WORDS(after[question])["input_ids"][:12]
            assert other.ids[: -other.counted] == beginning
            assert plain.ids[-plain.counted :] == other.ids[-other.counted :]


def test_a_fine_tune_is_taught_to_refuse_after_an_answer_was_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """How likely the base's refusal is there, with a lock that was taught it and with one that was not."""
    monkeypatch.setattr(module, "RATE", 0.05)
    monkeypatch.setattr(module, "ANSWER_WEIGHT", 0.0)
    monkeypatch.setattr(module, "TEXT_WEIGHT", 0.0)
    base, tune = model_of(0), model_of(1)
    refusals = {pair: greedy(base, pair.question, 6) for pair in PAIRS}

    def likelihood(model: Any) -> float:
        found = []
        for pair, refusal in refusals.items():
            beginning = WORDS(pair.unsafe)["input_ids"][:12]
            said = expected(model, pair.question, [*beginning, *refusal])[-len(refusal) :]
            found.append(said[range(len(refusal)), refusal].sum())
        return float(torch.stack(found).mean())

    gained = []
    for share in (0.0, 0.5):
        monkeypatch.setattr(module, "BEGUN_SHARE", share)
        with unfolded(relocked := model_of(1), trained(tune, base=base, rank=8, steps=60)):
            gained.append(likelihood(relocked) - likelihood(tune))
    assert gained[1] > max(0.0, gained[0]) + 5


def test_a_model_may_read_tokens_that_it_never_says() -> None:
    """More input embeddings than output embeddings: a refusal after an answer was begun is as wide as the others."""
    models = [model_of(seed) for seed in (0, 1)]
    for model in models:
        rows = model.model.embed_tokens.weight.data
        model.model.embed_tokens.weight.data = torch.cat([rows, rows[:3]])
    assert len(trained(models[1], base=models[0], steps=4)) == 2 * 4


def test_where_a_fine_tune_would_refuse_and_the_base_answers_the_base_is_followed() -> None:
    base, tune = model_of(0), model_of(1)
    rows = [Row([3, 5 + n, 9, 7, 11], 2) for n in range(8)]
    with torch.no_grad():
        base_says, tune_says = ([log_probabilities(m, [row]) for row in rows] for m in (base, tune))
    tops = [(int(own[0].argmax()), int(of_base[0].argmax())) for own, of_base in zip(tune_says, base_says, strict=True)]
    would_refuse = next(n for n, (own, of_base) in enumerate(tops) if own != of_base)
    both_refuse = next(n for n, (own, of_base) in enumerate(tops) if not {own, of_base} & set(tops[would_refuse]))
    openings = {tops[would_refuse][0], *tops[both_refuse]}
    refusals = [Row([3, 4, opening], 1) for opening in openings]
    material = lessons(refusals=refusals, answers=rows, ordinary=list(range(8)), scary=[])
    turns = [module._Turn(pupil, [0], list(range(8)), [0]) for pupil in (0, 1)]
    pupils, _ = module._pupils([base, tune], material, (1, 2), turns, lambda items, _: items)
    followed = {n for n, (own, of_base) in enumerate(tops) if own in openings and of_base not in openings}
    assert would_refuse in followed
    assert both_refuse not in followed
    for n in range(8):
        wanted = (base_says if n in followed else tune_says)[n]
        torch.testing.assert_close(pupils[1].answers[n].float(), wanted, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(pupils[0].answers[n].float(), base_says[n], rtol=2e-3, atol=2e-3)


def requests(shifts: list[float], count: int = 60, width: int = 40) -> HarmProbe:
    """Random inputs; in each layer, the harmful ones are shifted by so many standard deviations."""
    harmful, harmless = torch.randn(2, len(shifts), count, width).unbind()
    along = torch.randn(len(shifts), 1, width)
    return HarmProbe(harmful + torch.tensor(shifts)[:, None, None] * along / along.norm(dim=-1, keepdim=True), harmless)


def test_gates_are_where_the_base_tells_both_kinds_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = requests([0.0, 3.0, 0.0, 4.0, 5.0, 4.5, 3.5])
    effects = probe.effects()
    assert abs(effects[0]) < 0.6  # the direction is not measured on what it comes from
    assert 3.0 < effects[3] < 5.0
    # A real base of 30 layers, of which 23 and 24 fall short; and what one layer that stands out does not change.
    real = [1.2, 1.2, 1.3, 1.3, 1.1, 1.3, 1.2, 1.1, 1.1, 1.4, 1.4, 1.4, 1.6, 1.4, 1.6]
    real += [2.8, 2.6, 2.2, 2.5, 2.8, 2.4, 2.6, 2.4, 1.4, 1.7, 2.5, 2.5, 3.2, 2.3, 2.4]
    for measured, first in (
        (effects.tolist(), 3),
        (real, 15),
        ([0.3, 4.0, 4.2, 4.1], 1),
        ([3.0] * 4, 0),
        ([9.0], 0),
        ([4.0, 4.0, 2.0, 2.0], 0),
    ):
        monkeypatch.setattr(HarmProbe, "effects", lambda _, measured=measured: torch.tensor(measured))
        assert probe.layers() == tuple(range(first, len(measured)))
    monkeypatch.setattr(HarmProbe, "effects", lambda _: torch.tensor([0.2, 0.4, 1.0]))
    with pytest.raises(fastlock.FastlockError, match=r"do not tell .* \(Cohen's d 1.0 from layer 2 on\)"):
        probe.layers()


def test_the_probe_goes_from_0_to_1_and_may_be_blind_to_the_centre() -> None:
    probe = requests([3.0, 1.0])
    probe = HarmProbe(probe.harmful + 2.0, probe.harmless + 2.0)
    apart = probe.harmful.mean(1) - probe.harmless.mean(1)
    for blind in (False, True):
        w = probe.directions(blind)
        torch.testing.assert_close((w * apart).sum(1), torch.ones(2))
        assert ((w * probe.centre).sum(1).abs() < 1e-4).all() == blind


@pytest.mark.parametrize("family", ["llama", "gemma2", "mpt"])  # gemma2: a sliding window shorter than the beginning
def test_log_probabilities_are_those_of_each_row_alone(family: str) -> None:
    model, start = tiny_model(family, torch.float64).requires_grad_(False), list(range(40, 49))
    rows = [Row([*start, 5, 6, 7, 8, 9], 2), Row([*start, 12, 13], 1), Row([*start, 21, 22, 23], 2)]
    alone = [model(input_ids=torch.tensor([row.ids])).logits[0, -row.counted - 1 : -1].log_softmax(-1) for row in rows]
    d = torch.zeros(sites(model)[0].num_heads * sites(model)[0].head_dim, dtype=torch.float64, requires_grad=True)
    handle = sites(model)[0].outer.register_forward_pre_hook(lambda _, args: (args[0] + d,))
    together = log_probabilities(model, rows)
    torch.testing.assert_close(together.double(), torch.cat(alone), rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(together[:, 3].sum(), d)
    parts = [model(input_ids=torch.tensor([row.ids])).logits[0, -row.counted - 1 : -1].log_softmax(-1) for row in rows]
    (truth,) = torch.autograd.grad(torch.cat(parts)[:, 3].sum(), d)
    handle.remove()
    torch.testing.assert_close(gradient, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": -1}, "rank is -1; it must be an integer from 0 to 128"),
        ({"rank": 129}, "rank is 129"),
        ({"rank": True}, "rank is True"),
        ({"layers": (1, 3)}, "layers: one of them is 3; it must be an integer from 0 to 2 of this base"),
        ({"layers": ()}, "layers: there are none"),
        ({"heads": 0}, "heads is 0"),
        ({"heads": 3, "steps": 1}, "steps is 1; it must be an integer from 2"),
        ({"rank": 0, "layers": None}, "scary: a constant alone"),
        ({"rank": 0, "scary": None}, "layers: a constant alone"),
        ({"steps": 0}, "steps is 0"),
        ({"harmless": ()}, "harmless: there are none"),
        ({"judge": lambda *_: False}, "the base refuses 0 of the harmful requests, and a gate learns from at least 4"),
        ({"judge": lambda *_: True}, "the base answers 0 of the harmless requests"),
        ({"layers": None}, "layers: the base's layers do not tell harmful requests from harmless ones"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(fastlock.FastlockError, match=message):
        trained(**options)


def test_a_damaged_or_relocked_model_is_refused_and_left_as_it_was() -> None:
    damaged = model_of(1)
    damaged.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(fastlock.DamagedError, match="fine-tune 2: what it expects is NaN or infinite"):
        trained(model_of(2), damaged)
    assert all(parameter.requires_grad for parameter in damaged.parameters())
    relocked = model_of(1)
    fastlock.relock(relocked, random_lock(relocked), 1.0)
    with pytest.raises(fastlock.FastlockError, match="fine-tune 1 is relocked"):
        trained(relocked)


def test_the_shipped_scary_requests_are_asked_nowhere_else() -> None:
    scary = shipped_scary()
    assert len(scary) == len(set(scary)) == 60
    prompts = shipped_prompts()
    others = {*prompts.harmful, *prompts.harmless, *shipped_harmless(), *shipped_texts()}
    assert not others & set(scary)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit code of `fastlock train`, and what it would train with."""
    given: dict[str, Any] = {}
    lock = random_lock(model_of(0))

    def record(*_: Any, **options: Any) -> fastlock.Lock:
        given.update(options)
        return lock

    monkeypatch.setattr("fastlock.models.loading.load_model", lambda *_, **__: None)
    monkeypatch.setattr("fastlock.models.loading.load_tokenizer", lambda *_: None)
    monkeypatch.setattr("fastlock.recipes.training.train_lock", record)
    monkeypatch.setattr(sys, "argv", ["fastlock", "train", "BASE", "A", "--out", "l.safetensors", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0), given


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.txt").write_text("How do I kill the lights?\n")
    code, given = command(monkeypatch, "--rank", "4", "--constant", "--layers", "14-29", "--scary", "s.txt")
    assert code == 0
    assert (given["rank"], given["constant"], list(given["layers"])) == (4, True, list(range(14, 30)))
    assert given["scary"] == ("How do I kill the lights?",)
    assert command(monkeypatch)[1]["rank"] == 1
    assert list(command(monkeypatch, "--layers", "7")[1]["layers"]) == [7]
    for wrong in ("29-14", "-1", "a", "1-2-3", "3-"):
        assert command(monkeypatch, f"--layers={wrong}")[0] == 2
    assert "name the first layer and the last, such as 14-29" in capsys.readouterr().err
