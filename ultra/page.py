"""A page for a browser: one HTML file with everything inside it."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

NOTICE = "Nothing here is a medical device, or may be used for diagnosis or treatment."

_STYLE = """
body { font: 16px/1.5 "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif;
  max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff; }
h1, h2, h3 { line-height: 1.25; } h2 { margin-top: 2.5rem; }
.notice { border-left: 6px solid #d95f02; background: #fff4ec; padding: .7rem 1rem; }
table { border-collapse: collapse; margin: .8rem 0; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ccc; text-align: left;
  vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.strip { display: flex; flex-wrap: wrap; gap: .8rem; margin: .8rem 0; }
figure { margin: 0; width: 9.5rem; text-align: center; font-size: .85rem; }
figure img { width: 100%; display: block; box-sizing: border-box;
  border: 4px solid transparent; outline: 4px solid transparent; }
figure.valid img { border-color: #1b9e77; }
figure.chosen img { outline-color: #d95f02; }
.wide { max-width: 100%; }
section { margin-bottom: 2rem; }
"""


def build_page(title: str, sections: Iterable[tuple[str, str]], notice: str = NOTICE) -> str:
    """Return a whole HTML page that needs nothing beside itself.

    Args:
        title: plain text.
        sections: (heading in plain text, body in HTML).
        notice: plain text shown before everything else.
    """
    body = "\n".join(
        f"<section>\n<h2>{escape(heading)}</h2>\n{content}\n</section>"
        for heading, content in sections
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f'<p class="notice">{escape(notice)}</p>\n{body}\n</body>\n</html>\n'
    )


def show_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as an HTML table; their columns are those of the first."""
    if not rows:
        return "<p>Nothing to show.</p>"
    head = "".join(f"<th>{escape(str(name))}</th>" for name in rows[0])
    lines = ["<tr>" + "".join(_cell(row.get(name)) for name in rows[0]) + "</tr>" for row in rows]
    return f"<table>\n<tr>{head}</tr>\n" + "\n".join(lines) + "\n</table>"


def data_uri(picture: bytes) -> str:
    """Return a JPEG or PNG as an address that holds the picture itself."""
    kind = "jpeg" if picture.startswith(b"\xff\xd8") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def _cell(value: Any) -> str:
    if value is None:
        return "<td></td>"
    if isinstance(value, float):
        return f'<td class="number">{value:.3f}</td>'
    css = ' class="number"' if isinstance(value, int) else ""
    return f"<td{css}>{escape(str(value))}</td>"
