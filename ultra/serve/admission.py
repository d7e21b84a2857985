"""A bound on the questions in work, kept before anything of them is read."""

from __future__ import annotations

from collections.abc import Callable

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ultra.serve.limits import too_busy


class Admission:
    """ASGI middleware that refuses what is posted while too much is in work.

    What is refused has cost nothing: its frames were not decoded, and no encoder has looked at
    them for an answer that the language model has no room for. Other routes stay open.

    Args:
        app: what answers.
        path: where questions are posted.
        max_open: questions that may be in work at a time.
        refused: told the status of what is refused.
    """

    def __init__(
        self, app: ASGIApp, *, path: str, max_open: int, refused: Callable[[int], None]
    ) -> None:
        self._app, self._path = app, path
        self._max_open, self._num_open = max_open, 0
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] != self._path:
            await self._app(scope, receive, send)
        elif self._num_open >= self._max_open:
            error = too_busy()
            self._refused(error.status)
            await JSONResponse(error.body(), error.status, error.headers)(scope, receive, send)
        else:
            self._num_open += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._num_open -= 1
