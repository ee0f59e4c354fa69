"""A tokenizer in the Llama form: what is written for it, and that the installed transformers reads it as before."""

import json
from pathlib import Path

import pytest

import fastlock
from fastlock.architectures.tokenizer_classes import tokenizer_classes
from fastlock.checkpoints.layout import ASIDE
from fastlock.errors import DamagedError, UnsupportedError
from tests.helpers.families import random_lock, tiny_model
from tests.helpers.read_tokenizers import read
from tests.helpers.tokenizer_files import CASES, TOKENS, write_tokenizer

VERSIONS = ["config.4.0.0.json", "config.5.0.0.json"]


def with_tokenizer(tmp_path, case: str, **changes):
    """A checkpoint with a case's tokenizer, and a lock that fits."""
    model_type, _, _ = CASES[case]
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path / "source")
    write_tokenizer(case, tmp_path / "source")
    update(tmp_path / "source" / "config.json", changes)
    return tmp_path / "source", random_lock(model)


def update(file: Path, changes: dict) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def json_of(directory: Path, name: str) -> dict:
    return json.loads((directory / name).read_text())


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", CASES)
def test_the_installed_transformers_reads_it_as_before_and_unlocking_gives_it_back(case: str, tmp_path) -> None:
    source, lock = with_tokenizer(tmp_path, case)
    before = contents(source)
    fastlock.relock_checkpoint(source, lock, tmp_path / "out")
    assert read(str(tmp_path / "out")) == read(str(source))
    assert fastlock.verify(tmp_path / "out", lock)
    fastlock.unlock_checkpoint(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source) == before


def test_a_mistral_declares_its_class_to_transformers_4_alone(tmp_path) -> None:
    """Transformers 5 goes by the tokenizer.json of a Mistral, whatever it declares; of a Llama, by what it declares."""
    source, lock = with_tokenizer(tmp_path, "Mistral 7B")
    receipt = fastlock.relock_checkpoint(source, lock, tmp_path / "out").to_dict()
    config, old, new = (json_of(tmp_path / "out", name) for name in ("config.json", *VERSIONS))
    assert config.pop("configuration_files") == VERSIONS
    assert config == old
    assert old == new | {"tokenizer_class": "LlamaTokenizer"}
    assert new["tokenizer_class"] == "TokenizersBackend"
    assert new["model_type"] == "llama"
    assert receipt.items() <= new["fastlock"].items()
    assert json_of(tmp_path / "out", "tokenizer_config.json") == TOKENS | {"legacy": True}
    aside = tmp_path / "out" / ASIDE / "tokenizer_config.json"
    assert aside.read_bytes() == (source / "tokenizer_config.json").read_bytes()
    assert "tokenizer_config.json" in config["fastlock"]["carrier"]["set_aside"]


@pytest.mark.parametrize(
    ("model_type", "declared", "classes"),
    [
        ("mistral", None, {"4.0.0": "LlamaTokenizer", "5.0.0": "TokenizersBackend"}),
        ("mistral", "LlamaTokenizerFast", {"4.0.0": "LlamaTokenizerFast", "5.0.0": "TokenizersBackend"}),
        ("mistral", "TokenizersBackend", {}),
        ("mistral", "PreTrainedTokenizerFast", {}),
        ("qwen2", None, {"4.0.0": "Qwen2Tokenizer"}),
        ("qwen2", "Qwen2TokenizerFast", {}),
        (
            "qwen2",
            "LlamaTokenizerFast",
            {"4.0.0": "LlamaTokenizerFast", "5.0.0": "TokenizersBackend", "5.8.0": "Qwen2Tokenizer"},
        ),
    ],
)
def test_the_classes_that_each_release_takes(model_type: str, declared: str | None, classes: dict[str, str]) -> None:
    assert tokenizer_classes(model_type, declared) == classes


def test_a_qwen2_that_declares_none_declares_it_in_its_config(tmp_path) -> None:
    source, lock = with_tokenizer(tmp_path, "Qwen2 without a class")
    fastlock.relock_checkpoint(source, lock, tmp_path / "out")
    assert json_of(tmp_path / "out", "config.json")["tokenizer_class"] == "Qwen2Tokenizer"
    assert "configuration_files" not in json_of(tmp_path / "out", "config.json")
    assert not (tmp_path / "out" / ASIDE / "tokenizer_config.json").exists()


@pytest.mark.parametrize("case", ["Qwen2.5", "Mistral, any class"])
def test_a_class_that_is_right_for_all_stays_as_it_is(case: str, tmp_path) -> None:
    source, lock = with_tokenizer(tmp_path, case)
    fastlock.relock_checkpoint(source, lock, tmp_path / "out")
    assert not list((tmp_path / "out").glob("config.*.json"))
    assert "tokenizer_class" not in json_of(tmp_path / "out", "config.json")
    kept = tmp_path / "out" / "tokenizer_config.json"
    assert kept.read_bytes() == (source / "tokenizer_config.json").read_bytes()


def test_relocking_again_and_in_place(tmp_path) -> None:
    source, lock = with_tokenizer(tmp_path, "Mistral 7B")
    before, other = contents(source), random_lock(tiny_model("mistral"), [(1, 0)], seed=7)
    fastlock.relock_checkpoint(source, lock, tmp_path / "out")
    fastlock.relock_checkpoint(tmp_path / "out", other, tmp_path / "again")
    fastlock.relock_checkpoint(source, other, tmp_path / "once")
    assert contents(tmp_path / "again") == contents(tmp_path / "once")
    fastlock.relock_checkpoint(source, lock, source, in_place=True)
    assert contents(source) == contents(tmp_path / "out")
    fastlock.unlock_checkpoint(source, source, in_place=True)
    assert contents(source) == before


def test_the_native_form_leaves_the_tokenizer_alone(tmp_path) -> None:
    source, lock = with_tokenizer(tmp_path, "Mistral 7B", sliding_window=16)
    fastlock.relock_checkpoint(source, lock, tmp_path / "out", stacks=["vllm"])
    assert json_of(tmp_path / "out", "config.json")["model_type"] == "mistral"
    assert not list((tmp_path / "out").glob("config.*.json"))
    assert (tmp_path / "out" / "tokenizer_config.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()


@pytest.mark.parametrize("name", VERSIONS)
@pytest.mark.parametrize("change", ["key", "lost"])
def test_a_config_for_some_releases_that_says_another_thing_is_noticed(name: str, change: str, tmp_path) -> None:
    """They load it instead of config.json: without the flag, the lock would be lost there."""
    source, lock = with_tokenizer(tmp_path, "Mistral 7B")
    fastlock.relock_checkpoint(source, lock, tmp_path / "out")
    if change == "key":
        update(tmp_path / "out" / name, {"attention_bias": False})
    else:
        (tmp_path / "out" / name).unlink()
    found = fastlock.verify(tmp_path / "out", lock)
    assert (found.state, found.reason) == ("altered", f"{name} is not the one that fastlock wrote")
    with pytest.raises(DamagedError, match=f"{name} is not the one that fastlock wrote"):
        fastlock.unlock_checkpoint(tmp_path / "out", tmp_path / "back")


def test_a_tokenizer_that_was_changed_since_is_not_thrown_away(tmp_path) -> None:
    source, lock = with_tokenizer(tmp_path, "Mistral 7B")
    fastlock.relock_checkpoint(source, lock, tmp_path / "out")
    update(tmp_path / "out" / "tokenizer_config.json", {"chat_template": "x"})
    assert fastlock.verify(tmp_path / "out", lock), "the lock is what it was"
    with pytest.raises(DamagedError, match="tokenizer_config.json is not the one that fastlock wrote"):
        fastlock.unlock_checkpoint(tmp_path / "out", tmp_path / "back")


@pytest.mark.parametrize(
    ("config", "tokenizer_config", "why"),
    [
        ({}, {"auto_map": {"AutoTokenizer": ["tokenization.Mine", None]}}, "code of its own"),
        ({}, {"auto_map": ["tokenization.Mine", None]}, "code of its own"),
        ({"auto_map": {"AutoTokenizer": ["tokenization.Mine", None]}}, {}, "code of its own"),
        ({}, {"tokenizer_class": "MistralCommonTokenizer"}, "mistral-common"),
        ({}, {"fix_mistral_regex": True}, "fix_mistral_regex"),
        ({"tokenizer_class": "LlamaTokenizer"}, {"tokenizer_class": None}, "declared in config.json alone"),
    ],
)
def test_what_some_release_would_read_otherwise_is_refused(config, tokenizer_config, why: str, tmp_path) -> None:
    source, lock = with_tokenizer(tmp_path, "Mistral 7B", **config)
    update(source / "tokenizer_config.json", tokenizer_config)
    with pytest.raises(UnsupportedError, match=f"{why}.*relock in memory"):
        fastlock.relock_checkpoint(source, lock, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"tokenizer_class": 3}', '{"a": 1, "a": 2}'])
def test_a_damaged_tokenizer_config(text: str, tmp_path) -> None:
    source, lock = with_tokenizer(tmp_path, "Mistral 7B")
    (source / "tokenizer_config.json").write_text(text)
    with pytest.raises(DamagedError, match="tokenizer_config.json"):
        fastlock.relock_checkpoint(source, lock, tmp_path / "out")


def test_a_file_of_the_users_own_under_the_name_of_a_config(tmp_path) -> None:
    source, lock = with_tokenizer(tmp_path, "Mistral 7B")
    (source / "config.5.0.0.json").write_text("{}")
    with pytest.raises(UnsupportedError, match=r"holds config\.5\.0\.0\.json"):
        fastlock.relock_checkpoint(source, lock, tmp_path / "out")


def test_a_model_without_a_tokenizer_gets_nothing(tmp_path) -> None:
    model = tiny_model("mistral")
    model.save_pretrained(tmp_path / "source")
    fastlock.relock_checkpoint(tmp_path / "source", random_lock(model), tmp_path / "out")
    assert not list((tmp_path / "out").glob("config.*.json"))
    assert "tokenizer_class" not in json_of(tmp_path / "out", "config.json")
