"""What the endpoint understands, what it refuses and what it says."""

from __future__ import annotations

import json

import pytest

from tests.serve.questions import FRAMES, ask_user, encode_image, image_part
from ultra.serve.api import ApiError, Delta, Limits, Opening, Reply, parse_chat
from ultra.types import Turn

LIMITS = Limits(model_name="m", max_frames=3, max_image_mib=1, max_image_pixels=1000)


def parse(messages: list, **fields):
    return parse_chat(json.dumps({"model": "m", "messages": messages, **fields}).encode(), LIMITS)


def test_images_of_all_messages_are_one_frame_group() -> None:
    question = parse(
        [
            {"role": "developer", "content": "s"},
            ask_user("a", FRAMES[0]),
            {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
            ask_user("c", FRAMES[1], FRAMES[2]),
        ],
        stream=True,
        stream_options={"include_usage": True},
        max_tokens=7,
        stop="。",
        temperature=0,
        user="ignored",
        top_p=0.9,
    )
    assert question.frames == FRAMES
    assert question.turns == (
        Turn("system", "s"), Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"),
    )  # fmt: skip
    assert question.stream
    assert question.include_usage
    assert (question.max_new_tokens, question.stop) == (7, ("。",))


def test_text_parts_are_joined_and_the_newer_limit_counts() -> None:
    message = ask_user("a", FRAMES[0])
    message["content"].append({"type": "text", "text": "b"})
    question = parse([message], max_tokens=5, max_completion_tokens=9, stop=["x", "y"])
    assert question.turns == (Turn("user", "a\nb"),)
    assert question.max_new_tokens == 9
    assert question.stop == ("x", "y")
    assert parse([message]).max_new_tokens is None


IMAGE = FRAMES[0]
GOOD = ask_user("a", IMAGE)
FETCHED = {"role": "user", "content": [image_part("http://x/y.png"), {"type": "text", "text": "a"}]}
VIDEO = {"role": "user", "content": [{"type": "video_url", "video_url": {"url": "data:,"}}]}


@pytest.mark.parametrize(
    ("messages", "fields", "message", "param"),
    [
        ([], {}, "messages: List should have at least 1 item", "messages"),
        ([GOOD], {"model": "x"}, "'x' does not exist, 'm' does", "model"),
        ([GOOD], {"temperature": 1}, "answers are greedy", "temperature"),
        ([GOOD], {"n": 2}, "n: Input should be 1", "n"),
        ([GOOD], {"tools": [{}]}, "tools is not supported", "tools"),
        ([GOOD], {"logprobs": True}, "logprobs is not supported", "logprobs"),
        ([GOOD], {"response_format": {"type": "x"}}, "be 'text'", "response_format.type"),
        ([GOOD], {"max_tokens": 0}, "greater than or equal to 1", "max_tokens"),
        ([GOOD], {"max_tokens": 257}, "257 new tokens asked for, 256 is the most", "max_tokens"),
        ([GOOD], {"stop": [""]}, "at least 1 character", "stop.0"),
        ([GOOD], {"stop": ["a"] * 5}, "at most 4 items", "stop"),
        ([{"role": "tool", "content": "x"}], {}, "Input should be 'system'", "messages.0.role"),
        ([{"role": "assistant", "content": "x"}], {}, "must end with a user turn", "messages"),
        ([GOOD, GOOD], {}, "turn 1 must be the assistant's, not the user's", "messages"),
        ([ask_user(" ", IMAGE)], {}, "every user message needs text", "messages"),
        ([ask_user("a" * 65_537, IMAGE)], {}, "more than 65536 characters", "messages"),
        ([{**GOOD, "role": "system"}, GOOD], {}, "only user messages have images", "messages"),
        ([ask_user("a")], {}, "0 images; a question is about 1 to 3 frames", "messages"),
        ([ask_user("a", *[IMAGE] * 4)], {}, "4 images", "messages"),
        ([ask_user("a", IMAGE, b"GIF89a")], {}, "image 2: neither a JPEG nor a PNG", "messages"),
        ([ask_user("a", IMAGE[:-30])], {}, "image 1: damaged or cut short", "messages"),
        ([ask_user("a", encode_image(0, (50, 21)))], {}, "50 x 21 pixels, at most", "messages"),
        ([ask_user("a", bytes(2**20 + 9))], {}, "more than the 1048576 bytes", "messages"),
        ([FETCHED], {}, "image 1: only data URLs .* are read, nothing is fetched", "messages"),
        ([VIDEO], {}, "tags: 'text', 'image_url'", "messages.0.content.0"),
    ],
)  # fmt: skip
def test_refused_requests(messages, fields, message, param) -> None:
    with pytest.raises(ApiError, match=message) as raised:
        parse(messages, **fields)
    error = raised.value.body()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["type"] == ("not_found_error" if fields.get("model") else "invalid_request_error")
    assert raised.value.status == (404 if fields.get("model") else 400)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"model": "m"}', b"[" * 10_000])
def test_bodies_that_are_no_request(body) -> None:
    with pytest.raises(ApiError) as raised:
        parse_chat(body, LIMITS)
    assert raised.value.status == 400


def test_an_answer_in_openais_form() -> None:
    reply = Reply("m", Opening(2, (0.5, 0.25, 0.75), 11), id="chatcmpl-1", created=5)
    last = Delta("", 4, "length")
    usage = {"prompt_tokens": 11, "completion_tokens": 4, "total_tokens": 15}
    ultra = {"chosen_frame": 2, "scores": [0.5, 0.25, 0.75]}
    whole = reply.completion("text", last)
    assert whole["object"] == "chat.completion"
    assert whole["choices"][0]["message"]["content"] == "text"
    assert whole["choices"][0]["finish_reason"] == "length"
    assert (whole["usage"], whole["ultra"]) == (usage, ultra)
    first = reply.first_chunk()
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert first["ultra"] == ultra
    assert reply.chunk({}, "stop")["choices"][0]["finish_reason"] == "stop"
    final = reply.usage_chunk(last)
    assert (final["choices"], final["usage"], final["id"]) == ([], usage, "chatcmpl-1")


def test_an_answer_names_the_replicas_that_served_it() -> None:
    reply = Reply("m", Opening(0, (0.5,), 11, {"encoder": "a", "language": "b"}))
    assert reply.first_chunk()["ultra"]["replicas"] == {"encoder": "a", "language": "b"}


def test_the_body_limit_holds_the_largest_allowed_request() -> None:
    image = 1 * 2**20
    assert LIMITS.max_body_bytes >= 3 * -(-image // 3) * 4 + 2**16 * 4
