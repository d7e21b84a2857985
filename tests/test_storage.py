from __future__ import annotations

import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pyarrow import fs

from tests.conftest import free_port
from tests.seaweedfs import SeaweedFS
from ultra import storage


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty folder, of both kinds."""
    if request.param == "local":
        return str(tmp_path / "root")
    bucket: str = request.getfixturevalue("s3_bucket")
    return f"{bucket}/{tmp_path.name}"


def test_bytes_are_read_as_written_and_replaced_whole(root: str) -> None:
    uri = f"{root}/a/b.bin"
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"first and long")
    storage.write_bytes(uri, b"second")
    assert storage.read_bytes(uri) == b"second"
    assert storage.read_bytes(uri, limit=6) == b"second"
    assert storage.exists(uri)
    assert storage.exists(f"{root}/a")
    with pytest.raises(storage.StorageError, match="longer than 5 bytes"):
        storage.read_bytes(uri, limit=5)


def test_a_file_is_copied_whole(root: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(6 << 20))
    storage.write_file(f"{root}/copy", source)
    assert storage.read_bytes(f"{root}/copy") == source.read_bytes()
    assert storage.list_files(root) == [f"{root}/copy"]


def test_reading_can_start_anywhere(root: str) -> None:
    storage.write_bytes(f"{root}/x", b"0123456789")
    with storage.open_read(f"{root}/x") as file:
        file.seek(4)
        assert file.read(3) == b"456"


def test_lines_are_read_one_at_a_time_without_a_byte_order_mark(root: str) -> None:
    long = "肝" * 1_000_000  # more than one chunk
    storage.write_bytes(f"{root}/x", f"\ufeff一\n{long}\n\n末".encode())
    lines = list(storage.read_lines(f"{root}/x", limit=10**7))
    assert [line.decode() for line in lines] == ["一", long, "", "末"]
    cut = list(storage.read_lines(f"{root}/x", limit=5, keep_ends=True))
    assert cut == ["一\n".encode(), long.encode()[:6], b"\n", "末".encode()]


def test_files_are_listed_sorted_and_by_suffix(root: str) -> None:
    for name in ("b.txt", "a/c.txt", "a/d.bin"):
        storage.write_bytes(f"{root}/{name}", b"x")
    assert storage.list_files(root) == [f"{root}/a/c.txt", f"{root}/a/d.bin", f"{root}/b.txt"]
    assert storage.list_files(root, ".bin") == [f"{root}/a/d.bin"]
    assert storage.list_files(f"{root}/nowhere") == []


def test_deleting_takes_a_file_or_a_folder_and_minds_nothing_missing(root: str) -> None:
    for name in ("a/x", "a/y/z", "b"):
        storage.write_bytes(f"{root}/{name}", b"x")
    storage.delete(f"{root}/a")
    storage.delete(f"{root}/nowhere")
    assert storage.list_files(root) == [f"{root}/b"]
    storage.delete(f"{root}/b")
    assert storage.list_files(root) == []


def test_a_folder_is_published_whole_and_fetched_again(root: str, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.yaml").write_text("1")
    (folder / "sub" / "weights").write_text("2")
    storage.write_bytes(f"{root}/out/old", b"left over")
    storage.publish(folder, f"{root}/out", last="config.yaml")
    assert storage.list_files(f"{root}/out") == [
        f"{root}/out/config.yaml",
        f"{root}/out/sub/weights",
    ]
    fetched = storage.fetch(f"{root}/out")
    assert (fetched / "config.yaml").read_text() == "1"
    assert (fetched / "sub" / "weights").read_text() == "2"
    assert storage.fetch(f"{root}/out/sub/weights").read_text() == "2"
    storage.write_bytes(f"{root}/out/config.yaml", b"changed")
    assert (storage.fetch(f"{root}/out") / "config.yaml").read_text() == "changed"


def test_what_is_missing_is_one_line_with_its_address(root: str) -> None:
    for attempt in (storage.read_bytes, storage.fetch):
        with pytest.raises(storage.StorageError, match=f"{root}/nowhere") as refused:
            attempt(f"{root}/nowhere")
        assert "\n" not in str(refused.value)


def test_a_missing_bucket_and_another_scheme_are_named(s3_bucket: str) -> None:
    for attempt in (storage.read_bytes, storage.exists, storage.list_files):
        with pytest.raises(storage.StorageError, match="bucket 'no-such-bucket' does not exist"):
            attempt("s3://no-such-bucket/x")
    with pytest.raises(storage.StorageError, match="bucket 'no-such-bucket' does not exist"):
        storage.write_bytes("s3://no-such-bucket/x", b"")
    with pytest.raises(storage.StorageError, match="local path or s3://"):
        storage.exists("gs://bucket/x")


class Bucket(BaseHTTPRequestHandler):
    """Says of everything that it exists."""

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def test_a_server_may_be_away_and_a_file_system_that_traveled_waits_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port = free_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    with ThreadingHTTPServer(("127.0.0.1", port), Bucket) as server:
        threading.Thread(target=server.serve_forever).start()
        filesystem, path = storage.resolve("s3://bucket/x")
        server.shutdown()
    travelled = pickle.loads(pickle.dumps(filesystem))

    def come_back() -> ThreadingHTTPServer:
        time.sleep(4)  # pyarrow's own three attempts end after 3 s at most
        server = ThreadingHTTPServer(("127.0.0.1", port), Bucket)
        threading.Thread(target=server.serve_forever).start()
        return server

    # As many as would use up the standard strategy's retries of a whole process.
    with ThreadPoolExecutor(25) as pool:
        answers = [pool.submit(travelled.get_file_info, path) for _ in range(24)]
        with come_back() as server:
            assert {answer.result().type for answer in answers} == {fs.FileType.File}
            server.shutdown()


def test_other_credentials_make_another_client(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(f"{s3_bucket}/secret", b"x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(storage.StorageError, match="ACCESS_DENIED"):
        storage.read_bytes(f"{s3_bucket}/secret")
    monkeypatch.undo()
    assert storage.read_bytes(f"{s3_bucket}/secret") == b"x"


def test_a_bucket_that_is_made_later_is_found(s3_server: SeaweedFS) -> None:
    with pytest.raises(storage.StorageError, match="bucket 'made-later' does not exist"):
        storage.exists("s3://made-later/x")
    uri = s3_server.make_bucket("made-later")
    storage.write_bytes(f"{uri}/x", b"1")
    assert storage.read_bytes(f"{uri}/x") == b"1"


def test_links_in_a_circle_are_followed_once(tmp_path: Path) -> None:
    storage.write_bytes(f"{tmp_path}/a/b/x.gif", b"x")
    (tmp_path / "a" / "b" / "loop").symlink_to(tmp_path / "a")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "dead").symlink_to(tmp_path / "nowhere")
    (tmp_path / "b.gif").symlink_to(tmp_path / "a" / "b" / "x.gif")
    assert storage.list_files(str(tmp_path)) == [f"{tmp_path}/a/b/x.gif", f"{tmp_path}/b.gif"]
