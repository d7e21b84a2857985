"""Keys and data URLs."""

from __future__ import annotations

import base64
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from ultra.serve.security import KEYS_VARIABLE, ApiKeys, decode_data_url, digest_key, load_keys


def test_keys_admit_their_bearers_only() -> None:
    keys = ApiKeys([digest_key("one"), digest_key("two")])
    assert keys.admit("Bearer one")
    assert keys.admit("bearer two")
    digest = digest_key("one")
    for header in (None, "", "one", "Bearer", "Bearer three", "Basic one", f"Bearer {digest}"):
        assert not keys.admit(header), header


def test_a_digest_is_what_others_compute() -> None:
    # printf abc | sha256sum
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digest_key("abc") == f"sha256:{known}"


@pytest.mark.parametrize("value", [None, ""])
def test_without_keys_everyone_is_admitted(monkeypatch, value) -> None:
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(KEYS_VARIABLE, value)
    assert load_keys().admit(None)


def test_keys_from_the_environment_or_a_file(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv(KEYS_VARIABLE, f" {digest_key('a')}, {digest_key('b')} ,")
    assert load_keys().admit("Bearer b")
    assert not load_keys().admit("Bearer ")
    path = tmp_path / "keys"
    path.write_text(f"# ours\n\n {digest_key('c')} of ward 3\n")
    assert load_keys(str(path)).admit("Bearer c")
    assert not load_keys(str(path)).admit("Bearer b")  # the file alone counts


def test_an_endpoint_that_was_to_have_keys_is_never_open(monkeypatch, tmp_path) -> None:
    path = tmp_path / "keys"
    path.write_text("# none\n")
    with pytest.raises(ValueError, match="names no API key"):
        load_keys(str(path))
    monkeypatch.setenv(KEYS_VARIABLE, " , ")
    with pytest.raises(ValueError, match="ULTRA_API_KEYS names no API key"):
        load_keys()


def test_a_plain_key_is_refused_and_not_told(tmp_path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"{digest_key('a')}\nplain-secret\n")
    with pytest.raises(ValueError, match="entry 2 is not sha256") as raised:
        load_keys(str(path))
    assert "plain-secret" not in str(raised.value)


def test_a_new_key_and_its_entry() -> None:
    command = [sys.executable, "-m", "ultra.serve.security"]
    outputs = {
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
        for _ in range(2)
    }
    assert len(outputs) == 2
    for output in outputs:
        key, entry = (line.split()[-1] for line in output.splitlines())
        assert ApiKeys([entry]).admit(f"Bearer {key}")
        assert len(key) >= 43


def test_a_data_url_is_decoded_up_to_the_cap() -> None:
    content = bytes(range(100))
    url = f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"
    assert decode_data_url(url, max_bytes=100) == content
    with pytest.raises(ValueError, match="more than the 96 bytes"):
        decode_data_url(url, max_bytes=96)


@pytest.mark.parametrize(
    "url",
    ["https://x/y.png", "file:///etc/passwd", "/etc/passwd", "data:image/png,abc", "data:,", ""],
)
def test_nothing_else_is_read(url) -> None:
    with pytest.raises(ValueError, match="only data URLs"):
        decode_data_url(url, 100)


@pytest.mark.parametrize("content", ["####", "abc", "YQ=\n="])
def test_broken_base64(content) -> None:
    with pytest.raises(ValueError, match="base64 cannot be decoded"):
        decode_data_url(f"data:image/png;base64,{content}", 100)
