"""What the endpoint understands, what it refuses and what it says."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from tests.serve.questions import FRAMES, ask_user, encode_image, encode_pixels, image_part
from ultra.serve.api import Reply, parse_chat
from ultra.serve.events import Delta, Opening, Question, Ticket
from ultra.serve.images import open_images
from ultra.serve.limits import ApiError, Limits
from ultra.types import Turn

LIMITS = Limits(models={"m": ""}, max_frames=3, max_image_mib=1, max_image_pixels=1000)


def parse(messages: list, **fields):
    return parse_chat(
        json.dumps({"model": "m", "messages": messages, **fields}).encode(), LIMITS, open_images
    )


ANSWERED = {"role": "assistant", "content": [{"type": "text", "text": "b"}]}


def test_images_of_one_message_are_a_frame_group_and_the_last_group_counts() -> None:
    question = parse(
        [
            {"role": "developer", "content": "s"},
            ask_user("a", b"no image, and nobody looks at it", *FRAMES),
            ANSWERED,
            ask_user("c", FRAMES[1], FRAMES[2]),
            ANSWERED,
            {"role": "user", "content": "d"},
        ],
        stream=True,
        stream_options={"include_usage": True},
        max_tokens=7,
        stop="。",
        temperature=0,
        user="ignored",
    )
    assert question.frames == FRAMES[1:]
    assert question.turns == (
        Turn("system", "s"), Turn("user", "a", has_frames=True), Turn("assistant", "b"),
        Turn("user", "c", has_frames=True), Turn("assistant", "b"), Turn("user", "d"),
    )  # fmt: skip
    assert question.stream
    assert question.include_usage
    assert (question.max_new_tokens, question.stop) == (7, ("。",))


def test_text_parts_are_joined_and_the_newer_limit_counts() -> None:
    message = ask_user("a", FRAMES[0])
    message["content"].append({"type": "text", "text": "b"})
    question = parse([message], max_tokens=5, max_completion_tokens=9, stop=["x", "y"])
    assert question.turns == (Turn("user", "a\nb", has_frames=True),)
    assert question.max_new_tokens == 9
    assert question.stop == ("x", "y")
    assert parse([message]).max_new_tokens is None


def test_how_tokens_are_drawn() -> None:
    def options(**fields) -> tuple:
        question = parse([GOOD], **fields)
        return question.temperature, question.top_p, question.seed

    assert options() == (0.0, 1.0, None)  # the likeliest answer
    assert options(temperature=None, top_p=None, seed=None, stop=None, n=None) == options()
    assert options(temperature=2, top_p=1, seed=-(2**63), n=1) == (2.0, 1.0, -(2**63))
    assert options(temperature=0.7, top_p=0.01, seed=2**63 - 1) == (0.7, 0.01, 2**63 - 1)


def test_near_duplicates_are_counted_as_prepare_counts_them() -> None:
    ramp = np.tile(np.arange(0, 240, 10, dtype=np.uint8), (20, 1))
    steps = [0, 1, 1, 3, 9]  # 1 repeats 0, then 3 is far enough from 0
    frames = [encode_pixels(ramp + step) for step in steps]
    limits = LIMITS.model_copy(update={"max_frames": 9, "max_image_pixels": 2000})

    def count(*messages) -> int:
        body = json.dumps({"model": "m", "messages": messages}).encode()
        return parse_chat(body, limits, open_images).num_near_duplicates

    assert count(ask_user("a", *frames)) == 2
    assert count(ask_user("a", frames[0])) == 0
    assert count(ask_user("a", frames[0], frames[0], FRAMES[0], frames[0])) == 1
    assert count(ask_user("a", *frames), ANSWERED, ask_user("b", frames[0], frames[0])) == 1
    larger = np.asarray(Image.fromarray(ramp).resize((48, 40), Image.Resampling.NEAREST))
    assert count(ask_user("a", frames[0], encode_pixels(larger))) == 1  # by what they show


IMAGE = FRAMES[0]
GOOD = ask_user("a", IMAGE)
FETCHED = {"role": "user", "content": [image_part("http://x/y.png"), {"type": "text", "text": "a"}]}
VIDEO = {"role": "user", "content": [{"type": "video_url", "video_url": {"url": "data:,"}}]}


@pytest.mark.parametrize(
    ("messages", "fields", "message", "param"),
    [
        ([], {}, "messages: List should have at least 1 item", "messages"),
        ([GOOD], {"model": "x"}, "'x' does not exist; there is m", "model"),
        ([GOOD], {"temperature": 2.01}, "less than or equal to 2", "temperature"),
        ([GOOD], {"temperature": -0.1}, "greater than or equal to 0", "temperature"),
        ([GOOD], {"temperature": True}, "valid number", "temperature"),
        ([GOOD], {"temperature": "1"}, "valid number", "temperature"),
        ([GOOD], {"temperature": float("nan")}, "finite number", "temperature"),
        ([GOOD], {"temperature": float("inf")}, "finite number", "temperature"),
        ([GOOD], {"temperature": 10**400}, "finite number", "temperature"),
        ([GOOD], {"top_p": 0}, "greater than 0", "top_p"),
        ([GOOD], {"top_p": 1.5}, "less than or equal to 1", "top_p"),
        ([GOOD], {"top_p": float("-inf")}, "finite number", "top_p"),
        ([GOOD], {"top_p": False}, "valid number", "top_p"),
        ([GOOD], {"seed": 2**63}, "less than 9223372036854775808", "seed"),
        ([GOOD], {"seed": -(2**63) - 1}, "greater than or equal to -9223372036854775808", "seed"),
        ([GOOD], {"seed": 10**4000}, "less than", "seed"),
        ([GOOD], {"seed": 1.5}, "valid integer", "seed"),
        ([GOOD], {"seed": True}, "valid integer", "seed"),
        ([GOOD], {"n": 2}, "n: Input should be less than or equal to 1", "n"),
        ([GOOD], {"n": 0}, "n: Input should be greater than or equal to 1", "n"),
        ([GOOD], {"n": True}, "n: Input should be a valid integer", "n"),
        ([GOOD], {"tools": [{}]}, "tools is not supported", "tools"),
        ([GOOD], {"logprobs": True}, "logprobs is not supported", "logprobs"),
        ([GOOD], {"response_format": {"type": "x"}}, "be 'text'", "response_format.type"),
        ([GOOD], {"max_tokens": 0}, "greater than or equal to 1", "max_tokens"),
        ([GOOD], {"max_tokens": True}, "valid integer", "max_tokens"),
        ([GOOD], {"max_tokens": 10**4000}, "less than 2147483648", "max_tokens"),
        (
            [GOOD], {"max_completion_tokens": 300, "max_tokens": 5}, "300 new tokens asked for",
            "max_completion_tokens",
        ),
        ([GOOD], {"stop": ""}, "at least 1 character", "stop.0"),
        ([GOOD], {"stop": 5}, "valid array", "stop"),
        ([GOOD], {"stop": ["a", None]}, "valid string", "stop.1"),
        ([GOOD], {"stop": "a" * 101}, "at most 100 characters", "stop.0"),
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
        ([ask_user("a", IMAGE, b"GIF89a")], {}, "image 2: no JPEG or PNG or WEBP", "messages"),
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
        parse_chat(body, LIMITS, open_images)
    assert raised.value.status == 400


def test_an_answer_in_openais_form() -> None:
    asked = Question((), (), None, num_near_duplicates=1, model="m", ticket=Ticket("1", 5.75))
    reply = Reply(asked, Opening(2, (0.5, 0.25, 0.75), 11, num_cached_frames=3))
    last = Delta("", 4, "length", num_cached_tokens=8)
    usage = {
        "prompt_tokens": 11,
        "completion_tokens": 4,
        "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 8},
    }
    ultra = {
        "chosen_frame": 2,
        "scores": [0.5, 0.25, 0.75],
        "num_near_duplicates": 1,
        "num_cached_frames": 3,
    }
    whole = reply.completion("text", last)
    assert whole["object"] == "chat.completion"
    assert whole["choices"][0]["message"]["content"] == "text"
    assert whole["choices"][0]["finish_reason"] == "length"
    assert (whole["usage"], whole["ultra"]) == (usage, ultra)
    assert (whole["model"], whole["created"]) == ("m", 5)
    first = reply.first_chunk()
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert first["ultra"] == ultra
    assert reply.chunk({}, "stop")["choices"][0]["finish_reason"] == "stop"
    final = reply.usage_chunk(last)
    assert (final["choices"], final["usage"], final["id"]) == ([], usage, "chatcmpl-1")


def test_an_answer_names_the_replicas_that_served_it() -> None:
    asked = Question((), (), None)
    reply = Reply(asked, Opening(0, (0.5,), 11, {"encoder": "a", "language": "b"}))
    assert reply.first_chunk()["ultra"]["replicas"] == {"encoder": "a", "language": "b"}


def test_the_body_limit_holds_the_largest_allowed_request() -> None:
    image = 1 * 2**20
    assert LIMITS.max_body_bytes >= 3 * -(-image // 3) * 4 + 2**16 * 4
