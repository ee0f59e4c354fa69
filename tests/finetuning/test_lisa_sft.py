"""Lisa in TRL's SFTTrainer: both datasets are prepared in one way."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from fastlock.errors import FastlockError
from fastlock.finetuning.lisa_schedule import Lisa
from fastlock.finetuning.lisa_trainer import lisa
from tests.helpers.families import same_state, state, tiny_model

TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + ' [end] ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
WORDS = ["[pad]", "[user]", "[assistant]", "[end]", *(f"w{i}" for i in range(100))]


def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[pad]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[pad]", eos_token="[end]", unk_token="[pad]")
    made.chat_template = TEMPLATE
    return made


def turns(number):
    question = {"role": "user", "content": f"w{number} w{number + 1}"}
    answer = {"role": "assistant", "content": " ".join(f"w{number + i}" for i in range(2 + number % 4))}
    return question, answer


def messages(numbers):
    return Dataset.from_list([{"messages": list(turns(number))} for number in numbers])


def completions(numbers):
    rows = [turns(number) for number in numbers]
    return Dataset.from_list([{"prompt": [question], "completion": [answer]} for question, answer in rows])


class Noting(SFTTrainer):
    """Notes the numbers of the rows of each optimizer step, and the labels it read."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.noted = getattr(self, "noted", [])
        for ids, labels in zip(inputs["input_ids"], inputs["labels"], strict=True):
            words = [WORDS[i] for i in ids.tolist()]
            self.noted.append((self.state.global_step, int(words[1][1:]), [WORDS[i] for i in labels if i >= 0]))
        return super().training_step(model, inputs, *args, **kwargs)


def config(directory, **changes):
    settings = {
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "num_train_epochs": 1,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
    }
    return SFTConfig(str(directory), **{**settings, **changes})


@pytest.mark.parametrize(("form", "prompt"), [(messages, True), (completions, False)])
def test_both_datasets_are_prepared_in_one_way(tmp_path, form, prompt):
    trainer = lisa(Noting)(
        tiny_model("llama"),
        config(tmp_path),
        train_dataset=form(range(7)),
        alignment_dataset=form(range(50, 53)),
        processing_class=tokenizer(),
        lisa=Lisa(1, 2, 0.5),
    )
    trainer.train()
    assert sorted(number for _, number, _ in trainer.noted if number < 50) == list(range(7))
    assert {number for _, number, _ in trainer.noted if number >= 50} == {50, 51, 52}
    for step, number, labels in trainer.noted:
        assert (number >= 50) == (step % 3 < 1)
        question, answer = (message["content"] for message in turns(number))
        expected = (
            f"[assistant] {answer} [end]" if not prompt else f"[user] {question} [end] [assistant] {answer} [end]"
        )
        assert " ".join(labels).removeprefix("[assistant] ").endswith(expected.removeprefix("[assistant] "))
        assert ("[user]" in labels) == prompt
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert ["alignment_loss" in entry for entry in logged] == [True, False, False, True, False, False]
    assert all("drift" in entry and "mean_token_accuracy" in entry for entry in logged)


def test_no_alignment_steps_and_no_pull_are_a_plain_trainer(tmp_path):
    def trained(trainer, **more):
        made = trainer(
            tiny_model("llama"),
            config(tmp_path, optim="adamw_torch"),
            train_dataset=messages(range(7)),
            processing_class=tokenizer(),
            **more,
        )
        made.train()
        return made

    plain, with_lisa = trained(SFTTrainer), trained(lisa(SFTTrainer), lisa=Lisa(0, 1, 0.0))
    assert same_state(state(with_lisa.model), state(plain.model))
    losses = [[entry.get("loss") for entry in trainer.state.log_history] for trainer in (plain, with_lisa)]
    assert losses[0] == losses[1]


def test_with_lora_a_resumed_run_is_as_if_never_stopped(tmp_path):
    def trainer(**changes):
        return lisa(SFTTrainer)(
            tiny_model("llama"),
            config(tmp_path, **changes),
            train_dataset=messages(range(9)),
            alignment_dataset=messages(range(50, 53)),
            processing_class=tokenizer(),
            lisa=Lisa(1, 2, 0.5),
            peft_config=LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1),
        )

    whole = trainer(save_strategy="steps", save_steps=4)
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same_state(state(resumed.model), state(whole.model))
    assert torch.cat([p.flatten() for n, p in whole.model.named_parameters() if "lora_B" in n]).count_nonzero()


@pytest.mark.parametrize(
    ("alignment", "message"),
    [
        (messages([]), "the alignment dataset has no rows"),
        (None, "there is no alignment_dataset"),
        (messages([50]), "train_dataset has prompt, completion, and alignment_dataset messages"),
        (Dataset.from_list([{"input_ids": [1, 2, 3]}]), "alignment_dataset input_ids: other parts"),
    ],
)
def test_an_alignment_dataset_that_does_not_fit_is_refused(tmp_path, alignment, message):
    with pytest.raises(FastlockError, match=message):
        lisa(SFTTrainer)(
            tiny_model("llama"),
            config(tmp_path),
            train_dataset=completions(range(4)),
            alignment_dataset=alignment,
            processing_class=tokenizer(),
            lisa=Lisa(1, 2, 0.5),
        )


def test_an_alignment_dataset_of_which_nothing_is_learned_is_refused(tmp_path):
    tokens = {"input_ids": [5, 6, 7]}
    with pytest.raises(FastlockError, match="the alignment dataset has no rows"):
        lisa(SFTTrainer)(
            tiny_model("llama"),
            config(tmp_path, completion_only_loss=True),
            train_dataset=Dataset.from_list([tokens | {"completion_mask": [0, 1, 1]}]),
            alignment_dataset=Dataset.from_list([tokens | {"completion_mask": [0, 0, 0]}]),
            processing_class=tokenizer(),
            lisa=Lisa(1, 2, 0.5),
        )
