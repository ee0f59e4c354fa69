"""Guard models as judges: the real tokenizer and batching, and a model that says what the test has it say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

import fastlock
from fastlock.evaluation.guard_judge import GuardJudge
from fastlock.evaluation.judges import judge_name, open_judge
from fastlock.evaluation.judging import judge_all
from tests.helpers.exchanges import SORRY, SURE, plainly
from tests.helpers.families import tiny_model

WILDGUARD = "Harmful request: yes\nResponse refusal: {}\nHarmful response: no"


class Script:
    """A model whose continuations are given by what is in the prompt."""

    def __init__(self, tokenizer: Any, says: dict[str, str], room: int = 99, room_for: int = 9999) -> None:
        self.tokenizer, self.says, self.room = tokenizer, says, room
        self.asked: list[str] = []
        self.sizes: list[int] = []
        self.options: dict[str, Any] = {}
        self.config, self.generation_config = tiny_model("llama", max_position_embeddings=room_for).config, None

    def eval(self) -> Script:
        return self

    def get_input_embeddings(self) -> Any:
        return torch.nn.Embedding(9999, 1)

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
        self.sizes.append(len(input_ids))
        if len(input_ids) > self.room:
            raise torch.OutOfMemoryError("too much")
        self.options = options
        assert not torch.is_grad_enabled()
        texts = [self.tokenizer.decode(row[mask.bool()]) for row, mask in zip(input_ids, attention_mask, strict=True)]
        self.asked += texts
        said = [next(says for key, says in self.says.items() if key in text) for text in texts]
        rows = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in said]
        width = max(map(len, rows))
        return torch.cat([input_ids, torch.tensor([row + [0] * (width - len(row)) for row in rows])], dim=1)


class Characters:
    """A tokenizer of characters; `<s>` is one of its tokens in its own right, as it is in a real one."""

    pad_token_id = 0
    eos_token_id = 0

    def __init__(self, chat_template: str | None = None) -> None:
        self.chat_template = chat_template

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": list(map(ord, text))}

    def decode(self, row: Any) -> str:
        return "".join(chr(int(token)) for token in row if token)

    def batch_decode(self, rows: Any, skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return list(map(self.decode, rows))

    def apply_chat_template(self, messages: list[dict[str, Any]], tokenize: bool) -> str:
        assert not tokenize
        assert [message["role"] for message in messages] == ["user", "assistant"]
        if "parts" in str(self.chat_template):
            return "|".join(part["text"] for said in messages for part in said["content"] if isinstance(part, dict))
        return f"[{messages[0]['content']}|{messages[1]['content']}]"


def guard(says: dict[str, str], template: str | None = None, room: int = 99) -> tuple[GuardJudge, Script]:
    tokenizer = Characters(template)
    model = Script(tokenizer, says, room)
    return GuardJudge(model, tokenizer, "a guard"), model  # type: ignore[arg-type]


def test_wildguard_is_asked_in_its_format_and_read() -> None:
    judge, model = guard(
        {"ask-a": WILDGUARD.format("yes"), "ask-b": WILDGUARD.format("no"), "ask-c": WILDGUARD.format("n/a")}
    )
    pairs = [("ask-a {0}", SURE), ("ask-b", SORRY), ("ask-c", "")]
    assert judge.batch(pairs) == [True, False, None]
    assert judge(*pairs[0]) is True
    assert model.asked[0].startswith("<s><|user|>\n[INST] You are a classifier for analyzing interactions")
    assert model.asked[0].endswith(
        f"\n\nHuman user:\nask-a {{0}}\n\nAI assistant:\n{SURE}\n\n---\n\nAnswers: [/INST]\n<|assistant|>\n"
    )
    assert model.options["generation_config"].do_sample is False
    assert judge_name(judge) == "guard model a guard"


def test_llama_guard_is_asked_through_its_template_and_keywords_say_the_rest() -> None:
    template = "... <BEGIN UNSAFE CONTENT CATEGORIES> ..."
    judge, model = guard({"ask-a": "\n\nsafe", "ask-b": "unsafe\nS2", "ask-c": "well"}, template)
    pairs = [("ask-a", SORRY), ("ask-a", SURE), ("ask-b", SORRY), ("ask-b", SURE), ("ask-c", SORRY)]
    assert judge.batch(pairs) == [True, False, False, False, None]
    assert model.asked[0] == f"[ask-a|{SORRY}]"
    judge, _ = guard({"ask": "Safety: Safe\nCategories: None\nRefusal: Yes"}, template)
    assert judge("ask", SURE) is True
    # Without a guard's template, "safe" is no verdict: it was not asked for.
    judge, _ = guard({"ask": "safe"})
    assert judge("ask", SORRY) is None


TEMPLATE = "... <BEGIN UNSAFE CONTENT CATEGORIES> ..."


def test_a_guards_template_may_want_messages_in_parts() -> None:
    judge, model = guard({"ask-a": "safe"}, TEMPLATE + "parts")
    assert judge("ask-a", SORRY) is True
    assert model.asked == [f"ask-a|{SORRY}"]


@pytest.mark.parametrize("made", ["[{0}|]", "[|{1}]", None])
def test_a_guards_template_that_leaves_out_what_is_judged(made: str | None, monkeypatch) -> None:
    def rendered(_self: Any, messages: Any, tokenize: bool) -> str:
        assert made is not None  # templates raise, too
        return made.format(*(message["content"] for message in messages))

    monkeypatch.setattr(Characters, "apply_chat_template", rendered)
    with pytest.raises(fastlock.UnsupportedError, match="guard model a guard: its chat template leaves out"):
        guard({}, TEMPLATE)


def test_a_real_template_that_wants_messages_in_parts() -> None:
    """As Llama Guard 3 1B's, which makes nothing of a text."""
    words = "<BEGIN UNSAFE CONTENT CATEGORIES> What stands in the question. answer. pick locks Sorry".split()
    core = Tokenizer(WordLevel({word: number for number, word in enumerate([*dict.fromkeys(words), "?"])}, "?"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?")
    tokenizer.chat_template = (
        "<BEGIN UNSAFE CONTENT CATEGORIES> {% for message in messages %}{% for content in message['content'] %}"
        "{% if content['type'] == 'text' %}{{ content['text'] }} {% endif %}{% endfor %}{% endfor %}"
    )
    judge = GuardJudge(tiny_model("llama", max_position_embeddings=256), tokenizer, "a guard")
    assert tokenizer.decode(judge._tokens("pick locks", "Sorry")).endswith("CATEGORIES> pick locks Sorry")


def test_a_guard_that_can_not_read_all_of_an_answer() -> None:
    tokenizer = Characters(TEMPLATE)
    judge = GuardJudge(Script(tokenizer, {}, room_for=60), tokenizer, "a guard")  # type: ignore[arg-type]
    with pytest.raises(
        fastlock.FastlockError, match=r"asked about the answer 'x+': it makes 53 tokens.*reads at most 60"
    ):
        judge("p", "x" * 49)


def test_a_judge_is_none_if_it_has_no_verdict_on_any_answer() -> None:
    """However many answers are judged at once, and whatever it said of the first one."""
    says = {"ask-a": "Once upon a time", "ask-b": WILDGUARD.format("no")}
    unsure, sure = ("ask-a", SORRY), ("ask-b", SORRY)
    for size in (1, 2, 3):
        judge, _ = guard(says)
        assert judge_all(judge, [unsure, unsure, sure], size, plainly, "") == [None, None, False]
        assert judge_all(judge, [unsure], size, plainly, "") == [None]  # a judge by now, who can't say
        judge, model = guard(says)
        with pytest.raises(fastlock.FastlockError, match=r"on the first answer, it said 'Once upon a time'.*WildGuard"):
            judge_all(judge, [unsure] * 3, size, plainly, "")
        assert len(model.asked) == 3


def test_a_guards_batches_are_halved_when_memory_runs_out() -> None:
    says = {"ask-a": WILDGUARD.format("yes"), "ask-b": WILDGUARD.format("no")}
    judge, model = guard(says, room=1)
    assert judge.batch([("ask-a", ""), ("ask-b", ""), ("ask-a", "")]) == [True, False, True]
    assert model.sizes == [3, 1, 2, 1, 1]


def test_a_guard_from_a_directory_is_a_model_like_any(tmp_path) -> None:
    """A random model says nothing sensible: it is loaded and asked, and its words are no verdict."""
    tiny_model("llama", max_position_embeddings=256).save_pretrained(tmp_path)
    core = Tokenizer(WordLevel({f"w{number}": number for number in range(127)} | {"?": 127}, unk_token="?"))
    core.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?").save_pretrained(tmp_path)
    with pytest.raises(fastlock.FastlockError, match=r"no verdict that can be read \(on the first answer, it said 'w"):
        judge_all(open_judge(str(tmp_path)), [("w1", "w2")], 1, plainly, "")


def test_a_guard_that_thinks_aloud() -> None:
    judge, _ = guard({"ask-a": f"<think>Response refusal: no</think>{WILDGUARD.format('yes')}", "ask-b": "<think>Hm"})
    assert judge.batch([("ask-a", SORRY), ("ask-b", SORRY)]) == [True, None]
    judge, _ = guard({"ask": "Hm\n</think>\n\nsafe"}, TEMPLATE)
    assert judge("ask", SORRY) is True
