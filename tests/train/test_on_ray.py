"""Both stages on a real Ray cluster, from features and from pixels, tracked in MLflow."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from ultra.config import ConfigError, PipelineConfig, load
from ultra.data import parquet, stream
from ultra.model import checkpoint
from ultra.train.alone import fit_alone
from ultra.train.claim import read_claim, write_claim

TOLERANCE = 5e-3
"""Features are float16, and a batch of other frames may round the last bit another way."""


def configure(root: Path, *overrides: str) -> PipelineConfig:
    return load(
        "tiny",
        [
            f"root={root}",
            "data.simulator.num_patients=10",
            "data.validation_fraction=0.2",
            "train.stages.0.steps=4",
            "train.stages.1.steps=4",
            "train.batch_size=8",
            "train.micro_batch_size=4",
            "train.num_workers=2",
            "train.cpus_per_worker=0.5",
            "train.checkpoint_every=2",
            "train.log_every=1",
            "model.selection.teacher_warmup_steps=5",
            *overrides,
        ],
    )


@pytest.fixture(scope="module")
def prepared(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from functools import partial

    from ultra import storage
    from ultra.data.encoding.on_ray import encode
    from ultra.data.on_ray import prepare
    from ultra.data.writer.on_ray import write_instructions
    from ultra.model.encoders import FrozenEncoders, cache_key

    root = tmp_path_factory.mktemp("train")
    config = configure(root)
    prepare(config.data)
    write_instructions(config.data, config.instructions)
    build = partial(FrozenEncoders, config.model)
    cache = storage.join(config.data.features_uri, cache_key(config.model))
    first = encode(config.data, config.encode, build, cache)
    assert first.cached == 0
    assert first.frames > 40
    again = encode(config.data, config.encode, build, cache)
    assert (again.frames, again.cached) == (0, first.written)
    return root


def history(config: PipelineConfig, metric: str) -> list[float]:
    from mlflow import MlflowClient

    client = MlflowClient(config.tracking.uri)
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], "tags.job = 'train'", max_results=1)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.batch_size"] == "8"
    return [m.value for m in client.get_metric_history(run.info.run_id, metric)]


def artifacts(config: PipelineConfig, folder: str) -> list[str]:
    from mlflow import MlflowClient

    client = MlflowClient(config.tracking.uri)
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], "tags.job = 'train'", max_results=1)
    return [artifact.path for artifact in client.list_artifacts(run.info.run_id, folder)]


def registered(config: PipelineConfig) -> Any:
    from mlflow import MlflowClient

    client = MlflowClient(config.tracking.uri)
    return client.get_model_version_by_alias(config.tracking.model_name, "challenger")


def test_features_and_pixels_give_the_same_run(
    prepared: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from ultra.train.on_ray import fit

    curves = {}
    # Pictures of validation exams and of where the time goes are drawn in one run only: they leave
    # the other numbers be.
    for use, num_explained in (("require", 0), ("pixels", 2)):
        config = configure(
            prepared,
            f"train.features={use}",
            f"train.explained_exams={num_explained}",
            f"train.profile_steps={num_explained}",
            f"train.output_uri={prepared}/{use}",
            f"tracking.uri=sqlite:///{prepared}/{use}.db",
        )
        final = fit(config)
        assert final == f"{prepared}/{use}/checkpoint"
        assert checkpoint.read(final).config == config
        assert not (Path(final) / "training").exists()
        # Who finds the last step's checkpoint may rely on the final one.
        last = Path(config.train.output_uri) / "2-instruct-000004"
        assert (last / "training").exists()
        assert Path(final).stat().st_ctime_ns < last.stat().st_ctime_ns
        version = registered(config)
        assert version.tags["checkpoint"] == final
        assert version.tags["exams"] == parquet.digest_table(config.data.exams_uri)
        assert float(version.tags["metric.loss"]) == history(config, "loss")[-1]
        curves[use] = {n: history(config, n) for n in ("loss", "redundancy", "alpha", "entropy")}
        assert len(history(config, "samples_per_second")) == 8
        moments = artifacts(config, "understanding")
        assert bool(moments) == (num_explained > 0)
        for moment in moments:
            assert len(artifacts(config, moment)) == num_explained
        profiles = artifacts(config, "profile")
        drawn = [f"profile/{stage}.png" for stage in ("align", "instruct")]
        assert [path for path in profiles if path.endswith(".png")] == drawn[:num_explained]
        ends = {f"understanding/{stage}-000004" for stage in ("align", "instruct")}
        assert num_explained == 0 or ends <= set(moments)
    assert all(len(curve) == 8 for curve in curves["require"].values())
    assert curves["require"]["redundancy"][:5] == [0.0] * 5
    assert all(value > 0 for value in curves["require"]["redundancy"][5:])
    for name, curve in curves["require"].items():
        for a, b in zip(curve, curves["pixels"][name], strict=True):
            assert math.isclose(a, b, abs_tol=TOLERANCE), name
    steps = sorted(p.name for p in (prepared / "require").iterdir() if p.is_dir())
    wanted = [
        "1-align-000002",
        "1-align-000004",
        "2-instruct-000002",
        "2-instruct-000004",
        "checkpoint",
    ]
    assert steps == wanted


def test_every_exam_is_used_once_an_epoch(prepared: Path) -> None:
    from ultra.train.on_ray import cache_uri

    config = configure(prepared)
    source = stream.open_source(config.data, cache_uri(config), "require")
    for name in ("1-align-000002", "2-instruct-000002"):
        progress = checkpoint.read(f"{prepared}/require/{name}").progress()
        assert progress.step == 2
        # As many different exams as places in the steps: none came twice in a pass.
        assert progress.epoch * source.num_exams + len(progress.seen) == 2 * 8
        assert {epoch for epoch, _ in progress.seen} <= {progress.epoch}


@pytest.mark.slow
def test_a_stage_ends_early_with_its_best_weights_and_old_checkpoints_go(prepared: Path) -> None:
    from ultra.train.on_ray import fit

    config = configure(
        prepared,
        "train.validate_every=1",
        "train.early_stopping_patience=2",
        "train.checkpoint_every=1",
        "train.keep_last=2",
        "train.stages.0.steps=3",
        "train.stages.1.steps=9",
        "train.stages.1.learning_rate=3",  # it gets worse, and soon
        f"train.output_uri={prepared}/early",
        f"tracking.uri=sqlite:///{prepared}/early.db",
    )
    final = Path(fit(config))
    losses = history(config, "validation/loss")
    align, instruct = losses[:3], losses[3:]
    assert 2 < len(instruct) < 9
    best = instruct.index(min(instruct)) + 1
    assert len(instruct) == best + 2
    assert all(0 <= value <= 1 for value in history(config, "validation/selection_accuracy"))
    last = f"2-instruct-{len(instruct):06d}"
    names = sorted(path.name for path in final.parent.iterdir() if path.is_dir())
    assert names == [f"2-instruct-{len(instruct) - 1:06d}", last, "best", "checkpoint"]
    progress = checkpoint.read(str(final.parent / "best")).progress()
    assert (progress.stage, progress.step, progress.stale) == (1, best, 0)
    assert progress.best == pytest.approx(min(instruct))
    assert min(align) > 0
    for file in ("connector.safetensors", "adapter/adapter_model.safetensors"):
        kept = [(final.parent / name / file).read_bytes() for name in ("best", last, "checkpoint")]
        assert kept[0] == kept[1] == kept[2]


@pytest.mark.slow
def test_one_seed_gives_one_checkpoint_and_another_seed_another(prepared: Path) -> None:
    from ultra.train.on_ray import cache_uri, fit

    def configured(folder: Path, seed: int) -> PipelineConfig:
        return configure(
            prepared,
            "train.stages.0.steps=2",
            "train.stages.1.steps=2",
            "train.num_workers=1",
            "train.checkpoint_every=null",
            "model.selection.teacher_warmup_steps=1",
            f"train.seed={seed}",
            f"train.output_uri={folder}",
            "tracking.uri=''",
        )

    def read(folder: Path) -> dict[str, bytes]:
        """Return the contents of every file that holds tensors or the configuration."""
        files = [p for suffix in (".safetensors", ".yaml") for p in folder.rglob(f"*{suffix}")]
        address, anywhere = str(folder).encode(), b"anywhere"
        return {
            str(path.relative_to(folder)): path.read_bytes().replace(address, anywhere)
            for path in files
        }

    def run(name: str, seed: int) -> dict[str, bytes]:
        fit(configured(prepared / name, seed))
        return read(prepared / name)

    first, again, other = run("first", 3), run("again", 3), run("other", 4)
    for name in ("1-align-000002", "2-instruct-000002", "checkpoint"):
        assert f"{name}/connector.safetensors" in first
        assert f"{name}/adapter/adapter_model.safetensors" in first
    assert again.keys() == first.keys() == other.keys()
    assert [name for name, content in again.items() if content != first[name]] == []
    assert {name for name, content in other.items() if content == first[name]} == set()

    # A process alone takes the same steps, given the rows in the order that Ray reads them in.
    config = configured(prepared / "first", 3)
    source = stream.open_source(config.data, cache_uri(config), "require")

    def stage_rows() -> Iterator[dict[str, Any]]:
        for window in stream.plan_windows(source.pieces, 3, 0, num_epochs=2):
            yield from stream.read_window(window, ())

    rows = (row for _ in range(2) for row in islice(stage_rows(), 2 * config.train.batch_size))
    fit_alone(config, rows, source.num_exams, prepared / "alone")
    alone = read(prepared / "alone")
    assert "2-instruct-000002/adapter/adapter_model.safetensors" in alone
    tensors = {name: content for name, content in alone.items() if name.endswith(".safetensors")}
    assert [name for name, content in tensors.items() if content != first[name]] == []


DIES_BEFORE_IT_REGISTERS = """
import os, signal, sys
from ultra import registry
from ultra.config import load
from ultra.train.on_ray import fit

registry.register = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
fit(load(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_run_whose_driver_died_before_it_was_registered_is_registered_once(
    prepared: Path,
) -> None:
    import ray
    from mlflow import MlflowClient

    from ultra.train.on_ray import fit

    config = configure(
        prepared,
        "train.stages.0.steps=1",
        "train.stages.1.steps=1",
        "train.num_workers=1",
        f"train.output_uri={prepared}/died",
        f"tracking.uri=sqlite:///{prepared}/died.db",
    )
    file = prepared / "died.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    died = subprocess.run(
        [sys.executable, "-c", DIES_BEFORE_IT_REGISTERS, str(file)],
        cwd=ROOT, env=environment, capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    client = MlflowClient(config.tracking.uri)
    claim = read_claim(config)
    assert claim is not None
    assert client.get_run(claim.run_id).info.status == "RUNNING"
    assert client.search_registered_models() == []

    final = fit(config)  # submitted again
    version = registered(config)
    assert (int(version.version), version.run_id) == (1, claim.run_id)
    assert version.tags["checkpoint"] == final == f"{prepared}/died/checkpoint"
    assert float(version.tags["metric.loss"]) == history(config, "loss")[-1]
    assert len(history(config, "loss")) == 2  # no step was taken again; the run is FINISHED
    assert read_claim(config) is None

    write_claim(config, claim.run_id)  # as if the first had died a moment later
    assert fit(config) == final
    assert [int(v.version) for v in client.search_model_versions()] == [1]
    runs = client.search_runs([client.get_run(claim.run_id).info.experiment_id])
    assert [run.info.run_id for run in runs] == [claim.run_id]


def test_an_unfinished_run_of_another_configuration_is_left_alone(prepared: Path) -> None:
    from ultra.train.on_ray import fit

    folder = prepared / "unfinished"
    folder.mkdir()
    (folder / "config.yaml").write_text("name: other\n")
    config = configure(prepared, f"train.output_uri={folder}", "tracking.uri=''")
    with pytest.raises(ConfigError, match="holds an unfinished run of another configuration"):
        fit(config)
    assert (folder / "config.yaml").read_text() == "name: other\n"


def test_features_that_are_required_and_missing_are_an_error(
    prepared: Path, tmp_path: Path
) -> None:
    from ultra.train.on_ray import fit

    config = configure(
        prepared,
        "train.features=require",
        f"data.features_uri={tmp_path}",
        f"train.output_uri={tmp_path}/train",
        "tracking.uri=''",
    )
    with pytest.raises(ConfigError, match=r"have no features at .*; run ray_jobs.encode"):
        fit(config)
