"""The report is one whole page that needs nothing beside itself."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from ultra.evaluate.baselines import count_answers
from ultra.evaluate.predictions import Prediction
from ultra.evaluate.report import (
    NUM_EXPLAINED,
    NUM_SHOWN,
    pick_exams,
    show_by_suite,
    show_exam,
    show_results,
    spread,
    spread_exams,
)
from ultra.evaluate.tables import summarise
from ultra.page import build_page, show_table


class Page(HTMLParser):
    """Collects tags, and fails where they do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def frame(grey: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((24, 32), grey, dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def predict(exam_id: str, question: str, truth: str | None) -> Prediction:
    return Prediction(
        exam_id, "p", "肝脏", "kind", question, "囊肿<b>", truth, 1, (0.1, 0.25, -1.0),
        (True, True, False), 0, 2, (1,), "stop", "0",
    )  # fmt: skip


FRAMES = {"a": (frame(1), frame(2, "JPEG"), frame(3)), "b": (frame(4), frame(5), frame(6))}
PREDICTIONS = [
    predict("a", "病变是什么？", "囊肿"),
    predict("a", "第二问", None),
    predict("c", "?", "否"),
]


def test_the_whole_page() -> None:
    summary = summarise(PREDICTIONS, count_answers({("kind", "?", "否"): 1}))
    exams = pick_exams(PREDICTIONS, FRAMES)
    curves = {"loss": [(1, 2.0), (2, 1.0)]}
    page = Page(build_page("A & B", show_results(summary, exams, curves), "For <tests> only."))
    headings = "".join(page.words)
    assert "A & B" in headings
    assert "For <tests> only." in headings
    assert "medical device" not in headings
    for heading in (
        "Answers", "Facts", "Frame selection", "Intervals", "Answers by task", "Training", "Exams",
    ):  # fmt: skip
        assert heading in page.words
    sources = [attributes["src"] or "" for attributes in page.all("img")]
    assert len(sources) == 1 + 3
    assert all(source.startswith("data:image/") for source in sources)
    assert not page.all("script")
    assert not page.all("link")


def test_other_models_languages_and_modalities() -> None:
    known = PREDICTIONS[::2]
    english = [replace(p, language="en", modality="CT") for p in known]
    others = {"gpt-4v": [replace(p, answer="囊肿", scores=None, chosen=None) for p in english]}
    summary = summarise(english, None, None, 20, others)
    sections = dict(show_results(summary, [], {}, "char"))
    assert "`char`: a token is a Chinese character" in sections["Answers"]
    for heading in ("Answers", "Differences", "Answers by language", "Answers by modality"):
        assert "gpt-4v" in Page(sections[heading]).words, heading
    assert "en" in Page(sections["Answers by language"]).words
    assert "CT" in Page(sections["Answers by modality"]).words
    assert "Differences" not in dict(show_results(summarise(english, None), [], {}))


def test_a_model_that_chooses_no_frame_has_no_scores_to_show() -> None:
    (exam,) = pick_exams([replace(PREDICTIONS[0], scores=None, chosen=None)], FRAMES)
    page = Page(show_exam(exam))
    assert "frame 1 · valid" in page.words
    assert [f["class"] for f in page.all("figure")] == ["valid", "valid", ""]


def test_says_what_it_is_not() -> None:
    assert "Nothing here is a medical device" in build_page("t", [])


def test_an_exam_shows_what_its_answer_rests_on() -> None:
    first, second = PREDICTIONS[:2]
    (exam,) = pick_exams([first, replace(second, picture=FRAMES["b"][0])], FRAMES)
    page = Page(show_exam(exam))
    last = page.all("img")[-1]
    assert len(page.all("img")) == 4
    assert base64.b64decode((last["src"] or "").partition(",")[2]) == FRAMES["b"][0]
    assert last["alt"] == "What the answer to “第二问” rests on"
    assert last["alt"] in page.words


def test_an_exam_shows_its_frames_and_every_answer() -> None:
    (exam,) = pick_exams(PREDICTIONS, FRAMES)
    page = Page(show_exam(exam))
    assert [f["class"] for f in page.all("figure")] == ["valid", "chosen valid", ""]
    kinds = [(i["src"] or "").partition(";")[0] for i in page.all("img")]
    assert kinds == ["data:image/png", "data:image/jpeg", "data:image/png"]
    encoded = (page.all("img")[1]["src"] or "").partition(",")[2]
    assert base64.b64decode(encoded) == FRAMES["a"][1]
    for word in ("病变是什么？", "第二问", "囊肿<b>", "囊肿", "(unknown)"):
        assert word in page.words
    assert "frame 1 · score 0.25 · chosen · valid" in page.words
    assert "frame 2 · score -1.00" in page.words


def test_tables() -> None:
    page = Page(show_table([{"row": "model", "n": 3, "em": 0.5, "closed": None}]))
    assert [w for w in page.words if w.strip()] == [
        "row",
        "n",
        "em",
        "closed",
        "model",
        "3",
        "0.500",
    ]
    assert show_table([]) == "<p>Nothing to show.</p>"


def test_a_table_for_each_suite() -> None:
    rows = [{"row": "model", "strict/em": 0.5, "llava_med/em-char": 0.25, "strict/f1-char": 0.75}]
    page = Page(show_by_suite(rows))
    assert len(page.all("table")) == 2
    words = [word for word in page.words if word.strip()]
    assert words[:6] == ["row", "strict/em", "strict/f1-char", "model", "0.500", "0.750"]
    assert words[6:] == ["row", "llava_med/em-char", "model", "0.250"]
    assert show_by_suite([]) == "<p>Nothing to show.</p>"


def test_shown_exams_are_spread_over_all() -> None:
    predictions = [predict(name, "?", None) for name in "hgfedcba"]
    assert spread_exams(predictions, 4) == {"a", "c", "e", "g"}
    assert spread_exams(predictions, 20) == set("abcdefgh")
    assert spread_exams([], 4) == set()


@pytest.mark.parametrize("num_exams", [1, 2, 3, 7, 12, 110])
def test_the_explained_exams_are_among_the_shown(num_exams: int) -> None:
    names = [f"{i:03}" for i in range(num_exams)]
    assert spread(names, NUM_EXPLAINED) <= spread(names, NUM_SHOWN)
    assert len(spread(names, NUM_EXPLAINED)) == min(num_exams, NUM_EXPLAINED)
