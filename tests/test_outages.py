"""The store is killed for ten seconds under each job, and a worker under one: nothing is lost."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import pytest
import ray

from tests.conftest import ROOT
from tests.seaweedfs import SeaweedFS
from ultra import storage
from ultra.config import PipelineConfig, load
from ultra.data import parquet, stream
from ultra.data.encoding.on_ray import encode
from ultra.data.features import EncodeCounts
from ultra.data.on_ray import prepare
from ultra.data.writer.on_ray import write_instructions
from ultra.model import checkpoint
from ultra.model.encoders import FrozenEncoders, cache_key
from ultra.train.stage import name_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("ray_cluster")]

OUTAGE_S = 10
TABLES = ("exams", "quarantine", "audit")


@contextmanager
def interrupted(started: Callable[[], bool], strike: Callable[[], None]) -> Iterator[None]:
    """Strike once the job in the block has begun its work, and see that it was still at it."""
    running = True
    struck = threading.Event()

    def wait_and_strike() -> None:
        while not started():
            time.sleep(0.02)
            if not running:
                return
        struck.set()
        strike()

    thread = threading.Thread(target=wait_and_strike)
    thread.start()
    try:
        yield
        assert struck.is_set(), "the job ended before anything could happen to it"
    finally:
        running = False
        thread.join()


def outage(server: SeaweedFS, uri: str) -> AbstractContextManager[None]:
    """Kill the server for ten seconds once something stands at an address."""

    def strike() -> None:
        server.kill()
        time.sleep(OUTAGE_S)
        server.start()

    return interrupted(partial(storage.exists, uri), strike)


def configure(root: str, *overrides: str) -> PipelineConfig:
    """Some 300 exams in files of eight, so that a job has many tasks."""
    return load(
        "tiny",
        [
            f"root={root}",
            "data.simulator={num_patients: 120, min_frames: 2, max_frames: 4, frame_size: 64}",
            "data.exams_per_file=8",
            "data.patient_key_secret=the same in every run",
            "encode={num_replicas: 2, cpus_per_replica: 0.5}",
            "train.stages.0.steps=6",
            "train.stages.1.steps=6",
            "train.batch_size=16",
            "train.micro_batch_size=8",
            "train.num_workers=1",
            "train.features=require",
            "train.checkpoint_every=2",
            "train.explained_exams=0",
            "model.selection.teacher_warmup_steps=4",
            "tracking.uri=''",
            *overrides,
        ],
    )


def digests(uri: str, suffix: str = "") -> dict[str, str]:
    return {
        file.removeprefix(uri): hashlib.sha256(storage.read_bytes(file)).hexdigest()
        for file in storage.list_files(uri, suffix)
    }


def cache_of(config: PipelineConfig) -> str:
    return storage.join(config.data.features_uri, cache_key(config.model))


def fill_cache(config: PipelineConfig, note: Path | None = None) -> EncodeCounts:
    build = partial(build_encoders, config, note)
    return encode(config.data, config.encode, build, cache_of(config))


def build_encoders(config: PipelineConfig, note: Path | None) -> FrozenEncoders:
    """Build the encoders, and leave the id of the process that they live in."""
    if note is not None:
        (note / str(os.getpid())).touch()
    return FrozenEncoders(config.model)


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    """Exams with conversations and features, on a local path, where nothing happens to them."""
    config = configure(str(tmp_path_factory.mktemp("undisturbed")))
    assert prepare(config.data).exams > 250
    assert fill_cache(config).written > 30
    return config


def test_prepare(undisturbed: PipelineConfig, s3_server: SeaweedFS, s3_bucket: str) -> None:
    config = configure(f"{s3_bucket}/outage-prepare")
    with outage(s3_server, config.data.exams_uri):
        counts = prepare(config.data)
    for table in TABLES:
        ours, theirs = (getattr(c.data, f"{table}_uri") for c in (config, undisturbed))
        assert parquet.read_parts(ours) == parquet.read_parts(theirs)
        assert digests(ours) == digests(theirs)
    parts = parquet.read_parts(config.data.exams_uri)
    assert counts.exams == sum(part.num_rows for part in parts)
    ids = [i for uri in parquet.part_uris(config.data.exams_uri) for i in exam_ids(uri)]
    assert len(ids) == len(set(ids)) == counts.exams


def exam_ids(part_uri: str) -> list[str]:
    return parquet.read_column(part_uri, "exam_id")


@pytest.fixture(scope="module")
def on_s3(undisturbed: PipelineConfig, s3_bucket: str) -> PipelineConfig:
    """The same exams on S3, with nothing in the cache."""
    config = configure(f"{s3_bucket}/outage")
    prepare(config.data)
    return config


def test_encode(undisturbed: PipelineConfig, on_s3: PipelineConfig, s3_server: SeaweedFS) -> None:
    with outage(s3_server, cache_of(on_s3)):
        counts = fill_cache(on_s3)
    files = digests(cache_of(on_s3))
    assert files == digests(cache_of(undisturbed))
    assert (counts.cached, counts.written) == (0, len(files))


def test_encode_with_a_worker_killed(
    undisturbed: PipelineConfig, s3_bucket: str, tmp_path: Path
) -> None:
    data = undisturbed.data.model_copy(update={"features_uri": f"{s3_bucket}/killed"})
    config = undisturbed.model_copy(update={"data": data})
    victims: list[int] = []

    def strike() -> None:
        victims.append(min(int(file.name) for file in tmp_path.iterdir()))
        os.kill(victims[0], signal.SIGKILL)

    with interrupted(lambda: len(storage.list_files(cache_of(config))) >= 3, strike):
        counts = fill_cache(config, tmp_path)
    assert {int(file.name) for file in tmp_path.iterdir()} > set(victims)  # others took over
    files = digests(cache_of(config))
    assert files == digests(cache_of(undisturbed))
    assert (counts.cached, counts.written) == (0, len(files))


def test_encode_with_the_driver_killed(
    undisturbed: PipelineConfig, s3_bucket: str, tmp_path: Path
) -> None:
    data = undisturbed.data.model_copy(update={"features_uri": f"{s3_bucket}/driver-killed"})
    config = undisturbed.model_copy(update={"data": data})
    (tmp_path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-m", "ray_jobs.encode", "--config", f"{tmp_path}/config.yaml"]
    address = ray.get_runtime_context().gcs_address
    expected = digests(cache_of(undisturbed))
    with (tmp_path / "log").open("wb") as log:
        environment = {**os.environ, "RAY_ADDRESS": address}
        job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        with interrupted(lambda: len(storage.list_files(cache_of(config))) >= 3, job.kill):
            job.wait(timeout=600)
    assert job.returncode == -signal.SIGKILL, (tmp_path / "log").read_text()
    left = digests(cache_of(config))
    assert left.items() <= expected.items()  # whole files only
    counts = fill_cache(config)
    assert counts.cached >= len(left)
    assert counts.cached + counts.written == len(expected)
    assert digests(cache_of(config)) == expected


def test_train(on_s3: PipelineConfig, s3_server: SeaweedFS) -> None:
    from ultra.train.on_ray import fit

    fill_cache(on_s3)
    write_instructions(on_s3.data, on_s3.instructions)
    first = configure(on_s3.root, f"train.output_uri={on_s3.root}/first")
    fit(first)
    second = configure(on_s3.root, f"train.output_uri={on_s3.root}/second")
    # Its first checkpoint is there: the next ones, and the exams in between, are still to come.
    with outage(s3_server, f"{second.train.output_uri}/1-align-000002/config.yaml"):
        fit(second)
    tensors = digests(second.train.output_uri, ".safetensors")
    assert "/checkpoint/connector.safetensors" in tensors
    assert tensors == digests(first.train.output_uri, ".safetensors")
    source = stream.open_source(second.data, cache_of(second), "require")
    for index, stage in enumerate(second.train.stages):
        for step in (2, 4):
            uri = storage.join(second.train.output_uri, name_checkpoint(index, stage, step))
            progress = checkpoint.read(uri).progress()
            used = progress.epoch * source.num_exams + len(set(progress.seen))
            assert used == step * second.train.batch_size
