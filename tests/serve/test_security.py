"""Keys and data URLs."""

from __future__ import annotations

import base64

import pytest

from ultra.serve.security import KEYS_VARIABLE, ApiKeys, decode_data_url, load_keys


def test_keys_admit_their_bearers_only() -> None:
    keys = ApiKeys(["one", "two"])
    assert keys.admit("Bearer one")
    assert keys.admit("bearer two")
    for header in (None, "", "one", "Bearer", "Bearer three", "Basic one", "Bearer one two"):
        assert not keys.admit(header), header


def test_without_keys_everyone_is_admitted(monkeypatch) -> None:
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    assert load_keys().admit(None)


def test_keys_from_the_environment_or_a_file(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv(KEYS_VARIABLE, " a, b ,")
    assert load_keys().admit("Bearer b")
    assert not load_keys().admit("Bearer ")
    path = tmp_path / "keys"
    path.write_text("# ours\n\n c \n")
    assert load_keys(str(path)).admit("Bearer c")
    assert not load_keys(str(path)).admit("Bearer b")  # the file alone counts
    path.write_text("# none\n")
    with pytest.raises(ValueError, match="names no API key"):
        load_keys(str(path))


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
def test_nothing_is_ever_fetched(url) -> None:
    with pytest.raises(ValueError, match="nothing is fetched"):
        decode_data_url(url, 100)


@pytest.mark.parametrize("content", ["####", "abc", "YQ=\n="])
def test_broken_base64(content) -> None:
    with pytest.raises(ValueError, match="base64 cannot be decoded"):
        decode_data_url(f"data:image/png;base64,{content}", 100)
