from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.exam_folders import picture
from tests.data.importers.importing import import_set, json_list
from ultra.data.importers.entry import patient_key

IMAGES = {f"{name}.jpeg": picture(i) for i, name in enumerate(["7_1", "7_2", "8_1", "9_1"])}


def report(uid: Any, paths: Any, **changes: Any) -> dict[str, Any]:
    return {
        "uid": uid,
        "finding": f"肝囊肿_2DS_mm {uid}",
        "image_path": paths,
        "labels": 2,
        **changes,
    }


ROWS = [
    report(7, ["7_1.jpeg", "7_2.jpeg"], split="train"),
    report(8, ["8_1.jpeg"], split="val", site="肝", diagnosis="囊肿", patient_id="P"),
    report(9, "9_1.jpeg", split="test"),
    report(10, ["gone.jpeg"], split="train"),
    report(11, [], split="train"),
    report(12, ["7_1.jpeg"], finding="  "),
    report(13, ["7_1.jpeg"], split="other"),
    report(7, ["8_1.jpeg"]),
    {"uid": 14, "image_path": ["7_1.jpeg"]},
    report(None, ["../7_1.jpeg"]),
    "text",
]


@pytest.mark.parametrize("layout", ["list", "by split"])
def test_a_set_with_a_byte_order_mark(tmp_path: Path, layout: str) -> None:
    rows = ROWS if layout == "list" else {"train": ROWS[:1], "val": [], "test": ROWS[1:]}
    files = {"reports.json": json_list(rows, "\ufeff"), **IMAGES}
    found = import_set(tmp_path, "report-json", "reports.json", files)
    counts = found.counts
    assert (counts.exams, counts.frames, counts.quarantined) == (3, 4, 8)
    assert counts.splits == {"test": 1, "train": 1, "validation": 1}
    first, second, third = found.exams.values()
    assert (first.exam_id, first.findings, first.split) == ("7", "肝囊肿_2DS_mm 7", "train")
    assert first.frame_sizes == ((48, 32), (48, 32))
    assert first.patient_key == patient_key("exam 7", "key")
    assert first.conversations == ()
    assert (second.site, second.diagnosis, second.split) == ("肝", "囊肿", "validation")
    assert second.patient_key == patient_key("P", "key")
    assert (third.exam_id, third.split, third.modality) == ("9", "test", "US")
    assert [(name, reason.split(";")[0]) for name, reason in found.reasons] == [
        ("10", "missing file: gone.jpeg"),
        ("11", "no frames: the list is empty"),
        ("12", "empty report: neither findings nor diagnosis"),
        (
            "13",
            "wrong values: split: input should be 'train', 'val', 'valid', 'validation' or 'test'",
        ),
        ("7", "duplicate exam_id: also at reports.json item 1"),
        ("14", "missing keys: finding"),
        ("reports.json item 10", "wrong values: uid: input should be a valid string"),
        ("reports.json item 11", "malformed line: not a JSON object"),
    ]
    assert (counts.missing_files, counts.first_missing) == (1, ("gone.jpeg",))
