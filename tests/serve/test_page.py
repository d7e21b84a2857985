"""The page in a real browser, headless Chromium, before a stand-in for the model."""

from __future__ import annotations

import asyncio
import io
import os
import re
import shutil
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright
from pydicom.data import get_testdata_file
from starlette.testclient import TestClient

from tests.conftest import free_port
from tests.serve.questions import FRAMES, encode_image
from ultra.serve.endpoint import create_app
from ultra.serve.events import Delta, Event, Opening, Question
from ultra.serve.limits import Limits
from ultra.serve.page import FILES
from ultra.serve.security import ApiKeys, digest_key

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
TIMEOUT_MS = 120_000
PIECES = ("肝右叶", "见无回声区", "。")
REPLICAS = {"encoder": "enc1", "language": "lang2"}


class Scripted:
    """Answers in PIECES, pausing after the first one where `paused`."""

    def __init__(self) -> None:
        self.asked: list[Question] = []
        self.paused = False
        self.breaks = False
        self.closed = 0

    async def answer(self, question: Question) -> AsyncGenerator[Event, None]:
        self.asked.append(question)
        scores = tuple(0.5 * (i == 1) - i / 8 for i in range(len(question.frames)))
        try:
            yield Opening(scores.index(max(scores)), scores, 9, REPLICAS)
            for number, piece in enumerate(PIECES, 1):
                yield Delta(piece, number)
                if self.breaks:
                    raise RuntimeError("secret")
                while self.paused:
                    await asyncio.sleep(0.01)
            yield Delta("", len(PIECES) + 1, "stop")
        finally:
            self.closed += 1

    async def ready(self) -> bool:
        return True


class Watched:
    """A page, the scripted model behind it, and what the browser complained of or asked for."""

    def __init__(self, page: Page, backend: Scripted, url: str) -> None:
        self.page, self.backend, self.url = page, backend, url
        self.errors: list[str] = []
        self.requests: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", self._hear)
        page.on("request", lambda request: self.requests.append(request.url))
        # Heard from the start: a chooser that opens before Playwright listens is lost.
        page.on("filechooser", lambda chooser: None)
        page.goto(url)

    def _hear(self, message) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def choose(self, **files: bytes) -> None:
        payloads = [
            {"name": name.replace("_", "."), "mimeType": "", "buffer": data}
            for name, data in files.items()
        ]
        self.page.set_input_files("#files", payloads)
        expect(self.page.locator("body.reading")).to_have_count(0)

    def ask(self, text: str) -> None:
        self.page.fill("#question", text)
        self.page.press("#question", "Enter")

    def frame(self, number: int):
        return self.page.locator(".frame").nth(number - 1)

    def last(self, part: str):
        return self.page.locator(f"#talk > li:last-child .{part}")


def find_browser() -> str:
    named = os.environ.get("CHROMIUM")
    found = named or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        message = "no Chromium: `make browser` installs Debian's, CHROMIUM names any other"
        if os.environ.get("CI") and not os.environ.get("NO_BROWSER"):
            pytest.fail(message)
        pytest.skip(message)
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = find_browser()
    expect.set_options(timeout=TIMEOUT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@contextmanager
def serving(backend: Scripted, *keys: str) -> Iterator[str]:
    limits = Limits(models={"m": ""}, max_frames=4, max_image_mib=1)
    port = free_port()
    config = uvicorn.Config(
        create_app(backend, limits, ApiKeys(list(map(digest_key, keys)))),
        port=port,
        log_level="error",
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def opened(browser: Browser, *keys: str, **options) -> Iterator[Watched]:
    backend = Scripted()
    with serving(backend, *keys) as url:
        context = browser.new_context(**{"locale": "zh-CN", **options})
        context.set_default_timeout(TIMEOUT_MS)
        watched = Watched(context.new_page(), backend, url)
        try:
            yield watched
        finally:
            backend.paused = False
            context.close()
    assert {r for r in watched.requests if not r.startswith((url, "data:"))} == set()


@pytest.fixture
def watched(browser) -> Iterator[Watched]:
    with opened(browser) as watched:
        yield watched
    assert watched.errors == []


def wait_until(condition) -> None:
    deadline = time.monotonic() + TIMEOUT_MS / 1000
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Files


def test_its_files_are_open_and_strict_and_nothing_else_is() -> None:
    app = create_app(Scripted(), Limits(), ApiKeys([digest_key("key")]))
    client = TestClient(app)
    for path, (_, media_type) in FILES.items():
        response = client.get(path)
        assert response.status_code == 200
        assert response.headers["content-type"].startswith(media_type)
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["cache-control"] == "no-cache"
        known = {"If-None-Match": response.headers["etag"]}
        assert client.get(path, headers=known).status_code == 304
        assert client.post(path).status_code == 405
    for path in ("/index.html", "/page", "/page/page.js", "/page.py", "/%2e%2e/api.py"):
        assert client.get(path).status_code == 404


def test_its_files_name_no_address() -> None:
    folder = Path(__file__).parents[2] / "ultra" / "serve" / "page"
    assert {p.name for p in folder.iterdir()} == {name for name, _ in FILES.values()}
    for path in folder.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//[a-z]+\.|@import|innerHTML|eval\(", text), path.name


def test_both_languages_say_the_same_things() -> None:
    script = (Path(__file__).parents[2] / "ultra/serve/page/page.js").read_text(encoding="utf-8")
    chinese, english = re.findall(r"^  (?:zh|en): \{\n(.*?)^  \},", script, re.M | re.S)
    names = [re.findall(r"^    (\w+):", words, re.M) for words in (chinese, english)]
    assert names[0] == names[1]
    assert len(names[0]) > 40
    page = (Path(__file__).parents[2] / "ultra/serve/page/index.html").read_text(encoding="utf-8")
    assert set(re.findall(r'data-(?:text|label|hint)="(\w+)"', page)) <= set(names[0])
    assert set(re.findall(r"\b(?:w|words)\.(\w+)", script)) <= set(names[0])


# What people do


def test_an_exam_is_asked_about(watched) -> None:
    page, backend = watched.page, watched.backend
    watched.choose(**{"10_png": FRAMES[2], "2_jpg": FRAMES[1], "1_png": FRAMES[0]})
    expect(page.locator(".frame")).to_have_count(3)
    backend.paused = True
    page.get_by_role("button", name="病变是什么？").click()
    expect(watched.last("answer")).to_have_text(PIECES[0])  # as it comes
    expect(page.get_by_role("button", name="停止")).to_be_visible()
    expect(page.locator("#talk > li")).to_have_attribute("aria-busy", "true")
    backend.paused = False
    expect(watched.last("answer")).to_have_text("".join(PIECES))
    expect(page.get_by_role("button", name="提问", exact=True)).to_be_visible()
    assert backend.asked[0].frames == FRAMES  # by number, and byte for byte
    assert [turn.content for turn in backend.asked[0].turns] == ["病变是什么？"]

    expect(watched.frame(2)).to_have_class("frame chosen")
    expect(watched.frame(2)).to_have_accessible_name(
        "第 2 帧，共 3 帧 · 被选中 · 得分 0.38，份额 45%"
    )
    outline = "image => getComputedStyle(image).boxShadow"
    shadows = [watched.frame(n).locator("img").evaluate(outline) for n in (1, 2, 3)]
    assert "240, 160, 48" in shadows[1]
    assert "240, 160, 48" not in shadows[0] + shadows[2]
    expect(page.locator("#viewer")).to_have_class("chosen")
    fills = [watched.frame(n).locator(".fill").bounding_box() for n in (1, 2, 3)]
    widths = [fill["width"] for fill in fills]
    assert widths[1] > widths[0] > widths[2] > 0
    facts = watched.last("facts")
    for known in ("首字", "共", "4 个词元（提示 9）", "编码副本 enc1", "语言副本 lang2"):
        expect(facts).to_contain_text(known)

    watched.ask("大小？")
    expect(page.locator("#talk > li")).to_have_count(2)
    expect(watched.last("answer")).to_have_text("".join(PIECES))
    follow_up = backend.asked[1]
    assert [turn.role for turn in follow_up.turns] == ["user", "assistant", "user"]
    assert follow_up.frames == FRAMES


def test_frames_are_dropped_and_the_rest_is_told_off(watched) -> None:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(FRAMES[0])).convert("RGB").save(buffer, "WEBP", lossless=True)
    files = {
        "a.webp": buffer.getvalue(),
        "b.png": FRAMES[2],
        "c.txt": b"text",
        "d.jpg": FRAMES[1][:60],
    }
    watched.page.evaluate(
        """files => {
            const transfer = new DataTransfer();
            for (const [name, bytes] of Object.entries(files))
                transfer.items.add(new File([new Uint8Array(bytes)], name));
            document.body.dispatchEvent(
                new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true}));
        }""",
        {name: list(data) for name, data in files.items()},
    )
    expect(watched.page.locator(".frame")).to_have_count(2)
    expect(watched.page.get_by_role("alert").first).to_have_text(
        "c.txt：不是 JPEG、PNG、WebP 或 DICOM\nd.jpg：无法读取"
    )
    watched.ask("见囊肿？")
    expect(watched.last("answer")).to_have_text("".join(PIECES))
    webp, png = watched.backend.asked[0].frames
    assert png == FRAMES[2]
    arrived = np.asarray(Image.open(io.BytesIO(webp)).convert("L"))
    assert np.array_equal(arrived, np.asarray(Image.open(io.BytesIO(FRAMES[0]))))


def test_no_question_goes_out_while_frames_are_read(watched) -> None:
    page = watched.page
    held = []
    page.route("**/v1/models", lambda route: held.append(route))  # which the page asks for first
    page.set_input_files("#files", {"name": "a.png", "mimeType": "", "buffer": FRAMES[0]})
    expect(page.get_by_role("button", name="正在读取")).to_be_disabled()
    expect(page.locator("#send")).to_be_disabled()
    watched.ask("见囊肿？")
    expect(page.locator("#question")).to_have_value("见囊肿？")
    expect(page.locator("#trouble")).to_be_hidden()
    wait_until(lambda: page.evaluate("1") and held)
    held[0].continue_()
    expect(page.locator("#send")).to_be_enabled()
    page.press("#question", "Enter")
    expect(watched.last("answer")).to_have_text("".join(PIECES))
    assert len(watched.backend.asked) == 1


def test_by_keyboard_alone(watched) -> None:
    page, backend = watched.page, watched.backend
    keys = page.keyboard
    for _ in range(3):  # key, language, drop zone
        keys.press("Tab")
    expect(page.locator("#drop")).to_be_focused()
    with page.expect_file_chooser() as chooser:
        keys.press("Enter")
    chooser.value.set_files(
        [{"name": f"{n}.png", "mimeType": "image/png", "buffer": encode_image(n)} for n in range(3)]
    )
    expect(page.locator("#question")).to_be_focused()
    keys.type("左叶")
    keys.press("Shift+Enter")
    keys.type("见囊肿？")
    backend.paused = True
    keys.press("Enter")
    expect(watched.last("answer")).to_have_text(PIECES[0])
    keys.press("Escape")
    expect(watched.last("facts")).to_contain_text("已停止")
    wait_until(lambda: backend.closed == 1)
    assert backend.asked[0].turns[0].content == "左叶\n见囊肿？"
    backend.paused = False

    while page.evaluate("document.activeElement.className") != "frame chosen":
        keys.press("Shift+Tab")
    keys.press("ArrowRight")
    expect(watched.frame(3)).to_be_focused()
    expect(page.locator("#caption")).to_contain_text("第 3 帧")
    keys.press("Delete")
    expect(page.locator(".frame")).to_have_count(2)
    expect(watched.frame(2)).to_be_focused()
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    watched.ask("再问")  # another exam now, so nothing of what was said goes along
    expect(watched.last("answer")).to_have_text("".join(PIECES))
    assert len(backend.asked[1].turns) == 1
    assert len(backend.asked[1].frames) == 2


def test_it_speaks_the_reader_s_language_and_the_other(browser) -> None:
    with opened(browser, locale="en-US") as watched:
        page = watched.page
        expect(page.locator("html")).to_have_attribute("lang", "en")
        expect(page.get_by_role("note")).to_contain_text("not a medical device")
        watched.ask("见囊肿？")
        expect(page.get_by_role("alert")).to_have_text("Add the frames of an exam first.")
        page.get_by_role("button", name="中文").click()
        expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
        expect(page.get_by_role("note")).to_contain_text("不是医疗器械")
        expect(page.get_by_role("alert")).to_have_text("请先放入检查的帧。")
        page.reload()
        expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
        assert "undefined" not in page.content()
        assert watched.errors == []


def test_without_the_key_nothing_is_answered(browser) -> None:
    with opened(browser, "right") as watched:
        page = watched.page
        watched.choose(a_png=FRAMES[0])
        alert = page.locator("#trouble")
        expect(alert).to_have_text("需要有效的 API 密钥。\nthis endpoint needs a valid API key")
        expect(page.locator(".frame")).to_have_count(1)
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        expect(page.locator("#access-state")).to_have_text("✗ 无效")
        watched.ask("见囊肿？")
        expect(watched.last("trouble")).to_contain_text("this endpoint needs a valid API key")
        expect(page.locator("#question")).to_have_value("见囊肿？")
        assert watched.backend.asked == []
        page.fill("#key", "right")
        page.press("#key", "Enter")
        expect(page.locator("#access-state")).to_have_text("✓ 有效")
        expect(alert).to_be_hidden()
        page.press("#question", "Enter")
        expect(watched.last("answer")).to_have_text("".join(PIECES))
        assert page.evaluate("localStorage.length") == 0
        assert not any("right" in request for request in watched.requests)
        assert page.context.cookies() == []
        # The browser's own lines about refused requests.
        assert {re.sub(r".*status of ", "", error) for error in watched.errors} == {
            "401 (Unauthorized)"
        }


def test_an_answer_that_breaks_off_says_so(watched) -> None:
    watched.choose(a_png=FRAMES[0])
    watched.backend.breaks = True
    watched.ask("见囊肿？")
    expect(watched.last("trouble")).to_have_text(
        "服务出错，回答未完成。\nthe answer failed inside the server"
    )
    expect(watched.last("answer")).to_have_text(PIECES[0])


def test_a_cine_is_opened_by_the_endpoint(browser) -> None:
    cine, refused = (
        get_testdata_file(f"{name}.dcm", download=False)
        for name in ("color3d_jpeg_baseline", "examples_ybr_color")
    )
    with opened(browser) as watched:
        watched.page.set_input_files("#files", [cine, refused])
        expect(watched.page.locator(".frame")).to_have_count(4)
        expect(watched.page.locator("#caption")).to_contain_text("color3d_jpeg_baseline.dcm#0")
        expect(watched.page.locator("#caption")).to_contain_text("over time found text, masked")
        expect(watched.page.locator("#trouble")).to_contain_text(
            "examples_ybr_color.dcm: 请求被拒绝"
        )
        watched.ask("见囊肿？")
        expect(watched.last("answer")).to_have_text("".join(PIECES))
        sizes = {Image.open(io.BytesIO(f)).size for f in watched.backend.asked[0].frames}
        assert sizes == {(512, 384)}  # cropped


@pytest.mark.parametrize("size", [(320, 640), (390, 844), (1280, 720)])
def test_it_fits_the_screen(browser, size) -> None:
    width, height = size
    with opened(browser, viewport={"width": width, "height": height}) as watched:
        watched.choose(**{f"{n}_png": FRAMES[n % 3] for n in range(4)})
        watched.ask("见囊肿？" * 20)
        expect(watched.last("answer")).to_have_text("".join(PIECES))
        assert watched.page.evaluate("document.documentElement.scrollWidth") <= width
        assert watched.errors == []
