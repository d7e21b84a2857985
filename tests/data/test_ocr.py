from __future__ import annotations

import numpy as np
import pytest

from tests.data.letters import extent, write
from ultra.config import InputError
from ultra.data import ocr
from ultra.data.frames import Box, area, common
from ultra.data.ocr import Reading, open_reader, read_letters


def covers(box: Box, other: Box) -> bool:
    return area(common(box, other)) > 0.8 * area(other)


@pytest.mark.parametrize("text", ["张建国 男", "ZHANG SAN", "ID:20240317"])
@pytest.mark.parametrize("size", [11, 24])
def test_letters_are_found_where_they_stand(text: str, size: int) -> None:
    page = write(np.full((200, 300), 20, np.uint8), text, (60, 90), size, 200)
    (found,) = [reading for reading in read_letters(page) if reading.is_text]
    assert covers(found.box, (60, 92, 60 + extent(text, size), 90 + size - 2))
    assert found.num_characters >= len(text.replace(" ", "").replace(":", "")) - 1
    assert found.height < 3 * size
    assert found.score > 0.5


def test_a_large_picture_is_read_everywhere() -> None:
    page = np.full((1000, 1500), 20, np.uint8)
    places = [(5, 5), (600, 500), (1350, 3), (1340, 960), (3, 970)]
    for at in places:
        page = write(page, "ZHANG SAN", at, 14, 200)
    found = [reading.box for reading in read_letters(page) if reading.is_text]
    for x, y in places:
        letters = (x + 2, y + 3, x + extent("ZHANG SAN", 14) - 2, y + 13)
        assert any(area(common(box, letters)) > 0.6 * area(letters) for box in found), (x, y)


def test_colours_and_an_empty_picture() -> None:
    page = write(np.full((60, 400), 0, np.uint8), "ZHANG SAN", (60, 20), 16, 255)
    yellow = np.stack([page, page, np.zeros_like(page)], axis=-1)
    assert any(reading.is_text for reading in read_letters(yellow))
    assert read_letters(np.zeros((60, 400), np.uint8)) == []


def test_one_letter_or_an_unsure_one_is_no_text() -> None:
    box = (0, 0, 40, 10)
    assert Reading(box, 2, 0.3).is_text
    assert not Reading(box, 1, 0.9).is_text
    assert not Reading(box, 5, 0.29).is_text
    assert Reading((3, 0, 9, 40), 2, 1.0).height == 6


def test_the_reader_is_there_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_reader("auto") is read_letters
    assert open_reader("require") is read_letters
    assert open_reader("off") is None
    monkeypatch.setattr(ocr, "find_spec", lambda name: None)
    assert open_reader("auto") is None
    with pytest.raises(InputError, match=r"data.ocr: require needs `pip install ultra\[ocr\]`"):
        open_reader("require")


def test_it_is_quiet_and_takes_one_core(capfd: pytest.CaptureFixture[str]) -> None:
    read_letters(write(np.full((100, 200), 20, np.uint8), "LI MING", (30, 40), 14, 200))
    assert capfd.readouterr() == ("", "")
    for part in (ocr._engine().text_det, ocr._engine().text_rec):
        options = part.session.session.get_session_options()
        assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)
