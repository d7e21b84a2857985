"""Several hundred bad requests over real HTTP: each is refused, and nothing else happens."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from tests.serve.bad_requests import CHAT, GOOD, KEY, LIMITS, Bad, bad_requests
from tests.serve.stand_in import run_stand_in

INSIDE = re.compile(r"Traceback|0x[0-9a-f]{6}|\.py\b|site-packages|ultra\.\w+\.|127\.0\.0\.1|Errno")
"""What an error must not tell."""
GROWTH_MIB = 8


class Store(BaseHTTPRequestHandler):
    """A server that images may be read from, but none can be."""

    def do_GET(self) -> None:
        route, _, rest = self.path.partition("?")
        location = {"/to": rest, "/loop": "/loop"}.get(route)
        self.send_response(302 if location else 404 if route == "/none" else 200)
        if location:
            self.send_header("Location", location)
        if route == "/packed":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        content = {"/text": b"<html>", "/packed": b"\x1f\x8b", "/large": bytes(3 * 2**20)}
        with suppress(OSError):  # the reader has had enough
            self.wfile.write(content.get(route, b""))

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Store)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("stand_in") / "log"


@pytest.fixture(scope="module")
def endpoint(store, log) -> Iterator[tuple[httpx.Client, int]]:
    """A client of the endpoint, and the endpoint's process."""
    limits = {
        **LIMITS,
        "allowed_image_hosts": [store],
        "allowed_image_networks": ["127.0.0.0/8", "::1"],
    }
    with (
        run_stand_in(log, limits, KEY) as (address, process),
        httpx.Client(base_url=address, timeout=30) as client,
    ):
        yield client, process


def send(client: httpx.Client, bad: Bad) -> httpx.Response:
    headers = [(name.encode(), value.encode("latin-1")) for name, value in bad.headers]
    return client.request(bad.method, bad.path, content=bad.body, headers=headers)


def find_fault(bad: Bad, response: httpx.Response) -> str | None:
    """Why a response does not refuse a request as it should."""
    if response.status_code != bad.status:
        return f"{response.status_code}, not {bad.status}: {response.text[:200]}"
    body = response.json()
    if body.keys() != {"error"} or body["error"].keys() != {"message", "type", "param", "code"}:
        return f"not OpenAI's form: {response.text[:200]}"
    param = body["error"]["param"]
    if param != bad.param and not (bad.param and (param or "").startswith(f"{bad.param}.")):
        return f"blames {param}, not {bad.param}: {response.text[:200]}"
    if INSIDE.search(response.text):
        return f"tells of the inside: {response.text[:200]}"
    return None


def is_answered(client: httpx.Client) -> bool:
    response = client.post(CHAT, json=GOOD, headers={"Authorization": f"Bearer {KEY}"})
    return response.status_code == 200


def read_resident_mib(process: int) -> float:
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024


def test_every_bad_request_is_refused_for_its_reason(endpoint, store, log) -> None:
    client, _ = endpoint
    requests = bad_requests(store)
    assert len({(b.method, b.path, b.headers, b.body) for b in requests}) >= 300
    faults = []
    for bad in requests:
        if fault := find_fault(bad, send(client, bad)):
            faults.append(f"{bad.name}: {fault}")
        elif not is_answered(client):
            faults.append(f"{bad.name}: a good request after it is not answered")
    assert not faults, "\n".join(faults)
    text = log.read_text(encoding="utf-8")
    for word in ("Traceback", "Error", "Warning", "question failed", "broke off"):
        assert word not in text
    assert "/packed" not in text  # addresses of images may hold keys


def test_bad_requests_leave_nothing_behind(endpoint, store) -> None:
    client, process = endpoint
    sizes = []
    for _ in range(3):
        for bad in bad_requests(store):
            send(client, bad)
        sizes.append(read_resident_mib(process))
    assert sizes[2] - sizes[1] < GROWTH_MIB, sizes


@pytest.mark.parametrize("path", [CHAT, "/v1/frames"])
def test_a_slow_body_is_not_waited_for(endpoint, path) -> None:
    client, _ = endpoint
    begun = time.monotonic()

    def drip() -> Iterator[bytes]:
        for _ in range(40):
            yield b" "
            time.sleep(0.1)

    try:
        response = client.post(path, content=drip(), headers={"Authorization": f"Bearer {KEY}"})
    finally:
        assert time.monotonic() - begun < 10
    assert find_fault(Bad("slow", status=408), response) is None
    assert is_answered(client)
