"""What can be said and chosen without a model."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from ultra.evaluate.baselines import count_answers, find_blobs


def test_the_most_frequent_answers() -> None:
    blind = count_answers(
        {
            ("kind", "是什么？", "囊肿"): 3,
            ("kind", "是什么？", "结石"): 2,
            ("kind", "考虑什么？", "结石"): 2,
            ("side", "哪一侧？", "右侧"): 1,
            ("side", "哪一侧？", "左侧"): 1,
        }
    )
    assert blind.constant("kind") == "结石"  # 4 of 7
    assert blind.question_only("kind", "是什么？") == "囊肿"  # 3 of 5 with these words
    assert blind.question_only("kind", "never asked") == "结石"
    assert blind.constant("side") == min("右侧", "左侧")  # equally frequent: the same every time
    assert blind.constant("never trained") == ""


def picture(blob: int | None) -> bytes:
    pixels = np.full((96, 128), 90, dtype=np.uint8)
    rows, columns = np.ogrid[:96, :128]
    if blob is not None:
        pixels[np.hypot(rows - 40, columns - 60) < 9] = blob
    pixels[:, :10] = 0  # outside the sector: black, and no blob
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_blobs() -> None:
    frames = [picture(None), picture(200), picture(110), picture(10), picture(60)]
    assert find_blobs(frames) == (1, 3)
    assert find_blobs([picture(None)]) == (0, 0)
