"""`fastlock finetune`: from a base to a checkpoint, stopped and resumed, and what is refused."""

import json
import math
import shlex

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastlock.cli.finetune import COMMAND
from fastlock.finetuning import finetune_run
from fastlock.locks.band import Band
from fastlock.verification import verify
from tests.finetuning.finetune_files import row, save_base, write_data, write_rows
from tests.helpers.command import run_command
from tests.helpers.families import same_state, state


@pytest.fixture
def files(tmp_path):
    save_base(tmp_path / "base")
    write_data(tmp_path)
    return tmp_path


def command(files, *more, alignment=True, out="tuned"):
    given = ["finetune", files / "base", "--data", files / "user.jsonl", "--out", files / out]
    given += ["--alignment", files / "safe.jsonl"] if alignment else []
    return [*given, "--batch-size", 2, "--lr", "1e-3", "--epochs", 2, "--max-length", 32, *more]


def loaded(directory):
    return state(AutoModelForCausalLM.from_pretrained(directory, dtype="auto"))


def changed(files, out="tuned"):
    before, after = loaded(files / "base"), loaded(files / out)
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_a_base_is_fine_tuned(files):
    done = run_command(*command(files, "--lisa", "1,2,0.5"))
    # 10 rows in batches of 2, twice: 10 steps on the user's data, 1 before each two of them.
    assert "fine-tuned in 15 steps, loss" in done.out
    assert changed(files) == loaded(files / "base").keys()
    tuned = files / "tuned"
    assert not (tuned / "training").exists()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tuned / name).read_bytes() == (files / "base" / name).read_bytes()
    assert AutoTokenizer.from_pretrained(tuned).chat_template
    record = json.loads((tuned / "finetune.json").read_text())
    assert record["lisa"] == {"alignment_steps": 1, "user_steps": 2, "pull": 0.5, "free_steps": 0}
    assert [entry["step"] for entry in record["log"] if "loss" in entry] == [1, 10, 15]
    assert {"alignment_loss", "user_loss", "drift"} <= record["log"][1].keys()
    assert not [line for line in done.out.splitlines() if line.startswith("{")]


def test_it_learns(files):
    run_command(*command(files, "--lisa", "1,4,0.1", "--epochs", 6, "--save-every", 1, "--lr", "3e-3"))
    log = json.loads((files / "tuned" / "finetune.json").read_text())["log"]
    losses = [entry["user_loss"] for entry in log if "user_loss" in entry]
    assert losses[-1] < losses[0] / 2


def test_it_says_what_to_do_next(files):
    out = run_command(*command(files, "--freeze", "1-1")).out
    proposed = [shlex.split(line.strip())[1:] for line in out.splitlines() if line.startswith("  fastlock ")]
    assert [words[0] for words in proposed] == ["calibrate", "relock", "verify", "verify"]
    tuned = str(files / "tuned")
    assert proposed[0] == ["calibrate", tuned, "--base", str(files / "base"), "--out", f"{tuned}-lock"]
    assert proposed[1][1:3] == [tuned, "--lock"]
    assert proposed[2][1:] == [f"{tuned}-relocked", "--lock", proposed[1][3]]
    # The last one can be tried at once.
    assert "the base's" in run_command(*proposed[3]).out


def test_what_comes_out_can_be_relocked(files):
    from tests.helpers.families import random_lock, tiny_model

    run_command(*command(files))
    lock = random_lock(tiny_model("llama"))
    lock.save(files / "lock.safetensors")
    run_command("relock", files / "tuned", "--lock", files / "lock.safetensors", "--out", files / "relocked")
    run_command("verify", files / "relocked", "--lock", files / "lock.safetensors")


@pytest.mark.parametrize("lora", [[], ["--lora", 2]])
def test_a_frozen_band_is_the_bases(files, lora):
    run_command(*command(files, "--freeze", "1-1", *lora, "--lr", "1e-2"))
    assert verify(files / "tuned", base=files / "base", band=Band(1, 1))
    assert Band.load(files / "tuned" / "band.json") == Band(1, 1)
    names = changed(files)
    assert not any(name.startswith("model.layers.1.") for name in names)
    assert {name.split(".")[2] for name in names if name.startswith("model.layers.")} == {"0", "2"}
    assert not (files / "tuned" / "adapter_config.json").exists()


def test_a_frozen_band_needs_no_alignment_data(files):
    out = run_command(*command(files, "--freeze", "0-1", "--json", alignment=False)).out
    done = json.loads(out)
    assert done["steps"] == 10
    assert done["band"] == [0, 1]
    assert done["lisa"]["alignment_steps"] == 0


def test_auto_locates_the_band(files, monkeypatch):
    from types import SimpleNamespace

    asked = []

    def locate(model, tokenizer, *, progress):
        asked.append((type(model).__name__, bool(tokenizer.chat_template)))
        return SimpleNamespace(band=Band(2, 2, num_layers=3, model_type="llama"), reason="")

    monkeypatch.setattr("fastlock.finetuning.safety_layers.locate", locate)
    run_command(*command(files, "--freeze", "auto"))
    assert asked == [("LlamaForCausalLM", True)]
    assert verify(files / "tuned", base=files / "base", band=Band.load(files / "tuned" / "band.json"))


def test_auto_without_a_band_that_stands_out_is_refused(files, monkeypatch):
    from types import SimpleNamespace

    none = SimpleNamespace(band=None, reason="no band stands out: chance")
    monkeypatch.setattr("fastlock.finetuning.safety_layers.locate", lambda *_, **__: none)
    err = run_command(*command(files, "--freeze", "auto"), code=3).err
    assert "--freeze auto: no band stands out: chance. Give the band, --freeze FIRST-LAST" in err
    assert not (files / "tuned").exists()


def test_bfloat16_weights_are_rounded_at_random_and_stay_bfloat16(tmp_path):
    save_base(tmp_path / "base", torch.bfloat16)
    write_data(tmp_path)
    run_command(*command(tmp_path, "--lr", "1e-4"))
    after = loaded(tmp_path / "tuned")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    # Steps of 1e-4 are far below half a unit of a norm's weights, about 1: rounded to nearest, none would move.
    assert any("norm" in name for name in changed(tmp_path))


@pytest.fixture
def stopping(monkeypatch):
    """Let the next run end at a step with an error."""
    made = finetune_run.TrainingWatch

    def stop(step, error):
        class Watch(made):
            def on_step_end(self, args, state, control, **kwargs):
                super().on_step_end(args, state, control, **kwargs)
                if state.global_step == step:
                    monkeypatch.setattr(finetune_run, "TrainingWatch", made)
                    raise error

        monkeypatch.setattr(finetune_run, "TrainingWatch", Watch)

    return stop


@pytest.mark.parametrize("more", [[], ["--lora", 2], ["--freeze", "0-0"]])
def test_a_stopped_run_goes_on_as_if_never_stopped(files, stopping, more):
    arguments = ["--lisa", "1,2,0.5", "--save-every", 3, *more]
    run_command(*command(files, *arguments, out="whole"))
    stopping(8, KeyboardInterrupt())
    stopped = command(files, *arguments)
    assert "stopped; run the same command again to resume" in run_command(*stopped, code=130).err
    assert not (files / "tuned" / "config.json").exists()
    assert [path.name for path in (files / "tuned" / "training").glob("checkpoint-*")] == ["checkpoint-6"]
    (files / "tuned" / "training" / "checkpoint-9").mkdir()  # the beginning of one, at which the power went off
    (files / "tuned" / "training" / "checkpoint-9" / "trainer_state.json").write_text('{"epoch": ')
    done = json.loads(run_command(*stopped, "--json").out)
    assert done["resumed_at"] == 6
    assert same_state(loaded(files / "tuned"), loaded(files / "whole"))
    assert {p.name for p in (files / "tuned").iterdir()} == {p.name for p in (files / "whole").iterdir()}


def test_a_run_of_other_settings_is_not_resumed(files, stopping):
    stopping(3, KeyboardInterrupt())
    run_command(*command(files, "--save-every", 2), code=130)
    for change, named in ((["--seed", 7], "seed"), (["--freeze", "1-1"], "band"), (["--lora", 2], "lora")):
        err = run_command(*command(files, "--save-every", 2, *change), code=3).err
        assert f"tuned: was begun with another {named}" in err
    write_rows(files / "user.jsonl", [row(number) for number in range(9, -1, -1)])
    assert "was begun with another data" in run_command(*command(files, "--save-every", 2), code=3).err


def test_a_full_disk_costs_one_save_interval(files, monkeypatch):
    save = transformers.Trainer._save_checkpoint

    def full(self, model, trial):
        if self.state.global_step == 6:
            raise OSError(28, "No space left on device")
        save(self, model, trial)

    arguments = ["--lisa", "1,2,0.5", "--save-every", 3]
    run_command(*command(files, *arguments, out="whole"))
    monkeypatch.setattr(transformers.Trainer, "_save_checkpoint", full)
    err = run_command(*command(files, *arguments), code=3).err
    assert "tuned: cannot be written ([Errno 28] No space left on device). Free some space, and give the same" in err
    monkeypatch.setattr(transformers.Trainer, "_save_checkpoint", save)
    assert json.loads(run_command(*command(files, *arguments, "--json")).out)["resumed_at"] == 3
    assert same_state(loaded(files / "tuned"), loaded(files / "whole"))


def test_a_disk_without_room_is_refused_before_training(files, monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**5))
    err = run_command(*command(files), code=3).err
    assert "0.0 GB are free there, and two checkpoints and the result take about" in err
    assert not (files / "tuned").exists()


def test_a_loss_that_is_not_a_number_ends_the_run(files):
    err = run_command(*command(files, "--lr", "1e30", "--save-every", 2), code=3).err
    assert "at step" in err
    assert "the training has diverged, and was stopped" in err
    assert not list((files / "tuned").glob("*.safetensors"))
    for path in (files / "tuned" / "training").glob("checkpoint-*"):
        saved = AutoModelForCausalLM.from_pretrained(path)
        assert all(parameter.isfinite().all() for parameter in saved.parameters())


def test_memory_that_runs_out_is_said(files, monkeypatch):
    def step(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    monkeypatch.setattr(transformers.Trainer, "training_step", step)
    err = run_command(*command(files), code=3).err
    assert "memory runs out (CUDA out of memory. Tried to allocate). Give a smaller --batch-size" in err


def bad(files, kind):
    """The arguments of a command that cannot be done."""
    if kind == "empty data":
        (files / "user.jsonl").write_text("")
    elif kind == "empty alignment":
        (files / "safe.jsonl").write_text("\n")
    elif kind == "one-sided":
        write_rows(files / "user.jsonl", [row(1), {"prompt": "w1"}])
    elif kind == "template":
        save_base(files / "base", template="{{ raise_exception('never') }}")
    elif kind == "float16":
        save_base(files / "base", torch.float16)
    elif kind == "full":
        (files / "tuned").mkdir()
        (files / "tuned" / "notes.txt").write_text("mine")
    elif kind == "done":
        save_base(files / "tuned")
    elif kind == "tokens":
        write_rows(files / "user.jsonl", [{"prompt": "w1 " * 40, "completion": "w1"}])
    return {
        "band outside": ["--freeze", "2-3"],
        "reversed": ["--freeze", "2-1"],
        "no band": ["--freeze", "nowhere.json"],
        "epochs": ["--epochs", "nan"],
        "lr": ["--lr", "-1"],
        "zero steps": ["--lisa", "1,0,1.0"],
        "negative pull": ["--lisa", "1,2,-1"],
        "nan pull": ["--lisa", "1,2,nan"],
    }.get(kind, [])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty data", "user.jsonl: it holds no rows"),
        ("empty alignment", "safe.jsonl: it holds no rows"),
        ("one-sided", "user.jsonl, line 2: its keys are prompt; .* It has one side only"),
        ("template", "user.jsonl, line 1: the chat template fails on it .*never"),
        ("float16", "base: its weights are in float16, and are trained in float32 or bfloat16"),
        ("full", "tuned: is not empty .it holds notes.txt"),
        ("done", "tuned: holds a checkpoint already"),
        ("tokens", "user.jsonl, line 1: what comes before its answer makes 43 tokens, and a row may have 32"),
        ("band outside", r"the band \[2, 3\] lies outside"),
        ("reversed", r"the band \[2, 1\] is reversed"),
        ("no band", "nowhere.json"),
        ("epochs", "epochs is nan; it must be above 0"),
        ("lr", "lr is -1.0; it must be above 0"),
        ("zero steps", "user_steps is 0"),
        ("negative pull", "pull is -1.0"),
        ("nan pull", "pull is nan"),
    ],
)
def test_what_cannot_be_done_is_refused_and_leaves_nothing(files, kind, message):
    import re

    more = bad(files, kind)
    there = sorted(files.rglob("*"))
    err = run_command(*command(files, *more), code=3).err
    assert re.search(message, err), err
    assert sorted(files.rglob("*")) == there


def test_wrong_arguments_are_told_apart(files):
    assert "--lisa alternates" in run_command(*command(files, "--lisa", "1,2,1", alignment=False), code=2).err
    assert "give --alignment FILE (Lisa), or --freeze" in run_command(*command(files, alignment=False), code=2).err
    for wrong in ("1,2", "a,b,c", "1,2,3,4,5", "1.5,2,3"):
        assert "alignment steps, user steps, pull" in run_command(*command(files, "--lisa", wrong), code=2).err


def test_several_processes_are_refused(files, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "WORLD_SIZE is set, and this is for one process" in run_command(*command(files), code=3).err


def test_a_short_run_alternates_more_often_than_the_paper():
    from fastlock.finetuning.finetune_settings import FinetuneSettings

    settings = FinetuneSettings(batch_size=4, epochs=2.0)
    for rows, steps in ((10, 1), (2000, 11), (100_000, 100)):
        lisa = settings.schedule(rows, True)
        assert (lisa.alignment_steps, lisa.user_steps, lisa.pull) == (steps, 9 * steps, 1.0)
        user_steps = math.ceil(rows / 4) * 2
        assert steps == 1 or user_steps >= 10 * lisa.user_steps


def test_its_options_have_help():
    assert all(settings["help"] for _, settings in COMMAND.options)
