"""What is asked and answered stands in no log, and errors tell nothing of the inside."""

from __future__ import annotations

import base64
import json

import httpx
import pytest

from tests.serve.questions import CANARIES, CANARY_IMAGE, ask_user, find_canaries
from tests.serve.stand_in import run_stand_in
from tests.serve.test_dicom import real

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("name", [*CANARIES, "image"])
def test_canaries_are_found_in_every_form(name) -> None:
    data = CANARIES[name].encode() if name in CANARIES else CANARY_IMAGE
    for before in range(3):  # base64 differs by where it begins
        inside = b"x" * before + data + b"y"
        assert find_canaries(f"log: {base64.b64encode(inside).decode()} end") == [name]
    if name in CANARIES:
        dumped = json.dumps({"content": CANARIES[name]})
        for text in (CANARIES[name], dumped, json.dumps(dumped), repr(dumped)):
            assert find_canaries(text) == [name]
    else:
        for middle in range(100, len(data) - 100, 7):
            part = data[middle : middle + 36]
            assert find_canaries(repr(part)) == find_canaries(part.hex()) == [name]
    assert find_canaries("canary-user-7f3a91c5 " + base64.b64encode(bytes(100)).decode()) == []


def ask(text: str = "", **fields) -> dict:
    messages = [
        {"role": "system", "content": CANARIES["system"]},
        ask_user(CANARIES["user"] + text, CANARY_IMAGE),
    ]
    return {"model": "ultra", "messages": messages, **fields}


BAD = {"temperature": 3}, {"model": CANARIES["user"]}, {"stop": [CANARIES["user"] * 9]}
QUOTED = real("color3d_jpeg_baseline").replace(b"1.2.840.10008.1.2.4.50", b"canary-tag-10008.1.2.4")
"""Its transfer syntax is one that pydicom warns about in its own words."""
DAMAGED = ask_user(CANARIES["user"], CANARY_IMAGE[:-40])


def test_nothing_of_a_question_or_its_answer_is_logged(tmp_path) -> None:
    log = tmp_path / "log"
    with run_stand_in(log, {}) as (address, _), httpx.Client(base_url=address) as client:
        whole = client.post(CHAT, json=ask())
        assert find_canaries(whole.text) == ["answer"]
        assert find_canaries(client.post(CHAT, json=ask(stream=True)).text) == ["answer"]
        for fields in ({"messages": [DAMAGED]}, *BAD):
            assert 400 <= client.post(CHAT, json=ask(**fields)).status_code < 500
        assert client.post(CHAT, content=json.dumps(ask())[:-1]).status_code == 400
        assert client.post("/v1/frames", content=CANARY_IMAGE).status_code == 400
        assert client.post("/v1/frames", content=QUOTED).status_code == 400
        assert client.post(CHAT, json=ask("FAIL AT ONCE")).status_code == 500
        assert "server_error" in client.post(CHAT, json=ask("FAIL LATER", stream=True)).text
        assert client.post(CHAT, json=ask("FAIL LATER")).status_code == 500
    text = log.read_text(encoding="utf-8")
    assert text.count("a question failed: RuntimeError") == 2
    assert text.count("an answer broke off: RuntimeError") == 1
    assert 'stand_in.py", line' in text  # where
    assert find_canaries(text) == []
    assert "canary-tag" not in text


def test_errors_tell_nothing_of_the_inside(tmp_path) -> None:
    with run_stand_in(tmp_path / "log", {}) as (address, _):
        client = httpx.Client(base_url=address)
        for text in ("FAIL AT ONCE", "FAIL LATER"):
            for stream in (False, True):
                reply = client.post(CHAT, json=ask(text, stream=stream)).text
                inside = ("RuntimeError", "Traceback", ".py", "0x", CANARIES["user"], "ultra.serve")
                assert not [word for word in inside if word in reply]
                assert "the answer failed inside the server" in reply
        client.close()
