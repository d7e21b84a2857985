"""The HTTP endpoint, on whatever answers questions: routes, streaming, errors and counters.

No frame, question or answer is written to a log.
"""

from __future__ import annotations

import asyncio
import json
import logging
import traceback
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Any, Protocol

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from ultra.serve import openapi
from ultra.serve.admission import Admission
from ultra.serve.api import Reply, describe_models, parse_chat
from ultra.serve.dicom import open_dicom
from ultra.serve.events import Delta, Event, Opening, Question, Refusal
from ultra.serve.gateway import END, mark_tokens, read_ticket
from ultra.serve.images import open_images
from ultra.serve.limits import ApiError, Limits, too_busy
from ultra.serve.metrics import Metrics
from ultra.serve.page import create_page
from ultra.serve.security import ApiKeys

logger = logging.getLogger(__name__)

CHAT = "/v1/chat/completions"


class Backend(Protocol):
    """What answers questions."""

    def answer(self, question: Question) -> AsyncGenerator[Event, None]:
        """Yield an Opening, then Deltas of which the last is finished; or a Refusal alone.

        Closing the iterator cancels what is left.

        Raises:
            ApiError: when it is too busy.
        """

    async def ready(self) -> bool:
        """Return whether questions would be answered now."""


def create_app(backend: Backend, limits: Limits, keys: ApiKeys) -> FastAPI:
    """Return the endpoint; `/health/live` and the page's files alone are open without a key."""

    def require_key(request: Request) -> None:
        if not keys.admit(request.headers.get("authorization")):
            raise ApiError(
                "this endpoint needs a valid API key", status=401, code="invalid_api_key"
            )

    metrics = Metrics()
    app = FastAPI(
        title="ultra", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    # HTTPBearer refuses nothing here; it is what the OpenAPI document knows of the key.
    router = APIRouter(
        dependencies=[Depends(HTTPBearer(auto_error=False)), Depends(require_key)],
        responses=openapi.errors(401, 500),
    )
    _add_views(router, backend, limits, metrics)
    _add_questions(router, backend, limits, metrics)

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        return {"status": "ok"}

    app.add_middleware(
        Admission, path=CHAT, max_open=limits.max_open_questions, refused=metrics.refused
    )
    app.include_router(router)
    app.include_router(create_page())
    for kind in (ApiError, HTTPException, Exception):
        app.add_exception_handler(kind, _show_error)
    return app


def _add_views(router: APIRouter, backend: Backend, limits: Limits, metrics: Metrics) -> None:
    models = {model["id"]: model for model in describe_models(limits)}

    @router.get("/health/ready", **openapi.READY)
    async def ready() -> Response:
        is_ready = await backend.ready()
        status = {True: "ok", False: "unavailable"}[is_ready]
        return JSONResponse({"status": status}, 200 if is_ready else 503)

    @router.get("/metrics", **openapi.METRICS)
    async def show_metrics() -> Response:
        return metrics.show()

    @router.get("/v1/models", **openapi.MODELS)
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [*models.values()]}

    @router.get("/v1/models/{name}", **openapi.MODEL)
    async def show_model(name: str) -> dict[str, Any]:
        if name not in models:
            raise ApiError("there is no such model", status=404, code="model_not_found")
        return models[name]


def _add_questions(router: APIRouter, backend: Backend, limits: Limits, metrics: Metrics) -> None:
    opening = asyncio.Semaphore(1)  # a cine takes seconds; questions find the other threads free

    @router.post(CHAT, **openapi.CHAT)
    async def chat(request: Request) -> Response:
        return await _chat(request, backend, limits, metrics)

    @router.post("/v1/frames", **openapi.FRAMES)
    async def show_frames(request: Request) -> dict[str, Any]:
        async with opening:
            body = await _read_body(request, limits.max_dicom_mib * 2**20, limits.body_timeout_s)
            with _discreet("a DICOM file failed"):
                return await asyncio.to_thread(open_dicom, body, limits)


async def _chat(request: Request, backend: Backend, limits: Limits, metrics: Metrics) -> Response:
    try:
        with _discreet("a question failed"):
            return await _answer(request, backend, limits, metrics)
    except ApiError as error:
        metrics.refused(error.status)
        raise


async def _answer(request: Request, backend: Backend, limits: Limits, metrics: Metrics) -> Response:
    ticket = read_ticket(request.headers.raw)
    body = await _read_body(request, limits.max_body_bytes, limits.body_timeout_s)
    # Decoding frames takes long enough to hold up everybody else.
    question = replace(
        await asyncio.to_thread(parse_chat, body, limits, open_images), ticket=ticket
    )
    events = metrics.watch(backend.answer(question))
    try:
        first = await anext(events)
        if isinstance(first, Refusal):
            raise too_busy() if first.busy else ApiError(first.message, param="messages")
        assert isinstance(first, Opening)
        reply = Reply(question, first)
        if question.stream:
            chunks = _stream(reply, events, metrics)
            return StreamingResponse(chunks, media_type="text/event-stream")
        deltas = [event async for event in events if isinstance(event, Delta)]
    except BaseException:
        await events.aclose()
        raise
    return JSONResponse(reply.completion("".join(d.text for d in deltas), deltas[-1]))


async def _stream(
    reply: Reply, events: AsyncGenerator[Event, None], metrics: Metrics
) -> AsyncGenerator[bytes, None]:
    question = reply.question
    async with aclosing(events):
        if question.ticket.begun is None:
            yield _sse(reply.first_chunk())
        try:
            async for event in events:
                assert isinstance(event, Delta)
                chunk = mark_tokens(event.token_ids)
                if event.text:
                    chunk += _sse(reply.chunk({"content": event.text}))
                if event.finish_reason:  # in one piece, so that it is told whole or not at all
                    chunk += _sse(reply.chunk({}, event.finish_reason))
                    chunk += _sse(reply.usage_chunk(event)) if question.include_usage else b""
                    chunk += END
                yield chunk
        except Exception as error:
            # The status line is gone, so the stream itself must say that the answer is cut.
            _log_failure("an answer broke off", error)
            shown = _as_api_error(error)
            metrics.refused(shown.status)
            yield _sse(shown.body())


def _sse(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


async def _read_body(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                body += part
                if len(body) > max_bytes:
                    raise ApiError(f"a request of more than {max_bytes} bytes", status=413)
    except TimeoutError:
        raise ApiError(f"no whole request within {timeout_s} s", status=408) from None
    return bytes(body)


@contextmanager
def _discreet(what: str) -> Iterator[None]:
    """Answer an unexpected error with a 500; the server would log all that the error says."""
    try:
        yield
    except ApiError:
        raise
    except Exception as error:
        _log_failure(what, error)
        raise _as_api_error(error) from None


def _log_failure(what: str, error: Exception) -> None:
    """Log where something failed, but not the message, which may quote what was asked."""
    places = "".join(traceback.format_tb(error.__traceback__))
    logger.error("%s: %s\n%s", what, type(error).__name__, places)


async def _show_error(request: Request, error: Exception) -> Response:
    shown = _as_api_error(error)
    headers = error.headers if isinstance(error, HTTPException) else shown.headers
    return JSONResponse(shown.body(), shown.status, headers)


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):  # unknown routes and methods
        return ApiError(str(error.detail), status=error.status_code)
    return ApiError("the answer failed inside the server", status=500)
