from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.exam_folders import picture
from tests.data.importers.importing import import_set
from ultra.data.importers.entry import patient_key

V1 = "Figure_path,Question,{},Choice A,Choice B,Choice C,Choice D,Answer_label\n"
V2 = "index,Figure_path,Caption,Question,Choice A,Choice B,Choice C,Choice D,Answer,split\n"
CHOICES = " A:Liver , B:Spleen , C:Kidney , D:Both: a and b "
IMAGES = {f"PMC{i}_Fig{i}_1.jpg": picture(i) for i in (1, 2, 3)}


@pytest.mark.parametrize("spelling", ["Anwser", "Answer"])
def test_version_1_in_both_spellings(tmp_path: Path, spelling: str) -> None:
    train = V1.format(spelling) + (
        f'PMC1_Fig1_1.jpg,"Which organ, then?",Spleen,{CHOICES},B\n'
        f"PMC1_Fig1_1.jpg,Which one?,A:Liver,{CHOICES},A\n"
        f"PMC2_Fig2_1.jpg,Which one?,D,{CHOICES},D\n"
        f"PMC2_Fig2_1.jpg,Which one?,Heart,{CHOICES},D\n"
        f"PMC9_Fig2_1.jpg,Which one?,B,{CHOICES},B\n"
    )
    test = V1.format(spelling) + f"PMC3_Fig3_1.jpg,Which one?,C,{CHOICES},C\n"
    files = {"train.csv": train.encode(), "test.csv": test.encode(), **IMAGES}
    found = import_set(tmp_path, "pmc-vqa", "", files)
    assert (found.counts.exams, found.counts.frames, found.counts.quarantined) == (4, 4, 2)
    assert found.counts.splits == {"test": 1, "train": 3}
    assert [reason for _, reason in found.reasons] == [
        "bad conversation: the answer is none of the choices",
        "missing file: PMC9_Fig2_1.jpg",
    ]
    exam = found.exams["PMC1_Fig1_1.jpg train.csv line 2"]
    (asked,) = exam.conversations
    assert asked.turns[0].content == (
        "Which organ, then?\nA: Liver\nB: Spleen\nC: Kidney\nD: Both: a and b"
    )
    assert [e.conversations[0].turns[1].content for e in found.exams.values()] == [
        "Kidney", "Spleen", "Liver", "Both: a and b",
    ]  # fmt: skip
    assert (asked.closed, asked.language, asked.task) == (True, "en", "choice")
    assert exam.modality == "OT"
    assert exam.patient_key == patient_key("PMC1", "key")


def test_version_2_with_caption_and_split(tmp_path: Path) -> None:
    rows = V2 + (
        f"0,PMC1_Fig1_1.jpg,A caption,Which?,{CHOICES},Kidney,train\n"
        f"1,PMC2_Fig2_1.jpg,Another,Which?,{CHOICES},B,test\n"
        f"1,PMC2_Fig2_1.jpg,Another,Which?,{CHOICES},B,test\n"
    )
    files = {"set.csv": b"\xef\xbb\xbf" + rows.encode(), **IMAGES}
    found = import_set(tmp_path, "pmc-vqa", "set.csv", files)
    assert found.counts.splits == {"test": 1, "train": 1}
    assert found.reasons == [
        ("PMC2_Fig2_1.jpg 1", "duplicate exam_id: also at set.csv line 3"),
    ]
    assert found.exams["PMC1_Fig1_1.jpg 0"].findings == "A caption"
    assert found.exams["PMC2_Fig2_1.jpg 1"].conversations[0].turns[1].content == "Spleen"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (f"PMC1_Fig1_1.jpg,,Spleen,{CHOICES},B", "wrong values: Question: "),
        (f"PMC1_Fig1_1.jpg,Which?,,{CHOICES},B", "wrong values: Anwser: "),
        ("PMC1_Fig1_1.jpg,Which?,A,B", "malformed row: not as many columns"),
        (f"../PMC1_Fig1_1.jpg,Which?,A,{CHOICES},A", "path outside the folder: "),
        (f'PMC1_Fig1_1.jpg,"Which?,A,{CHOICES},A', "malformed row: unexpected end of data"),
        (f"PMC1_Fig1_1.jpg,\0,A,{CHOICES},A", "wrong values: Question: control characters"),
    ],
)
def test_a_bad_row_says_what_is_wrong(tmp_path: Path, row: str, reason: str) -> None:
    text = V1.format("Anwser") + f"PMC2_Fig2_1.jpg,Which?,A,{CHOICES},A\n" + row
    found = import_set(tmp_path, "pmc-vqa", "train.csv", {"train.csv": text.encode(), **IMAGES})
    ((_, why),) = found.reasons
    assert why.startswith(reason)
    assert len(found.exams) == 1


def test_a_table_of_other_columns_lacks_its_own(tmp_path: Path) -> None:
    found = import_set(tmp_path, "pmc-vqa", "t.csv", {"t.csv": b"a,b\n1,2\n"})
    ((_, why),) = found.reasons
    assert why.startswith("missing keys: Figure_path, Question, Answer, Choice A")
