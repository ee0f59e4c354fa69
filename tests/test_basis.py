"""Whether a lock still acts where it was found: rotated, smoothed and rescaled heads are told from fine-tuned ones."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlock
from fastlock.basis import check_likeness, column_norms, likeness
from fastlock.errors import FastlockWarning, MismatchError, UnsupportedError
from fastlock.kernels.fold.reference import HeadColumns
from fastlock.models.sites import sites
from tests.checkpoints.quantised.test_relocking import LAYERS, checkpoint
from tests.helpers import quantised
from tests.helpers.families import logits, random_lock, tiny_model, tokens

HEAD_DIM, KV_HEADS = 32, 2


def base_and_lock() -> tuple[Any, fastlock.Lock]:
    """A tiny Llama, and a lock that carries its norms: of the weights in float64, by way of NumPy."""
    model = tiny_model("llama")
    lock = random_lock(model)
    return model, replace(lock, column_norms=norms_of([site.weight for site in sites(model)], lock))


def norms_of(weights: list[torch.Tensor], lock: fastlock.Lock) -> list[list[float]]:
    rows = []
    for layer, head in zip(lock.layers.tolist(), lock.heads.tolist(), strict=True):
        columns = weights[layer].double().numpy()[:, head * HEAD_DIM : (head + 1) * HEAD_DIM]
        rows.append([float((columns[:, i] ** 2).sum() ** 0.5) for i in range(HEAD_DIM)])
    return rows


def projections(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """v_proj and o_proj of every layer."""
    attention = [layer.self_attn for layer in model.model.layers]
    return [(one.v_proj.weight.data, one.o_proj.weight.data) for one in attention]


def tuned(model: Any) -> None:
    """Every weight moves by 5 % of its size, which is much."""
    for i, parameter in enumerate(model.parameters()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        parameter.data += 0.05 * parameter.data.std(unbiased=False) * noise


def at_4_bits(model: Any) -> None:
    """Rounded to the nearest of 16 numbers, in groups of 32 inputs."""
    tuned(model)
    for _, o in projections(model):
        groups = o.view(len(o), -1, 32)
        step = groups.abs().amax(-1, keepdim=True) / 7
        o.copy_(((groups / step).round() * step).view(o.shape))


def pruned(model: Any) -> None:
    for _, o in projections(model):
        o[:, ::5] = 0


def smoothed(model: Any) -> None:
    """As AWQ does it: W_v / s, W_o · s."""
    generator = torch.Generator().manual_seed(3)
    for v, o in projections(model):
        s = torch.exp(0.3 * torch.randn(len(v), generator=generator))
        v.div_(s[:, None])
        o.mul_(s.view(KV_HEADS, 1, HEAD_DIM).expand(KV_HEADS, 2, HEAD_DIM).flatten())


def rescaled(model: Any) -> None:
    for v, o in projections(model):
        s = torch.tensor([2.0, 0.5]).repeat_interleave(HEAD_DIM)
        v.div_(s[:, None])
        o.mul_(s.view(KV_HEADS, 1, HEAD_DIM).expand(KV_HEADS, 2, HEAD_DIM).flatten())


def rotated(model: Any) -> None:
    """R2 of QuaRot and SpinQuant: one rotation of the heads, in v_proj and undone in o_proj."""
    rotation = torch.linalg.qr(torch.randn(HEAD_DIM, HEAD_DIM, generator=torch.Generator().manual_seed(4)))[0]
    for v, o in projections(model):
        v.copy_((rotation @ v.view(KV_HEADS, HEAD_DIM, -1)).view(v.shape))
        o.copy_((o.view(len(o), -1, HEAD_DIM) @ rotation.t()).reshape(o.shape))


def stream_rotated(model: Any) -> None:
    """R1: of what o_proj writes, which is enough here."""
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(5)))[0]
    for _, o in projections(model):
        o.copy_(rotation @ o)


def another_base(model: Any) -> None:
    model.load_state_dict(tiny_model("llama", seed=9).state_dict())


KEPT = {"nothing": lambda model: None, "tuned": tuned, "4 bits": at_4_bits, "pruned": pruned, "R1": stream_rotated}
ALTERED = {
    "smoothed": (smoothed, "other norms than in the lock's base: within a head, by .* looks like AWQ's smoothing"),
    "rescaled": (rescaled, "one by a factor of 2.00. It looks like heads rescaled one by one"),
    "rotated": (rotated, "other norms|are not the base's: their cosine is"),
    "another base": (another_base, "other norms|are not the base's: their cosine is"),
}


@pytest.mark.parametrize("name", ["smoothed", "rescaled", "rotated"])
def test_what_is_refused_computes_the_same_and_folds_to_something_else(name: str) -> None:
    """Or it would not be dangerous: without the check, nobody would notice."""
    base, lock = base_and_lock()
    model = copy.deepcopy(base)
    ALTERED[name][0](model)
    torch.testing.assert_close(logits(model, tokens()), logits(base, tokens()), rtol=1e-3, atol=1e-3)
    without = replace(lock, column_norms=None)
    with fastlock.relocked(base, without), fastlock.relocked(model, without):
        apart = (logits(model, tokens()) - logits(base, tokens())).abs().max()
    assert apart > 0.1


@pytest.mark.parametrize("name", KEPT)
def test_what_keeps_the_basis_is_relocked(name: str, tmp_path: Path) -> None:
    base, lock = base_and_lock()
    model = copy.deepcopy(base)
    KEPT[name](model)
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "model")
    fastlock.relock_checkpoint(tmp_path / "model", lock, tmp_path / "by norms")
    fastlock.relock_checkpoint(tmp_path / "model", lock, tmp_path / "by base", base=tmp_path / "base")
    fastlock.relock(model, lock)
    fastlock.relock(model, lock, base=base)
    assert fastlock.verify(model, lock)


@pytest.mark.parametrize("name", ALTERED)
def test_an_altered_basis_is_refused(name: str, tmp_path: Path) -> None:
    change, message = ALTERED[name]
    base, lock = base_and_lock()
    model = copy.deepcopy(base)
    change(model)
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "model")
    without = replace(lock, column_norms=None)
    attempts = {
        "norms on disk": lambda: fastlock.relock_checkpoint(tmp_path / "model", lock, tmp_path / "out"),
        "base on disk": lambda: fastlock.relock_checkpoint(
            tmp_path / "model", without, tmp_path / "out", base=tmp_path / "base"
        ),
        "norms in memory": lambda: fastlock.relock(model, lock),
        "base in memory": lambda: fastlock.relock(model, without, base=base),
        "many": lambda: fastlock.relock_many([copy.deepcopy(base), model], lock),
        "for a while": lambda: fastlock.relocked(model, lock).__enter__(),
        "planned": lambda: fastlock.Plan([model], lock).relock(),
        "bare": lambda: fastlock.Plan([{site.layer: site.weight for site in sites(model)}], lock).relock(),
        "per request": lambda: fastlock.RequestLocks(model, [lock]),
    }
    for way, attempt in attempts.items():
        with pytest.raises(UnsupportedError, match=message):
            pytest.fail(f"{way}: {attempt()}")
    assert not (tmp_path / "out").exists()
    assert all(module.bias is None for module in (site.module for site in sites(model)))


def test_rotated_heads_are_told_by_the_base_where_norms_are_all_alike(tmp_path: Path) -> None:
    base, lock = base_and_lock()
    model = copy.deepcopy(base)
    rotated(model)
    for _, o in projections(model):  # so that the norms say nothing
        o.div_(o.norm(dim=0))
    for _, o in projections(base):
        o.div_(o.norm(dim=0))
    lock = replace(lock, column_norms=norms_of([site.weight for site in sites(base)], lock))
    fastlock.relock(model, lock)
    fastlock.unlock(model)
    with pytest.raises(UnsupportedError, match="It looks like rotated heads"):
        fastlock.relock(model, lock, base=base)
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedError, match="It looks like rotated heads"):
        fastlock.relock_checkpoint(tmp_path / "model", lock, tmp_path / "out", base=tmp_path / "base")


def test_a_quantised_checkpoint_by_its_own_norms(tmp_path: Path) -> None:
    source, lock, dense = checkpoint(tmp_path, quantised.gptq)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        known = replace(lock, column_norms=norms_of([dense[layer] for layer in range(LAYERS)], lock))
        fastlock.relock_checkpoint(source, known, tmp_path / "out")
    s = torch.exp(0.2 * torch.randn(dense[0].shape[1], generator=torch.Generator().manual_seed(3)))
    before = replace(lock, column_norms=norms_of([dense[layer] / s for layer in range(LAYERS)], lock))
    with pytest.raises(UnsupportedError, match="AWQ's smoothing"):
        fastlock.relock_checkpoint(source, before, tmp_path / "again")
    with pytest.warns(FastlockWarning, match="basis not checked: the lock carries no column norms and no base was"):
        fastlock.relock_checkpoint(source, lock, tmp_path / "unknown")


def test_traces_of_a_quantiser_are_enough_to_say_that_nothing_was_checked(tmp_path: Path) -> None:
    base, lock = base_and_lock()
    base.save_pretrained(tmp_path / "model")
    lock = replace(lock, column_norms=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastlock.relock_checkpoint(tmp_path / "model", lock, tmp_path / "plain")
    (tmp_path / "model" / "quantize_config.json").write_text("{}")
    with pytest.warns(FastlockWarning, match="basis not checked"):
        fastlock.relock_checkpoint(tmp_path / "model", lock, tmp_path / "traced")


def test_a_base_of_another_shape_is_refused(tmp_path: Path) -> None:
    base, lock = base_and_lock()
    base.save_pretrained(tmp_path / "model")
    other = tiny_model("llama", num_hidden_layers=4)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(MismatchError, match="has another shape"):
        fastlock.relock_checkpoint(tmp_path / "model", lock, tmp_path / "out", base=tmp_path / "other")
    with pytest.raises(MismatchError, match="another shape"):
        fastlock.relock(base, lock, base=tiny_model("llama", head_dim=16))
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_numbers_are_refused_for_that() -> None:
    base, lock = base_and_lock()
    projections(base)[0][1][3, HEAD_DIM + 2] = torch.nan
    with pytest.raises(fastlock.DamagedError, match="NaN"):
        fastlock.relock(base, lock)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_norms_are_those_of_the_columns(dtype: torch.dtype, transposed: bool) -> None:
    weight = torch.randn(1100, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    matrix = weight.t().contiguous().t() if transposed else weight
    before = matrix.clone()
    found = column_norms(HeadColumns(matrix, (24, 0)), 8)
    assert (found.dtype, found.shape) == (torch.float32, (2, 8))
    expected = (weight.double().numpy() ** 2).sum(axis=0) ** 0.5
    torch.testing.assert_close(found[0].double(), torch.from_numpy(expected[24:32]), rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1].double(), torch.from_numpy(expected[:8]), rtol=1e-6, atol=0)
    assert torch.equal(matrix, before)


def test_where_a_sample_of_the_rows_misleads_all_of_them_count() -> None:
    """Of 8192 rows every 16th is looked at; here these alone differ, and then all but these."""
    base = torch.randn(8192, 16, generator=torch.Generator().manual_seed(0))
    norms = column_norms(HeadColumns(base, (0,)), 16)
    found = base.clone()
    found[::16] *= torch.linspace(0.5, 1.5, 16)
    site = likeness(HeadColumns(found, (0,)), norms)
    assert float(site.spreads) < 0.03
    check_likeness([site], "here")
    site = likeness(HeadColumns(base * torch.linspace(0.8, 1.2, 16), (0,)), norms)
    with pytest.raises(UnsupportedError, match="other norms"):
        check_likeness([site], "here")
