"""Requests that outlive the ingress replica that serves them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.serve.questions import FRAMES, ask_user
from ultra.serve.endpoint import create_app
from ultra.serve.events import Delta, Event, Opening, Question, Ticket
from ultra.serve.gateway import MAX_ATTEMPTS, Gateway, middlewares, read_ticket, write_ticket
from ultra.serve.limits import ApiError, Limits
from ultra.serve.security import ApiKeys

CHAT = "/v1/chat/completions"
TEXT = "肝脏未见异常"
TICKET = Ticket("0" * 31 + "1", 1.5)


class Backend:
    """Answers TEXT, a character a token, from where the ticket says; two tokens at a time."""

    def __init__(self) -> None:
        self.tickets: list[Ticket] = []
        self.bodies: list[Question] = []

    async def answer(self, question: Question) -> AsyncGenerator[Event, None]:
        self.tickets.append(question.ticket)
        self.bodies.append(question)
        yield Opening(1, (0.5, 0.75, 0.1), 9)
        for start in range(len(question.ticket.begun or ()), len(TEXT), 2):
            text = TEXT[start : start + 2]
            ids = tuple(map(ord, text))
            yield Delta(text, start + len(text), token_ids=ids)
        yield Delta("", len(TEXT) + 1, "stop")

    async def ready(self) -> bool:
        return True


class Mortal:
    """Serve's proxy as far as it matters here: it falls silent when the replica has died.

    Args:
        app: the ingress.
        lives: messages of the response that the first, second, ... replica sends before it dies.
    """

    def __init__(self, app: ASGIApp, *lives: int) -> None:
        self.app = app
        self.lives = list(lives)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        life = self.lives.pop(0) if self.lives else 1000

        async def send_while_alive(message: Message) -> None:
            nonlocal life
            if not life:
                raise InterruptedError
            life -= 1
            await send(message)

        try:
            await self.app(scope, receive, send_while_alive)
        except* InterruptedError:
            pass


def connect(*lives: int) -> tuple[TestClient, Backend]:
    backend = Backend()
    app = create_app(backend, Limits(models={"m": ""}), ApiKeys([]))
    return TestClient(Gateway(Mortal(app, *lives)), raise_server_exceptions=False), backend


def question(**fields) -> dict:
    return {"model": "m", "messages": [ask_user("见囊肿？", *FRAMES)], **fields}


def without_ids(text: str) -> list:
    events = [e.removeprefix("data: ") for e in text.split("\n\n") if e]
    parsed = [e if e == "[DONE]" else json.loads(e) for e in events]
    for event in parsed[:-1]:
        del event["id"], event["created"]
    return parsed


STREAMED = {"stream": True, "stream_options": {"include_usage": True}}


def test_a_stream_reads_the_same_wherever_an_ingress_dies() -> None:
    client, _ = connect()
    whole = without_ids(client.post(CHAT, json=question(**STREAMED)).text)
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in whole[:-2]) == TEXT
    for life in range(8):
        client, backend = connect(life)
        reply = client.post(CHAT, json=question(**STREAMED))
        assert reply.status_code == 200
        assert without_ids(reply.text) == whole, life
        assert len(backend.tickets) == (2 if life < 6 else 1), life
        assert len({(t.id, t.created) for t in backend.tickets}) == 1
    client, backend = connect(2, 1, 0, 2)
    assert without_ids(client.post(CHAT, json=question(**STREAMED)).text) == whole
    told = [len(t.begun or ()) for t in backend.tickets]
    assert told == [0, 0, 0, 0, 2]


def test_a_whole_answer_is_begun_anew() -> None:
    client, backend = connect(0, 1)
    reply = client.post(CHAT, json=question())
    assert reply.json()["choices"][0]["message"]["content"] == TEXT
    assert reply.json()["id"] == f"chatcmpl-{backend.tickets[0].id}"
    assert [t.begun for t in backend.tickets] == [None, None, None]
    assert {b.frames for b in backend.bodies} == {FRAMES}


def test_a_body_that_is_still_coming_is_repeated_as_well() -> None:
    # The first replica dies with the first half of the request, before the second has come.
    heard: list[list[bytes]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        heard.append([(await receive())["body"]])
        if len(heard) > 1:
            heard[-1].append((await receive())["body"])
            await PlainTextResponse("ok")(scope, receive, send)

    parts = iter([{"body": b"a", "more_body": True}, {"body": b"b", "more_body": False}])
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", **next(parts)}

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(Gateway(app)({"type": "http", "headers": []}, receive, send))
    assert heard == [[b"a"], [b"a", b"b"]]
    assert sent[-1]["body"] == b"ok"


def test_after_some_attempts_it_gives_up_aloud() -> None:
    client, backend = connect(*[0] * MAX_ATTEMPTS)
    reply = client.post(CHAT, json=question())
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
    assert reply.json()["error"]["type"] == "server_error"
    assert len(backend.tickets) == MAX_ATTEMPTS
    client, _ = connect(3, *[0] * MAX_ATTEMPTS)
    events = client.post(CHAT, json=question(**STREAMED)).text.split("\n\n")
    assert json.loads(events[-2].removeprefix("data: "))["error"]["type"] == "server_error"


def test_a_refusal_in_the_midst_of_a_stream_ends_it_aloud() -> None:
    client, backend = connect(3)
    answer = backend.answer

    async def refuse(question: Question) -> AsyncGenerator[Event, None]:
        if question.ticket.begun is None:
            async for event in answer(question):
                yield event
        else:
            raise ApiError("out of memory", status=500)

    backend.answer = refuse
    events = client.post(CHAT, json=question(**STREAMED)).text.split("\n\n")
    assert json.loads(events[-2].removeprefix("data: "))["error"]["message"] == "out of memory"
    assert events[-1] == ""


def test_a_client_that_left_is_not_answered_again() -> None:
    attempts = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        attempts.append(await receive())

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        raise AssertionError(message)

    asyncio.run(Gateway(app)({"type": "http", "headers": []}, receive, send))
    assert len(attempts) == 1


def test_errors_of_serve_take_openais_form() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        reply = PlainTextResponse("actor 7 on host x", 429, {"retry-after": "5"})
        await reply(scope, receive, send)

    reply = TestClient(Gateway(app)).get("/")
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "5")
    assert reply.json()["error"] == {
        "message": "too many requests, try again soon",
        "type": "rate_limit_error",
        "param": None,
        "code": None,
    }


def test_clients_set_no_header_of_ours_and_lift_no_limit() -> None:
    seen: dict[str, str] = {}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.update((n.decode(), v.decode()) for n, v in scope["headers"])
        await PlainTextResponse("ok")(scope, receive, send)

    forged = {
        "X-Ultra-Ticket": "f" * 32 + " 1",
        "X-Ultra-Begun": "1 2",
        "X-Request-Timeout-Seconds": "0",
        "X-Request-Disconnect-Disabled": "?1",
        "X-Other": "kept",
    }
    TestClient(Gateway(app)).get("/", headers=forged)
    assert seen["x-other"] == "kept"
    assert not {"x-ultra-begun", "x-request-timeout-seconds"} & seen.keys()
    assert "x-request-disconnect-disabled" not in seen
    assert not seen["x-ultra-ticket"].startswith("ffff")


@pytest.mark.parametrize("begun", [None, (), (1, 2, 99_999)])
def test_a_ticket_as_headers(begun) -> None:
    ticket = Ticket(TICKET.id, 1764070000.123456, begun)
    assert read_ticket(write_ticket(ticket)) == ticket
    assert read_ticket([]).begun is None


@pytest.mark.parametrize("value", [b"", b"x y", b"0" * 32, b"0" * 32 + b" x", b"1 2 3", b"\xff"])
def test_a_forged_ticket_is_refused(value) -> None:
    with pytest.raises(ApiError, match="not for clients"):
        read_ticket([(b"x-ultra-ticket", value)])


def test_serve_finds_it() -> None:
    from ray.serve._private.http_util import validate_http_proxy_callback_return

    assert validate_http_proxy_callback_return(middlewares())[0].cls is Gateway
