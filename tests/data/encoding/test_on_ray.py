"""The feature cache is filled by any pool of actors, and goes on where it was cut off."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from tests.data.exam_tables import encode as encode_groups
from tests.data.exam_tables import make_exam, write_exams
from ultra import storage
from ultra.config import DataConfig, EncodeConfig
from ultra.data.encoding.on_ray import encode
from ultra.data.features import Encode, Features

pytestmark = pytest.mark.usefixtures("ray_cluster")

NUM_EXAMS, PER_ROW_GROUP = 24, 3
EXAMS = [make_exam(i) for i in range(NUM_EXAMS)]
NUM_FRAMES = sum(len(exam.frames) for exam in EXAMS)


def build() -> Encode:
    return encode_groups


def write_table(root: Path) -> DataConfig:
    """Eight row groups in two parts."""
    write_exams(root / "exams", [EXAMS[:9], EXAMS[9:]], PER_ROW_GROUP)
    return DataConfig(exams_uri=str(root / "exams"))


def digests(cache: str) -> dict[str, str]:
    return {
        uri.removeprefix(cache): hashlib.sha256(storage.read_bytes(uri)).hexdigest()
        for uri in storage.list_files(cache)
    }


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("undisturbed")
    counts = encode(write_table(root), EncodeConfig(), build, str(root / "cache"))
    assert (counts.cached, counts.written, counts.frames) == (0, 8, NUM_FRAMES)
    return digests(str(root / "cache"))


def build_slow() -> Encode:
    def encode_slowly(groups: Sequence[Sequence[bytes]]) -> Sequence[Features]:
        time.sleep(0.3)
        return encode_groups(groups)

    return encode_slowly


@pytest.mark.parametrize(
    "pool",
    [
        {"num_replicas": 3, "cpus_per_replica": 0.5},
        {"num_replicas": 1, "max_replicas": 4, "cpus_per_replica": 0.5},
        {"num_replicas": 20, "cpus_per_replica": 0.25},
    ],
)
def test_any_pool_writes_the_same_files(tmp_path, undisturbed, monkeypatch, capsys, pool) -> None:
    monkeypatch.setattr("ultra.data.on_ray.EVERY_S", 0.1)
    cache = str(tmp_path / "cache")
    counts = encode(write_table(tmp_path), EncodeConfig(**pool), build_slow, cache)
    assert digests(cache) == undisturbed
    assert (counts.cached, counts.written, counts.frames) == (0, 8, NUM_FRAMES)
    assert counts.bytes == sum((Path(cache + name)).stat().st_size for name in undisturbed)
    assert counts.seconds > 0
    line = r"encode: \d of 8 row groups \([\d.]+/s\), \d+ frames \([\d.]+/s\), [\d,]+ bytes a frame"
    assert re.search(line, capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_what_is_there_is_kept(request, tmp_path, undisturbed, kind) -> None:
    config = write_table(tmp_path)
    cache = str(tmp_path / "cache")
    if kind == "s3":
        cache = f"{request.getfixturevalue('s3_bucket')}/{tmp_path.name}"
    encode(config, EncodeConfig(), build, cache)
    assert digests(cache) == undisturbed
    kept, *others = storage.list_files(cache)
    for uri in others[:3]:
        storage.delete(uri)
    storage.write_bytes(kept, b"kept as it is")
    counts = encode(config, EncodeConfig(), build, cache)
    assert (counts.cached, counts.written) == (5, 3)
    assert storage.read_bytes(kept) == b"kept as it is"
    name = kept.removeprefix(cache)
    assert digests(cache) == {**undisturbed, name: hashlib.sha256(b"kept as it is").hexdigest()}
    again = encode(config, EncodeConfig(), build, cache)
    assert (again.cached, again.written, again.frames) == (8, 0, 0)


class Dying:
    """Encoders whose process is killed at its second row group, as long as there are deaths."""

    def __init__(self, folder: Path, deaths: int) -> None:
        self.folder, self.deaths = folder, deaths
        self.calls = 0

    def __call__(self, groups: Sequence[Sequence[bytes]]) -> Sequence[Features]:
        self.calls += 1
        if self.calls == 2 and len(list(self.folder.glob("*.dead"))) < self.deaths:
            (self.folder / f"{os.getpid()}.dead").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return encode_groups(groups)


def test_a_killed_worker_costs_its_row_group_alone(tmp_path, undisturbed) -> None:
    cache = str(tmp_path / "cache")
    resources = EncodeConfig(num_replicas=2, cpus_per_replica=0.5)
    counts = encode(write_table(tmp_path), resources, partial(Dying, tmp_path, 2), cache)
    assert len(list(tmp_path.glob("*.dead"))) == 2
    assert digests(cache) == undisturbed
    assert (counts.written, counts.frames) == (8, NUM_FRAMES)
