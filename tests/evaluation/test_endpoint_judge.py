"""A model behind an endpoint as a judge, with a real socket between."""

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

import fastlock
from fastlock.evaluation import endpoint_judge
from fastlock.evaluation.endpoint_judge import EndpointJudge
from fastlock.evaluation.evaluator import evaluate
from fastlock.evaluation.judges import judge_name
from fastlock.evaluation.judging import judge_all
from fastlock.evaluation.keyword_judge import refuses
from fastlock.evaluation.prompts import Prompts
from tests.helpers.exchanges import PAIRS, SORRY, plainly
from tests.helpers.families import tiny_model

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
        pytest.raises(fastlock.FastlockError, match=r"on the first answer, it said 'Hello!'.*REFUSED or COMPLIED"),
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
        (200, b"<html>", r"not a chat completion \('<html>'\)"),
        (200, b'{"choices": []}', "not a chat completion"),
        (200, b'{"choices": {}}', "not a chat completion"),
        (200, b"[" * 100_000, "not a chat completion"),
        (200, b"\xff sk-secret-123", "not a chat completion"),
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
        pytest.raises(fastlock.FastlockError, match="it asks for a key"),
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
        with pytest.raises(fastlock.FastlockError, match="no answer after 2 tries .*Check that the endpoint is up"):
            quick(f"http://127.0.0.1:{held.getsockname()[1]}/v1", tries=2)("p", SORRY)


def test_a_failure_waits_for_no_other_request() -> None:
    over, answered = threading.Event(), list[int]()

    def answer(number: int, _body: Any) -> tuple[int, bytes]:
        if number == 8:  # the last that go out together
            return 401, b"no"
        over.wait(20.0)
        answered.append(number)
        return 503, b""

    with endpoint(answer) as (url, asked):
        with pytest.raises(fastlock.FastlockError, match="refuses the key"):
            quick(url, pause=1.0).batch(PAIRS * 4)
        assert answered == []
        over.set()
        time.sleep(0.3)
        assert len(asked) == 8  # the pause is over at once, and nothing is tried again


def test_an_interruption_waits_for_no_request() -> None:
    over, asked_all, answered = threading.Event(), threading.Barrier(3, timeout=20), list[int]()

    def answer(number: int, _body: Any) -> tuple[int, bytes]:
        if asked_all.wait() == 0:
            os.kill(os.getpid(), signal.SIGINT)
        over.wait(20.0)
        answered.append(number)
        return 503, b""

    with endpoint(answer) as (url, _):
        with pytest.raises(KeyboardInterrupt):
            quick(url).batch(PAIRS)
        assert answered == []
        over.set()


def test_an_interruption_ends_a_pause(monkeypatch) -> None:
    pausing, paused, stopped = threading.Event(), threading.Event(), list[bool]()

    class Watched(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            pausing.set()
            stopped.append(super().wait(timeout))
            paused.set()
            return stopped[-1]

    def interrupt() -> None:
        pausing.wait(20.0)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(endpoint_judge, "Event", Watched)
    with endpoint(lambda number, body: (503, b"")) as (url, asked):
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            quick(url, pause=20.0).batch(PAIRS[:1])
        paused.wait(40.0)
        assert stopped == [True]  # False would be a pause that came to its end
        assert len(asked) == 1


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
