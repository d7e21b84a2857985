"""OpenAI's chat completions, as far as they are spoken here: what comes in and what goes out.

Several `image_url` parts, wherever they stand in the conversation, are the frames of one exam. The
answer carries an `ultra` object beside OpenAI's fields: the chosen frame, every frame's score, and
the replicas that served it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ultra.config import Positive, Section
from ultra.data.frames import check_image
from ultra.data.prompts import encode_prompt
from ultra.serve.security import decode_data_url
from ultra.types import Role, Turn

MAX_TEXT = 65_536
"""Characters of a conversation; far more than any context holds."""

REFUSED = (
    "audio", "best_of", "frequency_penalty", "functions", "logit_bias", "logprobs", "modalities",
    "prediction", "presence_penalty", "tools", "top_logprobs", "web_search_options",
)  # fmt: skip
"""Fields that would change the answer and are not understood; the others are ignored."""


class ApiError(ValueError):
    """A request that is not answered, in the form OpenAI's clients read."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """Return the response's JSON."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {
            "error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        }


class Limits(Section):
    """What a request may ask for."""

    model_name: str = "ultra"
    max_frames: Annotated[int, Field(ge=1, le=64)] = 16
    """Frames of one request."""
    max_image_mib: Positive = 8
    """Size of one encoded frame."""
    max_image_pixels: Positive = 25_000_000
    """Pixels of one frame, checked before it is decoded."""
    max_dicom_mib: Positive = 128
    """Size of a DICOM file that frames are taken from."""
    max_new_tokens: Positive = 256
    """Longest answer, and the one a request gets that does not say."""

    @property
    def max_body_bytes(self) -> int:
        """Bytes of a whole request: every frame at its largest, in base64, and the text."""
        return self.max_frames * self.max_image_mib * 2**20 * 4 // 3 + 2**20


def describe_model(limits: Limits) -> dict[str, Any]:
    """Return the model as OpenAI lists one; its `ultra` object says what a question may hold."""
    head = {"id": limits.model_name, "object": "model", "created": 0, "owned_by": "ultra"}
    allowed = {name: getattr(limits, name) for name in ("max_frames", "max_image_mib")}
    return {**head, "ultra": allowed}


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class TextPart(_Open):
    """A piece of a message's text."""

    type: Literal["text"]
    text: str


class ImageUrl(_Open):
    """Where an image is; only data URLs are read."""

    url: str


class ImagePart(_Open):
    """One frame."""

    type: Literal["image_url"]
    image_url: ImageUrl


class Message(_Open):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]


class StreamOptions(_Open):
    """Options of a streamed answer."""

    include_usage: bool = False


class ResponseFormat(_Open):
    """The form of the answer."""

    type: Literal["text"]


Stop = Annotated[str, Field(min_length=1, max_length=100)]


class ChatRequest(_Open):
    """The body of a chat completion request."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    temperature: float | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    n: Literal[1] | None = None
    response_format: ResponseFormat | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """A checked request."""

    turns: tuple[Turn, ...]
    frames: tuple[bytes, ...]
    max_new_tokens: int | None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False


@dataclass(frozen=True, slots=True)
class Opening:
    """The first thing an answer says: which frame was chosen, and how long the prompt is.

    Attributes:
        replicas: part of the endpoint -> the name of the one that served; None where none has one.
    """

    chosen: int
    scores_K: tuple[float, ...]
    num_prompt_tokens: int
    replicas: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """More of an answer's text; `num_tokens` counts all so far, the last has a finish reason."""

    text: str
    num_tokens: int
    finish_reason: Literal["stop", "length"] | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Instead of an answer: why the language model cannot take the question."""

    message: str


Event = Opening | Delta | Refusal


def parse_chat(body: bytes, limits: Limits) -> Question:
    """Return the question a request's body asks.

    Raises:
        ApiError: for anything that is not understood or over the limits.
    """
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _explain(error) from None
    _check_options(request, limits)
    turns, urls = _split_messages(request.messages)
    wanted = request.max_completion_tokens or request.max_tokens
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    return Question(
        turns=turns,
        frames=_read_frames(urls, limits),
        max_new_tokens=wanted,
        stop=stop,
        stream=request.stream,
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
    )


def _explain(error: ValidationError) -> ApiError:
    # Of the kinds a value may be, the one that fits furthest is the one that was meant.
    errors = error.errors(include_input=False, include_url=False)
    meant = max(reversed(errors), key=lambda item: len(item["loc"]))
    path = [str(p) for p in meant["loc"] if isinstance(p, int) or p.isidentifier()]
    param = ".".join(path) or None
    return ApiError(f"{param or 'body'}: {meant['msg']}", param=param)


def _check_options(request: ChatRequest, limits: Limits) -> None:
    if request.model != limits.model_name:
        raise ApiError(
            f"the model {request.model[:80]!r} does not exist, {limits.model_name!r} does",
            status=404, param="model", code="model_not_found",
        )  # fmt: skip
    if request.temperature:
        raise ApiError("answers are greedy: temperature must be 0 or left out", param="temperature")
    extra = request.model_extra or {}
    for name in REFUSED:
        if extra.get(name):
            raise ApiError(f"{name} is not supported", param=name)
    wanted = request.max_completion_tokens or request.max_tokens or 1
    if wanted > limits.max_new_tokens:
        raise ApiError(
            f"{wanted} new tokens asked for, {limits.max_new_tokens} is the most",
            param="max_completion_tokens" if request.max_completion_tokens else "max_tokens",
        )


def _split_messages(messages: list[Message]) -> tuple[tuple[Turn, ...], list[str]]:
    turns: list[Turn] = []
    urls: list[str] = []
    for message in messages:
        parts = message.content
        if isinstance(parts, str):
            parts = [TextPart(type="text", text=parts)]
        images = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
        if images and message.role != "user":
            raise ApiError(
                f"only user messages have images, not {message.role}'s", param="messages"
            )
        urls += images
        text = "\n".join(part.text for part in parts if isinstance(part, TextPart))
        role: Role = "system" if message.role == "developer" else message.role
        turns.append(Turn(role, text))
    if sum(len(turn.content) for turn in turns) > MAX_TEXT:
        raise ApiError(f"more than {MAX_TEXT} characters of text", param="messages")
    if any(turn.role == "user" and not turn.content.strip() for turn in turns):
        raise ApiError("every user message needs text", param="messages")
    try:
        encode_prompt(_NO_TOKENS, "plain", turns, 0)  # its rules for roles hold here as well
    except ValueError as error:
        raise ApiError(str(error), param="messages") from None
    return tuple(turns), urls


_NO_TOKENS: Any = SimpleNamespace(bos_token_id=None, eos_token_id=0, encode=lambda *_, **__: [])


def _read_frames(urls: list[str], limits: Limits) -> tuple[bytes, ...]:
    if not 1 <= len(urls) <= limits.max_frames:
        raise ApiError(
            f"{len(urls)} images; a question is about 1 to {limits.max_frames} frames of one exam",
            param="messages",
        )
    max_bytes = limits.max_image_mib * 2**20
    frames = []
    for number, url in enumerate(urls, 1):
        try:
            frame = decode_data_url(url, max_bytes)
            check_image(frame, max_bytes=max_bytes, max_pixels=limits.max_image_pixels)
        except ValueError as error:
            raise ApiError(f"image {number}: {error}", param="messages") from None
        frames.append(frame)
    return tuple(frames)


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer in OpenAI's form, whole or in chunks."""

    model: str
    opening: Opening
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, text: str, last: Delta) -> dict[str, Any]:
        """Return the whole answer."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": last.finish_reason}
        return {
            **self._head("chat.completion"),
            "choices": [{**choice, "logprobs": None}],
            "usage": self.usage(last),
            "ultra": self._ultra(),
        }

    def first_chunk(self) -> dict[str, Any]:
        """Return the chunk that opens a streamed answer; it carries the `ultra` object."""
        return {**self.chunk({"role": "assistant", "content": ""}), "ultra": self._ultra()}

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        """Return one chunk of a streamed answer."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def usage_chunk(self, last: Delta) -> dict[str, Any]:
        """Return the chunk that follows the last where `include_usage` is asked for."""
        head = self._head("chat.completion.chunk")
        return {**head, "choices": [], "usage": self.usage(last)}

    def usage(self, last: Delta) -> dict[str, int]:
        """Return the tokens of prompt (visual ones included) and answer (the end one included)."""
        prompt = self.opening.num_prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": last.num_tokens,
            "total_tokens": prompt + last.num_tokens,
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _ultra(self) -> dict[str, Any]:
        ultra = {"chosen_frame": self.opening.chosen, "scores": list(self.opening.scores_K)}
        if self.opening.replicas is None:
            return ultra
        return {**ultra, "replicas": dict(self.opening.replicas)}
