"""A small OpenAI-compatible endpoint that records what it is asked and misbehaves on request."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, Any] | str] | None
"""Status and body; None hangs up."""


def completion(text: str | None, **message: Any) -> Reply:
    """The reply that carries an answer."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"content": text, **message}}
    return 200, {"id": "1", "object": "chat.completion", "model": "m", "choices": [choice]}


class VisionServer:
    """What was asked, and the address."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.most_at_once = 0

    def questions(self) -> Counter[str]:
        """How often each question was asked, retries included."""
        return Counter(question_of(request) for request in self.requests)


def question_of(request: dict[str, Any]) -> str:
    """The text of a request's only message."""
    (message,) = request["messages"]
    (text,) = [part["text"] for part in message["content"] if part["type"] == "text"]
    return str(text)


def images_of(request: dict[str, Any]) -> list[str]:
    """The addresses of a request's images."""
    parts = request["messages"][0]["content"]
    return [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]


@contextmanager
def serve(reply: Callable[[str, int], Reply]) -> Iterator[VisionServer]:
    """Run the endpoint; `reply` gets a question and how often it was asked before."""
    lock, under_way = threading.Lock(), 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            nonlocal under_way
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            question = question_of(body)
            with lock:
                before = server.questions()[question]
                server.requests.append({**body, "path": self.path})
                server.keys.append(self.headers["Authorization"])
                under_way += 1
                server.most_at_once = max(server.most_at_once, under_way)
            try:
                self._send(reply(question, before))
            finally:
                with lock:
                    under_way -= 1

        def _send(self, answer: Reply) -> None:
            if answer is None:
                self.close_connection = True
                return
            status, content = answer
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("retry-after-ms", "1")  # the client waits as long as it is told
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = VisionServer(f"http://127.0.0.1:{http.server_port}/v1")
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
