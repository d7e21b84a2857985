"""What `prepare` does with every ultrasound file of pydicom and pydicom-data, and why.

    python -m benchmarks.real_dicom

Each file goes through the import of DICOM files with letters read (ultra[ocr]), and without. The
table stands in benchmarks/results/real_dicom.md.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydicom

from benchmarks.stand import RESULTS, write_result
from ultra.data.dicom import read_dicom
from ultra.data.ocr import Reader, open_reader

FRAMES = 16
"""Kept of a cine."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a file: frames let in, or the reason why none was; and what shows it."""

    frames: int
    said: str


def main() -> None:
    """Run the benchmark."""
    rows = [describe(path) for path in sorted(ultrasound_files(), key=lambda path: path.name)]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "real_dicom.md").write_text(to_markdown(rows), encoding="utf-8")
    let_in = {way: sum(row[way]["frames"] > 0 for row in rows) for way in ("ocr", "plain")}
    write_result("real_dicom", {"files": rows}, {"files": len(rows), "let_in": let_in})


def ultrasound_files() -> Iterator[Path]:
    """Yield the readable files of both packages whose modality is ultrasound, each content once."""
    import data_store
    from pydicom.data import get_testdata_files

    bundled = [Path(name) for name in get_testdata_files("*.dcm")]
    extra = (Path(data_store.__file__).parent / "data").rglob("*.dcm")
    names = set()
    for path in sorted({*bundled, *extra}):
        if path.name not in names and _modality(path) == "US":
            names.add(path.name)
            yield path


def describe(path: Path) -> dict[str, Any]:
    """Return a row of the table."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        header = pydicom.dcmread(path, stop_before_pixels=True)
        colours = str(header.get("PhotometricInterpretation", ""))
        return {
            "file": path.name,
            "machine": str(header.get("ManufacturerModelName", "")),
            "pixels": f"{header.Columns} x {header.Rows}, {header.get('NumberOfFrames') or 1}",
            "colours": colours,
            "annotation": str(header.get("BurnedInAnnotation", "")),
            "regions": len(header.get("SequenceOfUltrasoundRegions") or []),
            "ocr": _asdict(bring_in(path, open_reader("require"))),
            "plain": _asdict(bring_in(path, None)),
        }


def bring_in(path: Path, reader: Reader | None) -> Outcome:
    """Return what becomes of a file."""
    try:
        found = read_dicom(
            path.read_bytes(),
            "1",
            max_pixels=25_000_000,
            max_frames=FRAMES,
            duplicate_threshold=2.0,
            reader=reader,
        )
    except ValueError as error:
        return Outcome(0, str(error))
    return Outcome(len(found.frames), "; ".join(dict.fromkeys(found.evidence)))


def to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a table for people."""
    lines = [
        "# Every ultrasound file of pydicom and pydicom-data",
        "",
        f"`python -m benchmarks.real_dicom`; at most {FRAMES} frames of a cine are kept. The first "
        "outcome is with letters read (`ultra[ocr]`), the second without.",
        "",
        "| file | machine | pixels, frames | regions | header on text | with OCR | without |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            f"`{row['file']}`", row["machine"], f"{row['pixels']} ({row['colours']})",
            str(row["regions"]), row["annotation"] or "nothing",
            _said(row["ocr"]), _said(row["plain"]),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _said(outcome: dict[str, Any]) -> str:
    verdict = f"**{outcome['frames']} frames**" if outcome["frames"] else "refused"
    return f"{verdict}: {outcome['said']}"


def _asdict(outcome: Outcome) -> dict[str, Any]:
    return {"frames": outcome.frames, "said": outcome.said}


def _modality(path: Path) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = pydicom.dcmread(
                path, stop_before_pixels=True, specific_tags=["Modality", "Rows"]
            )
    except (pydicom.errors.InvalidDicomError, OSError, EOFError, json.JSONDecodeError):
        return ""
    return str(header.get("Modality", ""))


if __name__ == "__main__":
    main()
