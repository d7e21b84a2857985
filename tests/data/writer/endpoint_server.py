"""An OpenAI-compatible endpoint that misbehaves as told, and keeps account of what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
        self.bodies: list[dict[str, Any]] = []
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
    account = Account()
    attempts: dict[str, int] = defaultdict(int)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][-1]["content"]
            digest = self.headers["Idempotency-Key"]
            with account.lock:
                account.requests[digest] += 1
                account.bodies.append(body)
                account.keys.add(self.headers["Authorization"].removeprefix("Bearer "))
                account.under_way += 1
                account.most_at_once = max(account.most_at_once, account.under_way)
                word = next((word for word in plan or {} if word in text), "")
                planned = (plan or {}).get(word, ())
                fault = planned[attempts[text]] if attempts[text] < len(planned) else "ok"
                attempts[text] += 1
            try:
                time.sleep(pause_s)
                self.answer(fault, text, digest)
            finally:
                with account.lock:
                    account.under_way -= 1

        def answer(self, fault: str, text: str, digest: str) -> None:
            if fault.isdigit():
                headers = {"Retry-After": "0.05"} if fault in ("429", "500") else {}
                self.send(int(fault), b'{"error": {"message": "no, not now"}}', headers)
            elif fault == "hang":
                time.sleep(1.5)
                self.close_connection = True
            elif fault == "drop":
                self.send(200, json.dumps(completion(write(text))).encode(), cut=True)
            elif fault == "garbage":
                self.send(200, b'{"choices": [')
            elif fault == "no schema":
                self.send(200, b'{"detail": "hello"}')
            else:
                changes: dict[str, Any] = {
                    "no choices": {"choices": []},
                    "no usage": {"usage": None},
                }.get(fault, {})
                answer = completion(write(text), **changes)
                if fault == "cut":
                    answer["choices"][0]["finish_reason"] = "length"
                with account.lock:
                    account.answered[digest] += 1
                self.send(200, json.dumps(answer).encode())

        def send(
            self, status: int, data: bytes, headers: Mapping[str, str] | None = None,
            cut: bool = False,
        ) -> None:  # fmt: skip
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            try:
                self.wfile.write(data[: len(data) // 2] if cut else data)
                self.wfile.flush()
            except OSError:
                pass  # whoever asked is gone
            self.close_connection = self.close_connection or cut

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", account
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
