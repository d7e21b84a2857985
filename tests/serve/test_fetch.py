"""Images from other servers: real ones, on the loopback address, under names of the test."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ultra.serve import fetch
from ultra.serve.fetch import Fetcher

CONTENT = bytes(range(256)) * 4
LOOPBACK = ["127.0.0.0/8"]
NOT_ON_THE_LIST = "its host is not one that images are read from"


class Handler(BaseHTTPRequestHandler):
    """Answers by path: /to?URL leads on to URL."""

    def do_GET(self) -> None:
        self.server.asked.append((self.headers["Host"], self.path))
        route, _, rest = self.path.partition("?")
        if route == "/to":
            self.send_response(302)
            self.send_header("Location", rest)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(404 if route == "/none" else 200)
        if route == "/packed":
            self.send_header("Content-Encoding", "gzip")
        if route != "/slow":
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT)
            return
        self.end_headers()
        try:
            while not self.server.stopping.wait(0.05):
                self.wfile.write(b"x")
        except OSError:
            pass  # the reader has had enough

    def log_message(self, *args: object) -> None:
        pass


def start(context: ssl.SSLContext | None = None) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.stopping, server.daemon_threads = [], threading.Event(), True
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def stop(server: ThreadingHTTPServer) -> None:
    server.stopping.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    server = start()
    yield server
    stop(server)


@pytest.fixture
def names(monkeypatch) -> dict[str, list[str]]:
    """Name -> addresses of the one resolver there is; others do not resolve."""
    known: dict[str, list[str]] = {"store": ["127.0.0.1"]}
    real = socket.getaddrinfo

    def resolve(host, port, *args, **options):
        if host in known:
            return [
                (socket.AF_INET6 if ":" in a else socket.AF_INET, 1, 6, "", (a, port))
                for a in known[host]
            ]
        ipaddress.ip_address(host)  # connections are made to addresses only
        return real(host, port, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return known


def origin(server: ThreadingHTTPServer, name: str = "store") -> str:
    return f"http://{name}:{server.server_port}"


def test_an_allowed_host_is_read_by_the_address_that_was_checked(server, names) -> None:
    here = origin(server)
    assert Fetcher([here], LOOPBACK).fetch(f"{here}/a.png?b#c", 2000) == CONTENT
    assert server.asked == [(here.removeprefix("http://"), "/a.png?b")]


def test_a_redirect_to_another_allowed_host_is_followed(server, names) -> None:
    names["other"] = ["127.0.0.1"]
    here, there = origin(server), origin(server, "other")
    fetcher = Fetcher([here, there], LOOPBACK)
    assert fetcher.fetch(f"{here}/to?{there}/to?/a.png", 2000) == CONTENT
    assert [host.partition(":")[0] for host, _ in server.asked] == [
        "store", "other", "other",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["10.1.2.3"],
        ["169.254.169.254"],
        ["0.0.0.0"],
        ["224.0.0.1"],
        ["::1"],
        ["fe80::1"],
        ["fc00::1"],
        ["::ffff:10.0.0.1"],
        ["100.64.0.1"],
        ["93.184.216.34", "10.1.2.3"],  # one public address beside a private one
    ],
)
def test_addresses_that_are_not_public_are_not_read(server, names, addresses) -> None:
    names["store"] = addresses
    here = origin(server)
    with pytest.raises(ValueError, match=NOT_ON_THE_LIST) as raised:
        Fetcher([here], ["192.168.0.0/16"]).fetch(f"{here}/a.png", 2000)
    assert not any(address in str(raised.value) for address in addresses)
    assert server.asked == []


def test_a_public_address_may_be_read() -> None:
    fetcher = Fetcher(["store"])
    assert fetcher._may_be_read(ipaddress.ip_address("93.184.216.34"))
    assert fetcher._may_be_read(ipaddress.ip_address("2606:2800:220:1::1"))


@pytest.mark.parametrize(
    "url",
    [
        "http://elsewhere/a.png",
        "https://store/a.png",  # listed with http
        "http://store/a.png",  # listed with its port
        "http://user:secret@store:{port}/a.png",
        "http://store.:{port}/a.png",
        "http://127.0.0.1:{port}/a.png",
        "file:///etc/passwd",
        "ftp://store:{port}/a.png",
        "gopher://store:{port}/",
        "//store:{port}/a.png",
        "store",
        "http://",
        "http://[::1",
        "http://store:{port}@elsewhere/",
        "",
    ],
)
def test_other_hosts_are_not_asked(server, names, url) -> None:
    fetcher = Fetcher([origin(server)], LOOPBACK)
    with pytest.raises(ValueError, match=f"{NOT_ON_THE_LIST}|cannot be read"):
        fetcher.fetch(url.format(port=server.server_port), 2000)
    assert server.asked == []


@pytest.mark.parametrize(
    "target",
    ["http://[fc00::1]/a.png", "file:///etc/passwd", "http://localhost:22/", "https://x:y"],
)
def test_a_redirect_is_checked_like_the_first_address(server, names, target) -> None:
    here = origin(server)
    with pytest.raises(ValueError, match=f"{NOT_ON_THE_LIST}|cannot be read"):
        Fetcher([here], LOOPBACK).fetch(f"{here}/to?{target}", 2000)
    assert len(server.asked) == 1


def test_a_name_that_changes_its_address_is_checked_again(server, monkeypatch) -> None:
    # The second answer of the resolver is what a rebinding attack hopes for.
    here = origin(server)
    answers = iter(["127.0.0.1", "169.254.169.254"])

    def resolve(host, port, *args, **options):
        address = next(answers) if host == "store" else host
        return [(socket.AF_INET, 1, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(ValueError, match=NOT_ON_THE_LIST):
        Fetcher([here], LOOPBACK).fetch(f"{here}/to?/a.png", 2000)
    assert len(server.asked) == 1


def test_what_is_too_large_slow_packed_missing_or_endless(server, names, monkeypatch) -> None:
    here = origin(server)
    fetcher = Fetcher([here], LOOPBACK)
    monkeypatch.setattr(fetch, "TIMEOUT_S", 0.5)
    for path, message in {
        "/a.png": "more than the 1000 bytes",
        "/slow": "takes too long",
        "/packed": "does not give an image as it is",
        "/none": "does not give an image as it is",
        "/to?/to?/to?/to?/a.png": "leads on more than 3 times",
    }.items():
        with pytest.raises(ValueError, match=message):
            fetcher.fetch(f"{here}{path}", 1000)
    port = server.server_port
    stop(server)
    with pytest.raises(ValueError, match="cannot be read"):
        fetcher.fetch(f"http://store:{port}/a.png", 1000)


def test_https_is_checked_against_the_name_not_the_address(names, tmp_path) -> None:
    trusted, context = make_certificate("store", tmp_path)
    server = start(context)
    try:
        host = f"store:{server.server_port}"
        assert Fetcher([host], LOOPBACK, trusted).fetch(f"https://{host}/a", 2000) == CONTENT
        names["false"] = ["127.0.0.1"]
        false = f"false:{server.server_port}"
        with pytest.raises(ValueError, match="cannot be read"):
            Fetcher([false], LOOPBACK, trusted).fetch(f"https://{false}/a", 2000)
    finally:
        stop(server)


def make_certificate(name: str, folder) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A client's trust in a new certificate for a name, and a server's use of it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "certificate").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "certificate", folder / "key")
    return ssl.create_default_context(cafile=str(folder / "certificate")), context
