"""Letters for tests to write into frames, the Chinese ones from a sheet that stands beside this.

    python -m tests.data.letters FONT   # draws the sheet anew, with a font that has the characters

The sheet was drawn with Noto Sans CJK (SIL Open Font License 1.1), so that a machine without a
Chinese font draws what every other draws.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SHEET = Path(__file__).with_name("letters.png")
CHARACTERS = (
    "张王李赵陈刘杨黄周吴徐孙马朱胡郭何高林罗郑梁谢宋唐许韩冯邓曹彭曾萧田董袁潘蔡蒋余叶杜程魏"
    "建国伟芳秀英娜敏静丽强磊军洋勇艳杰娟涛明超兰霞平刚桂华玉梅红云飞鑫波斌宇浩凯健俊帆帅旭宁龙"
    "雪荣淑珍琴颖雷萍北京协和医院上海市第一人民男女岁姓名号床科室检查日期年月"
)
SIDE = 40


def write(pixels: np.ndarray, text: str, at: tuple[int, int], size: int, level: int) -> np.ndarray:
    """Return a copy of (H, W) grey with a line of text, `size` pixels high, from `at` on."""
    height, width = pixels.shape
    x, y = at
    cover = np.zeros((height, width))
    for character in text:
        glyph = _glyph(character, size)
        rows, columns = min(glyph.shape[0], height - y), min(glyph.shape[1], width - x)
        assert rows > 0, text
        assert columns > 0, text
        cover[y : y + rows, x : x + columns] = glyph[:rows, :columns]
        x += glyph.shape[1]
    return (pixels * (1 - cover) + level * cover).round().astype(np.uint8)


def extent(text: str, size: int) -> int:
    """Return how many pixels wide a line of text is."""
    return sum(_glyph(character, size).shape[1] for character in text)


@cache
def _glyph(character: str, size: int) -> np.ndarray:
    """Return (size, w) from 0 to 1."""
    if ord(character) < 128:
        font = ImageFont.load_default(size)
        image = Image.new("L", (max(1, round(font.getlength(character))), size + size // 4))
        ImageDraw.Draw(image).text((0, 0), character, fill=255, font=font)
        return np.asarray(image) / 255
    place = CHARACTERS.index(character)
    cell = _sheet().crop((place * SIDE, 0, (place + 1) * SIDE, SIDE))
    return np.asarray(cell.resize((size, size), Image.Resampling.LANCZOS)) / 255


@cache
def _sheet() -> Image.Image:
    return Image.open(SHEET).convert("L")


def _draw_sheet(font: str) -> None:
    sheet = Image.new("L", (SIDE * len(CHARACTERS), SIDE))
    face = ImageFont.truetype(font, SIDE - 2)
    for place, character in enumerate(CHARACTERS):
        ImageDraw.Draw(sheet).text(
            (place * SIDE + SIDE // 2, SIDE // 2), character, fill=255, font=face, anchor="mm"
        )
    sheet.quantize(16).save(SHEET, optimize=True)


if __name__ == "__main__":
    _draw_sheet(sys.argv[1])
