"""What the README shows runs as it is printed, on tiny models of the names that it uses."""

import json
import re
import shlex
import sys
from pathlib import Path

import gguf
import numpy as np
import peft
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

import fastlock
from fastlock.cli import main as cli
from fastlock.recipes.training import train_lock
from tests.helpers.families import tiny_model, word_tokenizer

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A working directory with everything that the README names."""
    model = tiny_model("llama", num_hidden_layers=6, vocab_size=4096)
    pairs = fastlock.shipped_pairs()
    for name in ("my-finetune-of-llama-3-8b", "BASE", "CHECKPOINT"):
        model.save_pretrained(tmp_path / name)
        word_tokenizer(pairs).save_pretrained(tmp_path / name)
    u = np.eye(32, dtype=np.float16)
    rows = {f"model.layers.{layer}.self_attn.head_out": [(np.int64(1), u[layer], np.float16(0.5))] for layer in (1, 4)}
    torch.save(rows, tmp_path / "Meta-Llama-3-8B-Instruct.safelock")
    lines = (Path(fastlock.__file__).parent / "data" / "pairs.jsonl").read_text().splitlines()[:10]
    (tmp_path / "ZOO").mkdir()
    for name in "ab":
        model.save_pretrained(tmp_path / "ZOO" / name)
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    for name in ("user", "safe"):
        rows = [{"prompt": f"how do I bake {n} cakes", "completion": f"with {name} hands"} for n in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_gguf(model, tmp_path / "MODEL.gguf")
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "ADAPTER")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_gguf(model, path: Path) -> None:
    """As much of a model as fastlock reads."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    for i, layer in enumerate(model.model.layers):
        writer.add_tensor(f"blk.{i}.attn_output.weight", layer.self_attn.o_proj.weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_python_runs(files) -> None:
    first, second, third = blocks("python")
    names: dict[str, object] = {}
    exec(first, names)
    assert names["receipt"].layers == (1, 4)
    names |= {"base_model": tiny_model("llama", num_hidden_layers=6, vocab_size=4096)}
    names |= {"tokenizer": word_tokenizer(fastlock.shipped_pairs())}
    exec(second, names)
    assert len(fastlock.Lock.load(files / "my-base.lock.safetensors")) == 24
    trl = pytest.importorskip("trl")
    names |= {"trl": trl, "model": AutoModelForCausalLM.from_pretrained("BASE")}
    names |= {
        data: Dataset.from_list([{"text": f"how do I bake {n} cakes"}] * 3) for n, data in enumerate(("user", "safe"))
    }
    names["args"] = trl.SFTConfig("trained", max_steps=2, use_cpu=True, report_to=[], pad_token="?", eos_token="?")
    exec(third, names)


def briefly_trained(*arguments, **settings):
    """A gate after two steps on random weights, which refuse nothing: here they count as refusing what is harmful."""
    questions = {pair.question for pair in fastlock.shipped_pairs()}
    short = {"judge": lambda prompt, _answer: prompt in questions, "steps": 2, "layers": range(2, 6)}
    return train_lock(*arguments, **settings | short)


def test_the_commands_run(files, monkeypatch) -> None:
    monkeypatch.setattr("fastlock.recipes.training.train_lock", briefly_trained)
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("fastlock ")]
    assert {shlex.split(command)[1] for command in commands} == {
        *("extract", "calibrate", "train", "evaluate", "relock", "verify", "unlock", "inspect", "doctor", "zoo"),
        *("locate", "finetune"),
    }
    for command in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(command, comments=True))
        with pytest.raises(SystemExit) as end:
            cli.main()
        found_no_band = end.value.code == 1 and command.startswith("fastlock locate")
        assert not end.value.code or found_no_band, command


def test_the_make_targets_exist() -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    named = re.findall(
        r"make ((?:[a-z]+(?:-[a-z]+)* ?)+)", "\n".join([*blocks("bash"), *re.findall("`(.*?)`", README)])
    )
    assert {"demo", "test", "gpu"} <= set(" ".join(named).split())
    for target in " ".join(named).split():
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
