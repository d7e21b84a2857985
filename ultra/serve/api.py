"""OpenAI's chat completions, as far as they are spoken here: what comes in and what goes out.

The `image_url` parts of one message are the frames of one exam. Clients send the whole conversation
each time: the answer is about the last message with images, and of those before it only the text is
read. The answer carries an `ultra` object beside OpenAI's fields: the chosen frame, every frame's
score, how many frames nearly repeat the one before, and the replicas that served it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ultra.data.prompts import encode_prompt
from ultra.serve.events import Delta, Opening, Question
from ultra.serve.limits import ApiError, Limits
from ultra.types import Role, Turn

MAX_TEXT = 65_536
"""Characters of a conversation; far more than any context holds."""

REFUSED = (
    "audio", "best_of", "frequency_penalty", "functions", "logit_bias", "logprobs", "modalities",
    "prediction", "presence_penalty", "tools", "top_logprobs", "web_search_options",
)  # fmt: skip
"""Fields that would change the answer and are not understood; the others are ignored."""


def describe_models(limits: Limits) -> list[dict[str, Any]]:
    """Return the models as OpenAI lists them; their `ultra` says what a question may hold."""
    allowed = {name: getattr(limits, name) for name in ("max_frames", "max_image_mib")}
    rest = {"object": "model", "created": 0, "owned_by": "ultra", "ultra": allowed}
    return [{"id": name, **rest} for name in limits.models]


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


# Strict, because pydantic would take "yes" for true, and true or "1" for 1.
Flag = Annotated[bool, Field(strict=True)]


class StreamOptions(_Open):
    """Options of a streamed answer."""

    include_usage: Flag | None = None


class ResponseFormat(_Open):
    """The form of the answer."""

    type: Literal["text"]


Count = Annotated[int, Field(strict=True, ge=1, lt=2**31)]
Seed = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]
Temperature = Annotated[float, Field(strict=True, ge=0, le=2, allow_inf_nan=False)]
TopP = Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)]
Stop = Annotated[str, Field(min_length=1, max_length=100)]
Stops = Annotated[
    list[Stop],
    Field(max_length=4),
    BeforeValidator(
        lambda v: [v] if isinstance(v, str) else v,
        json_schema_input_type=Stop | Annotated[list[Stop], Field(max_length=4)],
    ),
]


class ChatRequest(_Open):
    """The body of a chat completion request."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: Seed | None = None
    stop: Stops | None = None
    n: Annotated[int, Field(strict=True, ge=1, le=1)] | None = None
    response_format: ResponseFormat | None = None


OpenImages = Callable[[Sequence[str], Limits], tuple[tuple[bytes, ...], int]]


def parse_chat(body: bytes, limits: Limits, open_images: OpenImages) -> Question:
    """Return the question a request's body asks.

    Args:
        body: JSON.
        limits: what it may ask for.
        open_images: see images.open_images.

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
    frames, num_near_duplicates = open_images(urls, limits)
    return Question(
        turns=turns,
        frames=frames,
        max_new_tokens=wanted,
        stop=tuple(request.stop or ()),
        temperature=request.temperature or 0.0,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=request.seed,
        num_near_duplicates=num_near_duplicates,
        model=request.model,
        stream=bool(request.stream),
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
    )


def _explain(error: ValidationError) -> ApiError:
    # Of the kinds a value may be, the one that fits furthest is the one that was meant.
    errors = error.errors(include_input=False, include_url=False)
    meant = max(reversed(errors), key=lambda item: len(item["loc"]))
    param = ".".join(_field_path(meant["loc"])) or None
    return ApiError(f"{param or 'body'}: {meant['msg']}", param=param)


def _field_path(location: Sequence[int | str]) -> Iterator[str]:
    """Yield the parts of a field's path as the client wrote it.

    pydantic names the kinds of a union as well: a type in words, or the tag of a message's part,
    which stands right behind the part's number.
    """
    for before, part in zip((None, *location), location, strict=False):
        is_tag = isinstance(before, int) and part in ("text", "image_url")
        if isinstance(part, int) or (part.isidentifier() and part not in ("str",) and not is_tag):
            yield str(part)


def _check_options(request: ChatRequest, limits: Limits) -> None:
    if request.model not in limits.models:
        raise ApiError(
            f"the model {request.model[:80]!r} does not exist; there is {', '.join(limits.models)}",
            status=404, param="model", code="model_not_found",
        )  # fmt: skip
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
    """Return the turns, and the addresses of the last message's images that has any."""
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
        urls = images or urls
        text = "\n".join(part.text for part in parts if isinstance(part, TextPart))
        role: Role = "system" if message.role == "developer" else message.role
        turns.append(Turn(role, text, has_frames=bool(images)))
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


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer in OpenAI's form, whole or in chunks."""

    question: Question
    opening: Opening

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

    def usage(self, last: Delta) -> dict[str, Any]:
        """Return the tokens of prompt (visual ones included) and answer (the end one included)."""
        prompt = self.opening.num_prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": last.num_tokens,
            "total_tokens": prompt + last.num_tokens,
            "prompt_tokens_details": {"cached_tokens": last.num_cached_tokens},
        }

    def _head(self, kind: str) -> dict[str, Any]:
        ticket = self.question.ticket
        return {
            "id": f"chatcmpl-{ticket.id}",
            "object": kind,
            "created": int(ticket.created),
            "model": self.question.model,
        }

    def _ultra(self) -> dict[str, Any]:
        ultra = {
            "chosen_frame": self.opening.chosen,
            "scores": list(self.opening.scores_K),
            "num_near_duplicates": self.question.num_near_duplicates,
            "num_cached_frames": self.opening.num_cached_frames,
        }
        if self.opening.replicas is None:
            return ultra
        return {**ultra, "replicas": dict(self.opening.replicas)}
