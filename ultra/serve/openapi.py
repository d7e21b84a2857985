"""The endpoint's OpenAPI document: what its routes take and answer, for tests to hold it to.

It is not served. The routes name their entry here, and FastAPI makes `app.openapi()` of them.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Literal

from fastapi import Response
from pydantic import BaseModel, ConfigDict

from ultra.serve.api import ChatRequest

Route = dict[str, Any]
"""Arguments of a route's decorator."""


class _Exact(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Error(_Exact):
    """What went wrong; `param` is the field that is to blame, where one is."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(_Exact):
    """The body of every status from 400 up."""

    error: Error


class AnswerMessage(_Exact):
    """The answer's text."""

    role: Literal["assistant"]
    content: str
    refusal: None


class Choice(_Exact):
    """The only one."""

    index: Literal[0]
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None


class PromptDetails(_Exact):
    """Tokens that the engine remembered."""

    cached_tokens: int


class Usage(_Exact):
    """Tokens of prompt and answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Grounds(BaseModel):
    """What the answer rests on; `replicas` is there where the endpoint has any."""

    chosen_frame: int
    scores: list[float]
    num_near_duplicates: int
    num_cached_frames: int


class Completion(_Exact):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    ultra: Grounds


class ModelLimits(_Exact):
    """What a question may hold."""

    max_frames: int
    max_image_mib: int


class Model(_Exact):
    """A model that may be asked."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    ultra: ModelLimits


class Models(_Exact):
    """All of them."""

    object: Literal["list"]
    data: list[Model]


class Frame(_Exact):
    """A frame of a DICOM file as a data URL, where it was in it, and what shows it clean."""

    url: str
    source: str
    evidence: str


class Frames(_Exact):
    """The frames of a DICOM file."""

    object: Literal["list"]
    data: list[Frame]


class Status(_Exact):
    """Whether questions would be answered."""

    status: Literal["ok", "unavailable"]


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the responses of these statuses; 429 and 503 may say when to come again."""
    retry = {"headers": {"Retry-After": {"schema": {"type": "string", "pattern": "^[0-9]+$"}}}}
    return {
        status: {
            "model": ErrorBody,
            "description": HTTPStatus(status).phrase,
            **(retry if status in (429, 503) else {}),
        }
        for status in statuses
    }


def _takes(media_type: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}


def _inline(schema: Any, definitions: dict[str, Any]) -> Any:
    """Return a schema without references, which have no place to point to in a route's entry."""
    if isinstance(schema, list):
        return [_inline(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inline(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {
        key: _inline(value, definitions)
        for key, value in schema.items()
        if key not in ("$defs", "discriminator")
    }


def _request_schema() -> dict[str, Any]:
    schema = ChatRequest.model_json_schema()
    inlined: dict[str, Any] = _inline(schema, schema["$defs"])
    return inlined


_EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string", "description": "A chunk's JSON, or [DONE]"}},
}
CHAT: Route = {
    "responses": {
        200: {
            "model": Completion,
            "description": "The answer, whole or as server-sent events",
            "content": {"text/event-stream": {"schema": _EVENT}},
        },
        **errors(400, 404, 408, 413, 429, 503, 504),
    },
    "openapi_extra": _takes("application/json", _request_schema()),
}
FRAMES: Route = {
    "responses": {200: {"model": Frames}, **errors(400, 408, 413, 429)},
    "openapi_extra": _takes("application/octet-stream", {"type": "string", "format": "binary"}),
}
READY: Route = {
    "responses": {200: {"model": Status}, 503: {"model": Status, "description": "Not yet"}}
}
METRICS: Route = {
    "response_class": Response,
    "responses": {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
}
MODELS: Route = {"response_model": Models}
MODEL: Route = {"response_model": Model, "responses": {"4XX": {"model": ErrorBody}}}
