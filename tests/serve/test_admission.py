"""What is refused before it is read."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from ultra.serve.admission import Admission


def test_what_is_beyond_the_bound_is_refused_unread_and_other_routes_stay_open() -> None:
    asyncio.run(_fill())


async def _fill() -> None:
    release = asyncio.Event()
    refused: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "POST":
            await release.wait()
        if scope.get("fails"):
            raise RuntimeError
        await send({"type": "http.response.start", "status": 200, "headers": []})

    admission = Admission(app, path="/chat", max_open=2, refused=refused.append)

    async def never() -> Message:
        raise AssertionError("read")

    async def ask(method: str = "POST", path: str = "/chat", **more: Any) -> dict[str, Any]:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {"type": "http", "method": method, "path": path, **more}
        await admission(scope, never, send)
        return dict(sent[0])

    first = asyncio.create_task(ask())
    failing = asyncio.create_task(ask(fails=True))
    await asyncio.sleep(0)
    third = await ask()
    assert third["status"] == 429
    assert (b"retry-after", b"5") in third["headers"]
    assert refused == [429]
    assert (await ask("GET", "/metrics"))["status"] == 200
    assert (await ask("GET"))["status"] == 200
    release.set()
    assert (await first)["status"] == 200
    await asyncio.wait([failing])  # a place is given back however a question ends
    assert isinstance(failing.exception(), RuntimeError)
    answered = await asyncio.gather(ask(), ask())
    assert [a["status"] for a in answered] == [200, 200]
