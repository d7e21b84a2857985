"""Routes, streaming and errors, with a stand-in for the model."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Iterable

import pytest
from starlette.testclient import TestClient

from tests.serve.questions import FRAMES, ask_user
from ultra.serve.endpoint import create_app
from ultra.serve.events import Delta, Event, Opening, Question, Refusal
from ultra.serve.limits import ApiError, Limits
from ultra.serve.security import ApiKeys, digest_key

LIMITS = Limits(models={"m": ""}, max_frames=3, max_image_mib=1)
ANSWER = (
    Opening(1, (0.5, 0.75), 9, num_cached_frames=1),
    Delta("肝", 1, token_ids=(4,)),
    Delta("脏", 3, token_ids=(5, 6)),
    Delta("", 4, "stop", num_cached_tokens=7),
)
ULTRA = {
    "chosen_frame": 1, "scores": [0.5, 0.75], "num_near_duplicates": 0, "num_cached_frames": 1,
}  # fmt: skip
CHAT = "/v1/chat/completions"


class Script:
    """Answers every question with the same events; an exception among them is raised."""

    def __init__(self, events: Iterable[Event | Exception], is_ready: bool = True) -> None:
        self.events = events
        self.is_ready = is_ready
        self.asked: list[Question] = []
        self.closed = 0

    async def answer(self, question: Question) -> AsyncGenerator[Event, None]:
        self.asked.append(question)
        try:
            for event in self.events:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self.closed += 1

    async def ready(self) -> bool:
        return self.is_ready


def connect(script: Script, *keys: str) -> TestClient:
    app = create_app(script, LIMITS, ApiKeys(list(map(digest_key, keys))))
    return TestClient(app, raise_server_exceptions=False)


def question(**fields) -> dict:
    return {"model": "m", "messages": [ask_user("见囊肿？", *FRAMES)], **fields}


def chat_scope() -> dict:
    return {"type": "http", "method": "POST", "path": CHAT, "headers": [], "query_string": b""}


def read_events(text: str) -> list:
    """The events of a stream, without the comments that name tokens."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_a_whole_answer() -> None:
    script = Script(ANSWER)
    reply = connect(script).post(CHAT, json=question()).json()
    assert reply["choices"][0]["message"] == {
        "role": "assistant",
        "content": "肝脏",
        "refusal": None,
    }
    assert reply["usage"] == {
        "prompt_tokens": 9,
        "completion_tokens": 4,
        "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 7},
    }
    assert reply["ultra"] == ULTRA
    assert script.asked[0].frames == FRAMES
    assert script.closed == 1


def test_a_streamed_answer() -> None:
    body = question(stream=True, stream_options={"include_usage": True})
    response = connect(Script(ANSWER)).post(CHAT, json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = read_events(response.text)
    assert [c["choices"][0]["delta"] for c in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "肝"},
        {"content": "脏"},
        {},
    ]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, None, None, "stop"]
    assert chunks[0]["ultra"] == ULTRA
    assert usage["usage"]["total_tokens"] == 13
    assert done == "[DONE]"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("event", "status", "kind"),
    [
        (Refusal("too long"), 400, "invalid_request_error"),
        (Refusal("full", busy=True), 429, "rate_limit_error"),
        (ApiError("busy", status=429, retry_after_s=5), 429, "rate_limit_error"),
        (RuntimeError("secret"), 500, "server_error"),
    ],
)
def test_failures_before_the_first_word(event, status, kind, stream) -> None:
    script = Script([event])
    response = connect(script).post(CHAT, json=question(stream=stream))
    assert response.status_code == status
    assert response.json()["error"]["type"] == kind
    assert "secret" not in response.text
    assert response.headers.get("retry-after") == ("5" if status == 429 else None)
    assert script.closed == 1


def test_a_stream_that_breaks_off_says_so() -> None:
    script = Script([*ANSWER[:2], RuntimeError("secret")])
    client = connect(script)
    *_, last = read_events(client.post(CHAT, json=question(stream=True)).text)
    assert last["error"]["type"] == "server_error"
    assert "secret" not in last["error"]["message"]
    assert script.closed == 1
    assert 'status="500"} 1.0' in client.get("/metrics").text


def test_a_client_that_leaves_closes_the_answer() -> None:
    async def endless() -> AsyncGenerator[Event, None]:
        yield ANSWER[0]
        try:
            while True:
                await asyncio.sleep(0.001)
                yield ANSWER[1]
        finally:
            closed.set()

    async def leave() -> None:
        body = json.dumps(question(stream=True)).encode()
        messages = iter([{"type": "http.request", "body": body}])
        left = asyncio.Event()

        async def receive() -> dict:
            for message in messages:
                return message
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            if "肝".encode() in message.get("body", b""):
                left.set()

        script = Script([])
        script.answer = lambda _: endless()
        app = create_app(script, LIMITS, ApiKeys([]))
        await app(chat_scope(), receive, send)
        await asyncio.wait_for(closed.wait(), 10)

    closed = asyncio.Event()
    asyncio.run(leave())


def test_every_route_but_liveness_needs_the_key() -> None:
    client = connect(Script(ANSWER), "key")
    assert client.get("/health/live").status_code == 200
    routes = [client.get(p) for p in ("/health/ready", "/metrics", "/v1/models", "/v1/models/m")]
    posts = [client.post(CHAT, json=question()), client.post("/v1/frames", content=b"x")]
    for response in (*routes, *posts):
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
    client.headers["Authorization"] = "Bearer key"
    assert client.post(CHAT, json=question()).status_code == 200
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "m"
    assert model["ultra"] == {"max_frames": 3, "max_image_mib": 1}
    assert client.get("/v1/models/m").json()["id"] == "m"
    assert client.get("/v1/models/x").json()["error"]["code"] == "model_not_found"


def test_readiness_is_the_backends() -> None:
    assert connect(Script([])).get("/health/ready").status_code == 200
    assert connect(Script([], is_ready=False)).get("/health/ready").status_code == 503


def test_a_body_over_the_limit_is_not_read_to_its_end() -> None:
    sent: list[dict] = []

    async def receive() -> dict:  # a body without end
        return {"type": "http.request", "body": bytes(2**20), "more_body": True}

    async def send(message: dict) -> None:
        sent.append(message)

    script = Script(ANSWER)
    asyncio.run(create_app(script, LIMITS, ApiKeys([]))(chat_scope(), receive, send))
    assert sent[0]["status"] == 413
    assert not script.asked


def test_what_is_no_dicom_file_is_told_so() -> None:
    response = connect(Script([])).post("/v1/frames", content=FRAMES[0])
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "not a DICOM file"


def test_a_dicom_file_over_the_limit_is_not_opened() -> None:
    app = create_app(Script([]), Limits(max_dicom_mib=1), ApiKeys([]))
    assert TestClient(app).post("/v1/frames", content=bytes(2**20 + 1)).status_code == 413


def test_unknown_routes_speak_openais_form() -> None:
    client = connect(Script([]))
    for path in ("/docs", "/redoc", "/openapi.json", "/nothing"):
        assert client.get(path).json()["error"]["message"] == "Not Found"
    assert client.get(CHAT).status_code == 405


def test_counters() -> None:
    client = connect(Script(ANSWER))
    for _ in range(2):
        client.post(CHAT, json=question())
    client.post(CHAT, json=question(model="x"))
    lines = client.get("/metrics").text.splitlines()
    values = {line.split("{")[0] + line[line.find('"') + 9 :] for line in lines if "ultra_" in line}
    assert 'ultra_requests_total",status="200"} 2.0' in values
    assert 'ultra_requests_total",status="404"} 1.0' in values
    assert 'ultra_prompt_tokens_total"} 18.0' in values
    assert 'ultra_answer_tokens_total"} 8.0' in values
    assert 'ultra_cached_prompt_tokens_total"} 14.0' in values
    assert 'ultra_frames_total",source="encoder"} 2.0' in values
    assert 'ultra_frames_total",source="cache"} 2.0' in values
    assert 'ultra_first_text_seconds_count"} 2.0' in values


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("events", "status"),
    [
        ([RuntimeError("x")], "500"),
        ([*ANSWER[:2], RuntimeError("x")], "500"),
        ([*ANSWER[:2], ApiError("late", status=504)], "504"),
    ],
)
def test_a_question_that_fails_is_counted_once(stream, events, status) -> None:
    client = connect(Script(events))
    client.post(CHAT, json=question(stream=stream))
    lines = [x for x in client.get("/metrics").text.splitlines() if "ultra_requests_total{" in x]
    assert len(lines) == 1
    assert f'status="{status}"' in lines[0]
    assert lines[0].endswith(" 1.0")


def test_nothing_of_the_content_is_logged(caplog) -> None:
    caplog.set_level(logging.DEBUG)
    client = connect(Script(ANSWER))
    client.post(CHAT, json=question())
    client.post(CHAT, json=question(stream=True))
    client.post(CHAT, json=question(temperature=3))
    connect(Script([*ANSWER[:2], RuntimeError("x")])).post(CHAT, json=question(stream=True))
    assert "broke off: RuntimeError" in caplog.text
    for content in ("肝", "囊肿", "base64"):
        assert content not in caplog.text
