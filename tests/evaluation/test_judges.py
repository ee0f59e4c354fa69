"""Judges: keywords, a guard model with a real tokenizer, and an endpoint behind a real socket."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

import fastlock
from fastlock.evaluation import endpoint_judge
from fastlock.evaluation.endpoint_judge import EndpointJudge
from fastlock.evaluation.evaluator import evaluate
from fastlock.evaluation.guard_judge import GuardJudge
from fastlock.evaluation.judges import judge_name, open_judge
from fastlock.evaluation.judging import judge_all
from fastlock.evaluation.keyword_judge import refuses
from fastlock.evaluation.prompts import Prompts
from tests.helpers.families import tiny_model

SORRY = "I'm sorry, I can't do that."
SURE = "Sure: open the window."
PAIRS = [("p1", SORRY), ("p2", SURE), ("p3", "")]


def plainly(items: Any, _what: str) -> Any:
    return items


# Any function, and what it is asked


def test_a_function_is_asked_one_by_one_and_may_not_know() -> None:
    asked = []

    def judge(prompt: str, answer: str) -> Any:
        asked.append((prompt, answer))
        return [1, 0, None][len(asked) - 1]

    assert judge_all(judge, PAIRS, 2, plainly, "") == [True, False, None]
    assert asked == PAIRS
    assert judge_name(judge) == "judge"
    assert judge_name(refuses) == "keywords"
    assert judge_name(lambda prompt, answer: True) == "<lambda>"


def test_a_judge_with_batches_is_asked_in_batches() -> None:
    class Batched:
        sizes: list[int] = []  # noqa: RUF012

        def batch(self, pairs: Any) -> list[bool | None]:
            self.sizes.append(len(pairs))
            return [refuses(*pair) for pair in pairs][: 5 - sum(self.sizes)]

    judge = Batched()
    assert judge_all(judge, PAIRS, 2, plainly, "") == [True, False, False]
    assert judge.sizes == [2, 1]
    with pytest.raises(fastlock.FastlockError, match="2 verdicts on 3 answers"):
        judge_all(judge, PAIRS, 3, plainly, "")


def test_what_a_user_names(tmp_path, monkeypatch) -> None:
    assert open_judge("keywords") is refuses
    for given, model, message in (
        ("keywords", "gpt", "for an endpoint only"),
        ("http://localhost:1/v1", None, "--judge-model"),
        ("no/such-model", None, "no directory here"),
        ("https://user:secret@host/v1", "m", "can't be used"),
        ("https://host/v1?key=secret", "m", "can't be used"),
        ("https://host:99999/v1", "m", "can't be used"),
        ("https:///v1", "m", "can't be used"),
        ("http://a..b/v1", "m", "can't be used"),
        (f"http://{'a' * 70}.com/v1", "m", "can't be used"),
        ("http://localhost/\u00e9/v1", "m", "can't be used.*percent-encoded"),
        ("http://localhost/a b/v1", "m", "can't be used"),
        (str(tmp_path), None, "can't be loaded"),
    ):
        with pytest.raises(fastlock.FastlockError, match=message) as error:
            open_judge(given, model)
        assert "secret" not in str(error.value)
    monkeypatch.setenv("FASTLOCK_JUDGE_API_KEY", "a\nb")
    with pytest.raises(fastlock.FastlockError, match="FASTLOCK_JUDGE_API_KEY"):
        open_judge("http://localhost/v1", "m")


# Guard models: the real tokenizer and batching, and a model that says what the test has it say

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
    with pytest.raises(fastlock.FastlockError, match="guard model a guard: its chat template leaves out"):
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
    with pytest.raises(fastlock.FastlockError, match=r"guard, asked about the answer 'x+': it makes 53 tokens.*reads at most 60"):
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
        with pytest.raises(fastlock.FastlockError, match=r"'Once upon a time' on the first answer.*WildGuard"):
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
    with pytest.raises(fastlock.FastlockError, match=r"is no verdict \('w"):
        judge_all(open_judge(str(tmp_path)), [("w1", "w2")], 1, plainly, "")


def test_a_guard_that_thinks_aloud() -> None:
    judge, _ = guard({"ask-a": f"<think>Response refusal: no</think>{WILDGUARD.format('yes')}", "ask-b": "<think>Hm"})
    assert judge.batch([("ask-a", SORRY), ("ask-b", SORRY)]) == [True, None]
    judge, _ = guard({"ask": "Hm\n</think>\n\nsafe"}, TEMPLATE)
    assert judge("ask", SORRY) is True


# An endpoint, behind a real socket

KEY = "sk-secret-123"


@contextlib.contextmanager
def endpoint(answer: Any):
    """A server whose `answer(number, request body)` gives a status and a body; yields its URL and what it was asked."""
    asked: list[tuple[str, dict[str, str], Any]] = []
    count = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with count:
                asked.append((self.path, dict(self.headers), body))
                number = len(asked)
            status, data, *headers = answer(number, body)
            with contextlib.suppress(ConnectionError):
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def completion(text: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def said(body: Any) -> Any:
    return json.loads(body["messages"][1]["content"])


def by_keywords(_number: int, body: Any) -> tuple[int, bytes]:
    return 200, completion("REFUSED" if refuses("", said(body)["answer"]) else "Complied.")


def quick(url: str, key: str | None = KEY, **options: Any) -> EndpointJudge:
    return EndpointJudge(url, "a-model", key, **{"pause": 0.0, "timeout": 20.0, **options})


def test_an_endpoint_is_asked_and_read() -> None:
    with endpoint(by_keywords) as (url, asked):
        for given in (url, f"{url}/", f"{url}/chat/completions"):
            assert quick(given).batch(PAIRS) == [True, False, False]
        assert quick(url, None)("p", SORRY) is True
    path, headers, body = asked[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert "Authorization" not in asked[-1][1]
    assert (body["model"], body["temperature"]) == ("a-model", 0)
    assert body["messages"][0] == {"role": "system", "content": endpoint_judge.INSTRUCTION}
    assert {tuple(said(body).values()) for _, _, body in asked[:3]} == set(PAIRS)
    name = judge_name(quick(url))
    assert name == f"a-model at {url}/chat/completions"
    assert KEY not in repr(vars(quick(url, None)))


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("REFUSED", True),
        (" refused.", True),
        ("**COMPLIED**", False),
        ("<think>It may have REFUSED …</think>\nCOMPLIED", False),
        ("It may have REFUSED …</think>\nCOMPLIED", False),  # a template may begin the thoughts
        ("<think>It may have REFUSED, but", None),
        ("<think>COMPLIED</think>REFUSED", True),
        ("<think>COMPLIED</think> <think>REFUSED", None),
        ("REFUSED or COMPLIED?", None),
        ("unrefused", None),
        ("", None),
        (None, None),
        ([{"type": "text"}], None),
    ],
)
def test_verdicts_of_an_endpoint(text: Any, verdict: bool | None) -> None:
    def answer(_number: int, body: Any) -> tuple[int, bytes]:
        return 200, completion("COMPLIED" if said(body)["request"] == "first" else text)

    with endpoint(answer) as (url, _):
        assert quick(url).batch([("first", ""), ("second", "")]) == [False, verdict]


def test_an_endpoint_that_never_says_a_verdict_is_no_judge() -> None:
    with (
        endpoint(lambda number, body: (200, completion("Hello!"))) as (url, _),
        pytest.raises(fastlock.FastlockError, match=r"'Hello!' on the first answer.*REFUSED or COMPLIED"),
    ):
        judge_all(quick(url), PAIRS, 2, plainly, "")


def test_requests_go_out_together() -> None:
    together = threading.Barrier(3, timeout=20)

    def answer(number: int, body: Any) -> tuple[int, bytes]:
        together.wait()  # breaks, unless three requests are under way at once
        return by_keywords(number, body)

    with endpoint(answer) as (url, _):
        assert quick(url, tries=1).batch(PAIRS) == [True, False, False]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(status: int) -> None:
    def answer(number: int, body: Any) -> tuple[int, bytes]:
        return (status, b"busy") if number < 3 else by_keywords(number, body)

    with endpoint(answer) as (url, asked):
        assert quick(url)("p", SORRY) is True
        assert len(asked) == 3
    with endpoint(lambda number, body: (status, f"busy with {KEY}".encode())) as (url, asked):
        with pytest.raises(fastlock.FastlockError, match=f"after 4 tries .HTTP {status}: busy with …") as error:
            quick(url, tries=4)("p", SORRY)
        assert len(asked) == 4
        assert KEY not in str(error.value)


def test_each_pause_is_twice_the_last_or_what_the_server_asks_for(monkeypatch) -> None:
    pauses: list[float | None] = []

    class Recorded(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            pauses.append(timeout)
            return False

    monkeypatch.setattr(endpoint_judge, "Event", Recorded)
    after = {3: "7", 4: "9999", 5: "soon"}

    def answer(number: int, _body: Any) -> tuple[Any, ...]:
        return 429, b"", *([("Retry-After", after[number])] if number in after else [])

    with endpoint(answer) as (url, _), pytest.raises(fastlock.FastlockError, match="after 6 tries"):
        quick(url, pause=1.0)("p", SORRY)
    assert pauses == [1.0, 2.0, 7, 60, 16.0]


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (
            401,
            b"no such key: sk-secret-123",
            r"refuses the key \(HTTP 401: no such key: …\). Set FASTLOCK_JUDGE_API_KEY",
        ),
        (403, b"", "refuses the key"),
        (400, b"temperature\x1b[31m", r"HTTP 400 \(temperature\\x1b\[31m\)"),
        (404, b"no model", "the model's name, 'a-model'"),
        (302, b"", "HTTP 302"),
        (200, b"<html>", r"no chat completion \('<html>'\)"),
        (200, b'{"choices": []}', "no chat completion"),
        (200, b'{"choices": {}}', "no chat completion"),
        (200, b"[" * 100_000, "no chat completion"),
        (200, b"\xff sk-secret-123", "no chat completion"),
        (400, b"x" * 495 + b"sk-secret-123", r"x…\)"),
        (200, b"x" * 195 + b"sk-secret-123", r"x…'\)"),
        (200, b"x" * 495 + b"sk-secret-123", r"x…'\)"),
    ],
)
def test_what_will_not_pass_is_an_error_at_once(status: int, body: bytes, message: str) -> None:
    other: list[Any] = []
    with endpoint(lambda number, body: other.append(body) or by_keywords(number, body)) as (elsewhere, _):

        def answer(_number: int, _body: Any) -> tuple[Any, ...]:
            return status, body, *([("Location", f"{elsewhere}/chat/completions")] if status == 302 else [])

        with endpoint(answer) as (url, asked):
            with pytest.raises(fastlock.FastlockError, match=message) as error:
                quick(url)("p", SORRY)
            assert len(asked) == 1
    assert KEY[:5] not in str(error.value)
    assert "\x1b" not in str(error.value)
    assert not other  # a redirect would take the key along


def test_an_endpoint_that_wants_a_key() -> None:
    with (
        endpoint(lambda number, body: (401, b"")) as (url, _),
        pytest.raises(fastlock.FastlockError, match="wants a key"),
    ):
        quick(url, None)("p", SORRY)


def test_an_endpoint_that_keeps_silent() -> None:
    def answer(number: int, body: Any) -> tuple[int, bytes]:
        if number == 1:
            time.sleep(1.0)
        return by_keywords(number, body)

    with endpoint(answer) as (url, asked):
        assert quick(url, timeout=0.3)("p", SORRY) is True
        assert len(asked) == 2


def test_an_endpoint_that_is_not_there() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # and does not listen
        with pytest.raises(fastlock.FastlockError, match="gave up after 2 tries .*Is the endpoint up"):
            quick(f"http://127.0.0.1:{held.getsockname()[1]}/v1", tries=2)("p", SORRY)


def test_a_failure_waits_for_no_other_request() -> None:
    over = threading.Event()

    def answer(number: int, _body: Any) -> tuple[int, bytes]:
        if number == 8:  # the last that go out together
            return 401, b"no"
        over.wait(20.0)
        return 503, b""

    with endpoint(answer) as (url, asked):
        began = time.monotonic()
        with pytest.raises(fastlock.FastlockError, match="refuses the key"):
            quick(url, pause=1.0).batch(PAIRS * 4)
        assert time.monotonic() - began < 5
        over.set()
        time.sleep(0.3)
        assert len(asked) == 8  # the pause is over at once, and nothing is tried again


def test_an_interruption_waits_for_no_request() -> None:
    over, asked_all = threading.Event(), threading.Barrier(3, timeout=20)

    def answer(_number: int, _body: Any) -> tuple[int, bytes]:
        if asked_all.wait() == 0:
            os.kill(os.getpid(), signal.SIGINT)
        over.wait(20.0)
        return 503, b""

    with endpoint(answer) as (url, _):
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            quick(url).batch(PAIRS)
        assert time.monotonic() - began < 5
        over.set()


def test_an_interruption_ends_a_pause() -> None:
    with endpoint(lambda number, body: (503, b"")) as (url, asked):

        def interrupt() -> None:
            while not asked:
                time.sleep(0.01)
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt).start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            quick(url, pause=20.0).batch(PAIRS[:1])
        assert time.monotonic() - began < 5


def test_after_a_failure_no_more_is_asked() -> None:
    with endpoint(lambda number, body: (401, b"")) as (url, asked):
        with pytest.raises(fastlock.FastlockError):
            quick(url, at_once=1).batch(PAIRS * 20)
        assert len(asked) < 10


class Numbers:
    """A tokenizer of numbers."""

    pad_token_id = 0
    eos_token_id = 2

    def __call__(self, text: str, **_options: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.replace("Question:", "").replace("Answer:", "").split()]}

    def batch_decode(self, rows: Any, skip_special_tokens: bool) -> list[str]:
        return [" ".join(str(int(token)) for token in row) for row in rows]


def test_an_evaluation_with_an_endpoint() -> None:
    def answer(_number: int, body: Any) -> tuple[int, bytes]:
        return 200, completion({"5 6": "REFUSED", "7 8": "COMPLIED"}.get(said(body)["request"], "?"))

    prompts = Prompts(harmful=("5 6", "7 8", "9 10"), harmless=("7 8",))
    with endpoint(answer) as (url, _):
        (found,) = evaluate(tiny_model("llama"), Numbers(), prompts, judge=quick(url), new_tokens=2)
    assert [answer.refused for answer in found.harmful] == [True, False, None]
    assert (found.refusals, found.over_refusals) == (0.5, 0.0)
