"""A folder of DICOM files without an index: the files of one study are one exam, without a report.

Nothing of a header comes out but what `ultra.data.header` lets out: exams and patients are named by
keyed pseudonyms. Every file's header is read once to group them, its pixels are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from ultra import storage
from ultra.config import DataConfig
from ultra.data.dicom_file import no_warnings, parse_header
from ultra.data.header import NEEDED, Header, read_header
from ultra.data.importers.entry import ExamEntry, why_unusable

DIRECTORY = "DICOMDIR"
ULTRASOUND = ("US", "IVUS")


@dataclass(slots=True)
class Study:
    """The files of one study.

    Attributes:
        header: of the first file that was read.
        files: series, place in it and path of each.
        patients: their pseudonyms; more than one is an error of the set.
        sites: the body parts that any header names.
    """

    header: Header
    files: list[tuple[str, int, str]] = field(default_factory=list)
    patients: set[str] = field(default_factory=set)
    sites: list[str] = field(default_factory=list)

    @property
    def paths(self) -> tuple[str, ...]:
        """The files in the order they were taken."""
        return tuple(path for _, _, path in sorted(self.files))

    @property
    def site(self) -> str:
        """The body part where the headers agree, empty where they do not."""
        return self.sites[0] if len(self.sites) == 1 else ""


def list_exams(config: DataConfig) -> Iterator[ExamEntry]:
    """Yield the studies under a folder, and the files that belong to none with their reason."""
    studies, strays = read_studies(config.source_uri, config)
    yield from strays
    for study in studies.values():
        yield to_entry(study, source=f"study of {study.paths[0]}")


def to_entry(study: Study, source: str) -> ExamEntry:
    """Return a study as an exam without a report."""
    entry = ExamEntry(
        source=source,
        exam_id=study.header.study,
        patient_id=study.header.patient,
        site=study.site,
        frames=study.paths,
        needs_report=False,
    )
    several = len(study.patients) > 1
    reason = "several patients: in the files of one study" if several else why_unusable(entry)
    return replace(entry, reason=reason)


def read_studies(folder_uri: str, config: DataConfig) -> tuple[dict[str, Study], list[ExamEntry]]:
    """Return the studies of all ultrasound files under a folder by pseudonym, and the other files.

    Files whose name begins with a dot, and the directory of a DICOM disc, are passed over.
    """
    studies: dict[str, Study] = {}
    strays: list[ExamEntry] = []
    for path in _list_paths(folder_uri):
        try:
            header = _read_header(storage.join(folder_uri, path), config)
        except ValueError as error:
            strays.append(ExamEntry(path, f"file {len(strays) + 1}", reason=str(error)))
            continue
        study = studies.setdefault(header.study, Study(header))
        study.files.append((header.series, header.number, path))
        study.patients.add(header.patient)
        if header.site and header.site not in study.sites:
            study.sites.append(header.site)
    return studies, strays


def _list_paths(folder_uri: str) -> Iterable[str]:
    prefix = storage.join(folder_uri, "")
    for uri in storage.list_files(folder_uri):
        path = uri.removeprefix(prefix)
        name = path.rpartition("/")[2]
        if not name.startswith(".") and name != DIRECTORY:
            yield path


@no_warnings()
def _read_header(uri: str, config: DataConfig) -> Header:
    try:
        with storage.open_read(uri) as file:
            dataset = parse_header(file, config.max_dicom_bytes, NEEDED)
        header = read_header(dataset, config.patient_key_secret)
    except ValueError as error:
        raise ValueError(f"unreadable DICOM header: {error}") from None
    if header.modality not in ULTRASOUND:
        raise ValueError(f"not ultrasound: modality {header.modality or 'not stated'}")
    return header
