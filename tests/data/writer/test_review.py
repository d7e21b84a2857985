from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from ultra.config import InputError
from ultra.data.writer.review import (
    COLUMNS,
    Decision,
    in_share,
    read_decisions,
    write_sheet,
)


def row(digest: str, number: int = 1, **changes: str) -> dict[str, str]:
    return {
        "exam_id": "e", "digest": digest, "round": str(number), "task": "kind",
        "source": "肝囊肿。", "question": "是什么？", "answer": "囊肿", "check": "", **changes,
    }  # fmt: skip


def read(uri: str) -> list[dict[str, str]]:
    text = Path(uri).read_bytes().decode("utf-8-sig")
    return list(csv.DictReader(io.StringIO(text, newline="")))


def decide(uri: str, *decisions: tuple[str, str], encoding: str = "utf-8-sig") -> None:
    """Fill in the sheet row by row, as a spreadsheet saves it."""
    rows = read(uri)
    for target, (decision, edited) in zip(rows, decisions, strict=False):
        target |= {"decision": decision, "edited": edited}
    with Path(uri).open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def test_a_spreadsheet_opens_it(tmp_path: Path) -> None:
    uri = str(tmp_path / "sheet.csv")
    long = row("b", source='第一行\n第二行，有逗号和"引号"')
    assert write_sheet(uri, [row("a"), long]) == 2
    assert Path(uri).read_bytes().startswith(b"\xef\xbb\xbfexam_id,digest,round")
    assert [r["source"] for r in read(uri)] == ["肝囊肿。", long["source"]]
    assert list(read(uri)[0]) == list(COLUMNS)
    assert read_decisions(uri) == {}
    assert read_decisions("") == read_decisions(str(tmp_path / "none.csv")) == {}


def test_no_cell_is_a_formula_and_texts_come_back_as_they_were(tmp_path: Path) -> None:
    uri = str(tmp_path / "sheet.csv")
    texts = ["=1+1", "+8", "-5mm", "@SUM(A1)", "\tx", "＝1", "'quoted'", "12mm"]
    write_sheet(uri, [row(str(n), answer=text) for n, text in enumerate(texts)])
    cells = [r["answer"] for r in read(uri)]
    assert not any(cell.startswith(("=", "+", "-", "@", "\t", "＝")) for cell in cells)
    decide(uri, *[("edit", f"'{text}" if n < 6 else text) for n, text in enumerate(texts)])
    assert [d.edits[1] for d in read_decisions(uri).values()] == texts


def test_decisions_are_read_by_conversation(tmp_path: Path) -> None:
    uri = str(tmp_path / "sheet.csv")
    rounds = [row("a"), row("b"), row("c"), row("d", 1), row("d", 2), row("e", 1), row("e", 2)]
    write_sheet(uri, rounds)
    decide(
        uri, ("Accept ", ""), ("edit", "肝囊肿"), ("", ""), ("accept", ""), ("edit", "右叶"),
        ("discard", ""), ("accept", ""),
    )  # fmt: skip
    assert read_decisions(uri) == {
        "a": Decision("accept"),
        "b": Decision("edit", {1: "肝囊肿"}),
        "d": Decision("edit", {2: "右叶"}),
        "e": Decision("discard"),
    }


def test_a_sheet_saved_by_a_chinese_spreadsheet_is_read(tmp_path: Path) -> None:
    uri = str(tmp_path / "sheet.csv")
    write_sheet(uri, [row("a")])
    decide(uri, ("edit", "肝右叶囊肿"), encoding="gb18030")
    assert read_decisions(uri) == {"a": Decision("edit", {1: "肝右叶囊肿"})}


def test_what_is_decided_stays_as_it_stands(tmp_path: Path) -> None:
    uri = str(tmp_path / "sheet.csv")
    write_sheet(uri, [row("a"), row("b"), row("c")])
    decide(uri, ("discard", ""), ("edit", "新"), ("", ""))
    assert write_sheet(uri, [row("n"), row("b", answer="other"), row("c", answer="other")]) == 4
    found = [(r["digest"], r["answer"], r["decision"], r["edited"]) for r in read(uri)]
    assert found == [
        ("n", "囊肿", "", ""),
        ("b", "囊肿", "edit", "新"),
        ("c", "other", "", ""),
        ("a", "囊肿", "discard", ""),
    ]


@pytest.mark.parametrize(
    ("decision", "message"),
    [
        (("maybe", ""), "row 3: decision 'maybe'; allowed: accept, edit, discard, or empty"),
        (("edit", " "), "row 3: decision edit without a text"),
    ],
)
def test_a_decision_that_cannot_be_read_names_its_row(
    tmp_path: Path, decision: tuple[str, str], message: str
) -> None:
    uri = str(tmp_path / "sheet.csv")
    write_sheet(uri, [row("a", source="两\n行"), row("b")])
    decide(uri, ("accept", ""), decision)
    before = Path(uri).read_bytes()
    with pytest.raises(InputError, match=message):
        read_decisions(uri)
    with pytest.raises(InputError, match=message):
        write_sheet(uri, [])
    assert Path(uri).read_bytes() == before


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "sheet.csv").write_text("exam_id;digest\n", encoding="utf-8")
    with pytest.raises(InputError, match="no column exam_id, digest, round"):
        read_decisions(str(tmp_path / "sheet.csv"))


def test_a_share_is_always_the_same_one() -> None:
    digests = [f"{n * 2654435761 % 2**32:08x}ffff" for n in range(2000)]
    half = [d for d in digests if in_share(d, 0.5)]
    assert len(half) == pytest.approx(1000, abs=70)
    assert {d for d in digests if in_share(d, 0.2)} < set(half)
    assert all(in_share(d, 1) for d in digests)
    assert not any(in_share(d, 0) for d in digests)
