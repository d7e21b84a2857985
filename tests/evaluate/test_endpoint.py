"""Answers of an endpoint, through the real client and a real server."""

from __future__ import annotations

import base64
import threading

import pytest
from pydantic import SecretStr

from tests.evaluate.conftest import ask, make_exam
from tests.evaluate.vision_server import Reply, completion, images_of, question_of, serve
from ultra.evaluate.endpoint import MAX_RETRIES, Endpoint
from ultra.types import FrameGroup

BUSY: Reply = (429, {"error": {"message": "slow down"}})
BROKEN: Reply = (500, {"error": {"message": "no luck"}})


def make_exams(*questions: str) -> list[FrameGroup]:
    return [
        make_exam(f"e{i}", "test", ask("instruct", "kind", question, "囊肿"), frames=2)
        for i, question in enumerate(questions)
    ]


def test_a_question_goes_out_with_its_frames() -> None:
    exams = make_exams("是什么？")
    with serve(lambda question, _: completion(f" 答{question} ")) as server:
        endpoint = Endpoint(
            server.url,
            "gpt",
            17,
            api_key=SecretStr("secret"),
            request={"temperature": 0, "seed": 3},
        )
        (p,) = endpoint.answer(exams)
    (request,) = server.requests
    assert request["path"] == "/v1/chat/completions"
    assert server.keys == ["Bearer secret"]
    assert request["model"] == "gpt"
    assert request["max_completion_tokens"] == 17
    assert (request["temperature"], request["seed"]) == (0, 3)
    shown = [
        base64.b64decode(url.removeprefix("data:image/png;base64,")) for url in images_of(request)
    ]
    assert tuple(shown) == exams[0].frames
    assert question_of(request) == "是什么？"
    assert (p.answer, p.truth, p.unanswered, p.finish_reason) == ("答是什么？", "囊肿", "", "stop")
    assert (p.chosen, p.scores, p.token_ids) == (None, None, ())


def test_only_the_first_frame_is_shown_to_an_older_server() -> None:
    with serve(lambda *_: completion("囊肿")) as server:
        endpoint = Endpoint(server.url, "m", 5, frames="first", request={"max_tokens": 9})
        endpoint.answer(make_exams("?"))
    (request,) = server.requests
    assert len(images_of(request)) == 1
    assert request["max_tokens"] == 9
    assert not {"max_completion_tokens", "temperature"} & request.keys()
    assert server.keys == ["Bearer none"]


def test_the_client_asks_again_and_gives_up_with_a_reason() -> None:
    script: dict[str, list[Reply]] = {
        "busy": [BUSY, BUSY, completion("一")],
        "broken": [BROKEN, completion("二")],
        "dropped": [None, completion("三")],
        "always busy": [BUSY] * 3,
        "gone": [None] * 3,
        "wrong": [(400, {"error": {"message": "image too large"}})],
        "refused": [completion(None, refusal="I cannot judge that.")],
        "silent": [completion("  ")],
        "no choice": [(200, {"id": "1", "choices": []})],
        "no object": [(200, '"hello"')],
        "no JSON": [(200, "<html>")],
    }
    with serve(lambda question, before: script[question][before]) as server:
        endpoint = Endpoint(server.url, "m", 5)
        assert endpoint.client.max_retries == MAX_RETRIES
        # Fewer here: without a word from the server the client waits half a second, then twice.
        endpoint.client = endpoint.client.with_options(max_retries=2)
        found = {p.question: p for p in endpoint.answer(make_exams(*script))}
    assert server.questions() == {question: len(replies) for question, replies in script.items()}
    answered = {question: p.answer for question, p in found.items() if not p.unanswered}
    assert answered == {"busy": "一", "broken": "二", "dropped": "三"}
    assert {p.answer for p in found.values() if p.unanswered} == {""}
    reasons = {question: p.unanswered for question, p in found.items() if p.unanswered}
    assert reasons.pop("always busy").startswith("RateLimitError: Error code: 429")
    assert reasons.pop("gone").startswith("APIConnectionError: ")
    assert "image too large" in reasons.pop("wrong")
    assert reasons.pop("refused") == "empty answer: I cannot judge that."
    assert reasons.pop("silent") == "empty answer: stop"
    assert reasons.pop("no choice") == reasons.pop("no object") == "malformed reply: no message"
    assert reasons.pop("no JSON").startswith("JSONDecodeError: ")
    assert reasons == {}


@pytest.mark.parametrize("most", [1, 3])
def test_no_more_requests_than_allowed_are_under_way(most: int) -> None:
    together = threading.Barrier(most, timeout=30)

    def reply(question: str, _: int) -> Reply:
        together.wait()  # breaks unless that many come at the same time
        return completion(question)

    exams = make_exams(*(f"q{i}" for i in range(3 * most)))
    with serve(reply) as server:
        found = Endpoint(server.url, "m", 5, max_concurrency=most).answer(exams)
    assert server.most_at_once == most
    assert [p.answer for p in found] == [f"q{i}" for i in range(3 * most)]
    assert [p.exam_id for p in found] == [exam.exam_id for exam in exams]
