"""In Serve's HTTP proxy: a request outlives the ingress replica that serves it.

    export RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=ultra.serve.gateway:middlewares

Where this is set when Ray starts, the proxy remembers each request until it is answered, and gives
it to another ingress replica when one dies: whole before the first byte of the response, and with
the tokens that the client has been sent after that. Errors of the proxy itself take OpenAI's form,
and the headers with which a client could lift Serve's limits are taken away. Without it the
endpoint answers all the same, but what an ingress replica works on dies with it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from http import HTTPStatus
from uuid import UUID

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ultra.serve.events import Ticket
from ultra.serve.limits import ApiError

logger = logging.getLogger(__name__)

TICKET, BEGUN = b"x-ultra-ticket", b"x-ultra-begun"
NOT_FROM_CLIENTS = (TICKET, BEGUN, b"x-request-timeout-seconds", b"x-request-disconnect-disabled")
"""Headers that count only when they come from here; the last two lift Serve's own limits."""

MAX_ATTEMPTS = 5
END = b"data: [DONE]\n\n"

Header = tuple[bytes, bytes]


def middlewares() -> list[Middleware]:
    """Return what Serve's proxy is to be wrapped in."""
    return [Middleware(Gateway)]


def write_ticket(ticket: Ticket) -> list[Header]:
    """Return a ticket as headers."""
    headers = [(TICKET, f"{ticket.id} {ticket.created!r}".encode())]
    if ticket.begun is not None:
        headers.append((BEGUN, " ".join(map(str, ticket.begun)).encode()))
    return headers


def read_ticket(headers: Iterable[Header]) -> Ticket:
    """Return the ticket that headers tell, or a fresh one where they tell none.

    Raises:
        ApiError: for headers that `write_ticket` does not write.
    """
    found = dict(headers)
    if TICKET not in found:
        return Ticket()
    try:
        name, created = found[TICKET].decode().split(" ")
        begun = tuple(map(int, found[BEGUN].split())) if BEGUN in found else None
        return Ticket(UUID(name).hex, float(created), begun)
    except ValueError:
        raise ApiError(f"{TICKET.decode()} and {BEGUN.decode()} are not for clients") from None


def mark_tokens(ids: Iterable[int]) -> bytes:
    """Return token ids as a comment in an event stream, which clients skip."""
    text = " ".join(map(str, ids))
    return f": {text}\n".encode() if text else b""


class Gateway:
    """ASGI middleware that keeps requests until they are answered."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "http":
            await _Exchange(scope, receive, send).run(self._app)
        else:
            await self._app(scope, receive, send)


class _Exchange:
    """One request, its response, and what of it the client has been sent."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(n, v) for n, v in scope["headers"] if n.lower() not in NOT_FROM_CLIENTS]
        self._scope = {**scope, "headers": headers}
        self._receive, self._send = receive, send
        self._ticket = Ticket()
        self._request: list[Message] = []
        self._start: Message | None = None  # of this attempt's response
        self._is_stream = False
        self._begun: list[int] | None = None  # not None once the client has been sent anything
        self._is_over = False

    async def run(self, app: ASGIApp) -> None:
        for _ in range(MAX_ATTEMPTS):
            self._start = None
            begun = None if self._begun is None else tuple(self._begun)
            ticket = Ticket(self._ticket.id, self._ticket.created, begun)
            scope = {**self._scope, "headers": [*self._scope["headers"], *write_ticket(ticket)]}
            await app(scope, self._repeat_request(), self._pass_on)
            if self._is_over:
                return
            logger.warning(
                "request %s lost its ingress replica and goes on with another", ticket.id
            )
        await self._give_up()

    def _repeat_request(self) -> Receive:
        position = 0

        async def receive() -> Message:
            nonlocal position
            if position == len(self._request):
                message = await self._receive()
                if message["type"] == "http.disconnect":
                    self._is_over = True
                    return message
                self._request.append(message)
            position += 1
            return self._request[position - 1]

        return receive

    async def _pass_on(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message  # kept until there is a body, for it cannot be taken back
        elif not self._is_over:
            assert message["type"] == "http.response.body"
            await self._pass_body(message.get("body", b""), message.get("more_body", False))

    async def _pass_body(self, body: bytes, more: bool) -> None:
        assert self._start is not None
        if self._begun is None:
            body = await self._open(self._start, body)
        elif self._is_stream and not _is_stream(self._start):  # refused where it should go on
            body = _as_event(body)
        if self._is_stream:
            body = self._take_tokens(body)
            more = more and END not in body  # nothing after it may be lost
        self._is_over = not more
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def _open(self, start: Message, body: bytes) -> bytes:
        self._begun, self._is_stream = [], _is_stream(start)
        if start["status"] >= 400 and not _has_type(start, b"application/json"):
            start, body = _as_openai(start)
        await self._send(start)
        return body

    def _take_tokens(self, body: bytes) -> bytes:
        assert self._begun is not None
        lines = body.splitlines(keepends=True)
        for line in lines:
            if line.startswith(b":"):
                self._begun += map(int, line[1:].split())
        return b"".join(line for line in lines if not line.startswith(b":"))

    async def _give_up(self) -> None:
        error = ApiError("the endpoint cannot answer now", status=503, retry_after_s=5)
        body = json.dumps(error.body()).encode()
        if self._begun is None:
            headers = [(b"content-type", b"application/json"), (b"retry-after", b"5")]
            await self._send({"type": "http.response.start", "status": 503, "headers": headers})
        elif self._is_stream:
            body = _as_event(body)
        await self._send({"type": "http.response.body", "body": body})


def _as_event(body: bytes) -> bytes:
    return b"data: " + body + b"\n\n"


def _has_type(start: Message, kind: bytes) -> bool:
    types = [value for name, value in start.get("headers", ()) if name.lower() == b"content-type"]
    return any(value.startswith(kind) for value in types)


def _is_stream(start: Message) -> bool:
    return _has_type(start, b"text/event-stream")


def _as_openai(start: Message) -> tuple[Message, bytes]:
    """Return an error that Serve's proxy words itself in the form OpenAI's clients read."""
    status = start["status"]
    message = "too many requests, try again soon" if status == 429 else HTTPStatus(status).phrase
    body = json.dumps(ApiError(message, status=status).body()).encode()
    kept = [h for h in start["headers"] if h[0].lower() not in (b"content-type", b"content-length")]
    headers = [*kept, (b"content-type", b"application/json")]
    return {**start, "headers": headers}, body
