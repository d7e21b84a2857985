"""An OpenAI-compatible endpoint that misbehaves as told, and keeps account of what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PROMPT_TOKENS, COMPLETION_TOKENS = 1000, 500
"""What every answer says it used."""


class Account:
    """What was asked.

    Attributes:
        requests: per digest, every attempt.
        answered: per digest, whole answers with content that left the server: what is paid.
        most_at_once: requests under way at a time.
        keys: the API keys that came.
    """

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.most_at_once = 0
        self.under_way = 0
        self.keys: set[str] = set()
        self.lock = threading.Lock()


def completion(content: str, **changes: Any) -> dict[str, Any]:
    """The body of a good answer, with some fields replaced."""
    return {
        "id": "c",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": content},
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": PROMPT_TOKENS,
            "completion_tokens": COMPLETION_TOKENS,
            "total_tokens": PROMPT_TOKENS + COMPLETION_TOKENS,
        },
        **changes,
    }


FAULTS: dict[str, dict[str, Any]] = {
    "no choices": {"choices": []},
    "no usage": {"usage": None},
}
"""Answers that are whole and lack something."""


class Server(ThreadingHTTPServer):
    """Holds what the handlers share."""

    daemon_threads = True

    def __init__(
        self, write: Callable[[str], str], plan: Mapping[str, Sequence[str]], pause_s: float
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.write, self.plan, self.pause_s = write, plan, pause_s
        self.account = Account()
        self.attempts: Counter[str] = Counter()

    def fault_of(self, text: str) -> str:
        """What goes wrong at this attempt to ask a text."""
        planned = next((faults for word, faults in self.plan.items() if word in text), ())
        attempt = self.attempts[text]
        self.attempts[text] += 1
        return planned[attempt] if attempt < len(planned) else "ok"


class Handler(BaseHTTPRequestHandler):
    """Answers as the plan says."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text, digest = body["messages"][-1]["content"], self.headers["Idempotency-Key"]
        account = self.server.account
        with account.lock:
            account.requests[digest] += 1
            account.keys.add(self.headers["Authorization"].removeprefix("Bearer "))
            account.under_way += 1
            account.most_at_once = max(account.most_at_once, account.under_way)
            fault = self.server.fault_of(text)
        try:
            time.sleep(self.server.pause_s)
            self.answer(fault, text, digest)
        finally:
            with account.lock:
                account.under_way -= 1

    def answer(self, fault: str, text: str, digest: str) -> None:
        """Answer a request, well or with a fault."""
        if fault == "hang":
            time.sleep(1.5)
            self.close_connection = True
        elif fault.isdigit():
            self.send(int(fault), b'{"error": {"message": "no, not now"}}')
        elif fault == "garbage":
            self.send(200, b'{"choices": [')
        elif fault == "no schema":
            self.send(200, b'{"detail": "hello"}')
        else:
            answer = completion(self.server.write(text), **FAULTS.get(fault, {}))
            if fault == "cut":
                answer["choices"][0]["finish_reason"] = "length"
            if fault != "drop":
                with self.server.account.lock:
                    self.server.account.answered[digest] += 1
            self.send(200, json.dumps(answer).encode(), cut=fault == "drop")

    def send(self, status: int, data: bytes, cut: bool = False) -> None:
        """Send an answer; with `cut`, half of it before the connection ends."""
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status in (429, 500):
            self.send_header("Retry-After", "0.05")
        self.end_headers()
        with suppress(OSError):  # whoever asked may be gone
            self.wfile.write(data[: len(data) // 2] if cut else data)
            self.wfile.flush()
        self.close_connection = self.close_connection or cut

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@contextmanager
def serve(
    write: Callable[[str], str],
    plan: Mapping[str, Sequence[str]] | None = None,
    pause_s: float = 0.0,
) -> Iterator[tuple[str, Account]]:
    """Yield the base_url of a running endpoint and its account.

    Args:
        write: the content of an answer to the text of a user's message.
        plan: a word of that text -> what goes wrong at its first, second ... attempt; an attempt
            beyond them goes well. `ok`, `hang`, `drop`, `garbage`, `no schema`, `no choices`,
            `no usage`, `cut`, or a status such as `429`.
        pause_s: how long an answer takes.
    """
    server = Server(write, plan or {}, pause_s)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", server.account
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
