"""Runs in MLflow: what they ran on, parameters, metrics, tables and pictures."""

from __future__ import annotations

import json
import platform
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from ultra.config import ConfigError, PipelineConfig, TrackingConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.figure import Figure
    from mlflow import MlflowClient


MAX_METRICS = 1000
"""MLflow's limit of a request."""


class Tracker(Protocol):
    """Where a job writes what happened."""

    @property
    def run_id(self) -> str:
        """Id of the run; empty where nothing is tracked."""

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Record numbers at a step."""

    def series(self, rows: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Record the numbers of several steps."""

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record rows as `name`.json, shown as a table."""

    def figure(self, name: str, figure: Figure) -> None:
        """Record a picture as `name`.png."""

    def file(self, name: str, content: bytes) -> None:
        """Record a file, name with its ending."""

    def text(self, name: str, content: str) -> None:
        """Record a text file, name with its ending."""

    def dataset(self, uri: str, digest: str, counts: Mapping[str, int], context: str) -> None:
        """Record that the run reads a table: its content's digest, and exams by split."""

    def watch_machine(self) -> None:
        """Record load and memory of this machine until the run ends or the process does."""


class NullTracker:
    """A tracker that keeps nothing."""

    run_id = ""

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Drop the numbers."""

    def series(self, rows: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Drop the numbers."""

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Drop the rows."""

    def figure(self, name: str, figure: Figure) -> None:
        """Drop the picture."""

    def file(self, name: str, content: bytes) -> None:
        """Drop the file."""

    def text(self, name: str, content: str) -> None:
        """Drop the text."""

    def dataset(self, uri: str, digest: str, counts: Mapping[str, int], context: str) -> None:
        """Drop the dataset."""

    def watch_machine(self) -> None:
        """Watch nothing."""


class MlflowTracker:
    """One MLflow run, written through the client so that no global state is touched."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client = client
        self.run_id = run_id

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Record numbers at a step."""
        self.series([(step or 0, values)])

    def series(self, rows: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Record the numbers of several steps, in as few requests as MLflow takes."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entries = [
            Metric(key, float(value), now, step)
            for step, values in rows
            for key, value in values.items()
        ]
        for start in range(0, len(entries), MAX_METRICS):
            batch = entries[start : start + MAX_METRICS]
            self._client.log_batch(self.run_id, metrics=batch, synchronous=True)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record rows as `name`.json, shown as a table in the UI."""
        columns = {key: [row.get(key) for row in rows] for key in (rows[0] if rows else {})}
        self._client.log_table(self.run_id, columns, f"{name}.json")

    def figure(self, name: str, figure: Figure) -> None:
        """Record a picture as `name`.png."""
        self._client.log_figure(self.run_id, figure, f"{name}.png")

    def file(self, name: str, content: bytes) -> None:
        """Record a file, name with its ending."""
        folder, _, file = name.rpartition("/")
        with tempfile.TemporaryDirectory() as local:
            path = Path(local) / file
            path.write_bytes(content)
            self._client.log_artifact(self.run_id, str(path), folder or None)

    def text(self, name: str, content: str) -> None:
        """Record a text file, name with its ending."""
        self._client.log_text(self.run_id, content, name)

    def dataset(self, uri: str, digest: str, counts: Mapping[str, int], context: str) -> None:
        """Record that the run reads a table, as MLflow's dataset `exams`.

        Args:
            uri: the table.
            digest: of its content, 36 characters at most.
            counts: split -> exams.
            context: what for, such as `training` or `evaluation`.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name="exams",
            digest=digest,
            source_type=urlsplit(uri).scheme or "local",
            source=json.dumps({"uri": uri}),
            profile=json.dumps(counts),
        )
        tag = InputTag("mlflow.data.context", context)
        self._client.log_inputs(self.run_id, datasets=[DatasetInput(dataset, [tag])])

    def watch_machine(self) -> None:
        """Record MLflow's system metrics of this machine until the run ends or the process does.

        Every 10 s, or MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL; those of GPUs need nvidia-ml-py.
        """
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        SystemMetricsMonitor(
            self.run_id, resume_logging=True, tracking_uri=self._client.tracking_uri
        ).start()


@contextmanager
def open_run(config: PipelineConfig, job: str, run_id: str = "") -> Iterator[Tracker]:
    """Yield the tracker of a new run of a job, or of the run `run_id` that goes on.

    A run that MLflow does not have (somebody deleted it, or this is another server) begins anew. It
    ends as FINISHED, or as FAILED when the block raises.

    Raises:
        ConfigError: for a database file in an object store.
    """
    if not config.tracking.uri:
        yield NullTracker()
        return
    client = open_client(config.tracking.uri)
    if not (run_id and _reopen(client, run_id)):
        run_id = _create_run(client, config, job)
    try:
        yield MlflowTracker(client, run_id)
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id, "FINISHED")


def resume_tracker(config: TrackingConfig, run_id: str) -> Tracker:
    """Return a tracker that writes into a run another process opened."""
    return MlflowTracker(open_client(config.uri), run_id) if run_id else NullTracker()


def read_history(config: PipelineConfig, job: str) -> dict[str, list[tuple[int, float]]]:
    """Return metric -> (step, value) of a job's latest run under this root; empty without one."""
    if not config.tracking.uri:
        return {}
    client = open_client(config.tracking.uri)
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    if experiment is None:
        return {}
    runs = client.search_runs(
        [experiment.experiment_id],
        filter_string=f"tags.job = '{job}' and params.root = '{config.root}'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    return {
        name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
        for run in runs
        for name in sorted(run.data.metrics)
    }


def find_history(config: PipelineConfig, job: str) -> dict[str, list[tuple[int, float]]]:
    """Return `read_history`; empty too where there is no database and no server answers."""
    return read_history(config, job) if is_there(config.tracking.uri) else {}


def is_there(uri: str) -> bool:
    """Return whether the database stands, or a server listens, that an address names."""
    parts = urlsplit(uri)
    if parts.scheme == "sqlite":
        return Path(uri.removeprefix("sqlite:///")).exists()
    return parts.scheme not in {"http", "https"} or _listens(parts.hostname, parts.port)


def _listens(host: str | None, port: int | None) -> bool:
    # MLflow itself asks again for minutes.
    try:
        socket.create_connection((host or "", port or 443), timeout=2).close()
    except OSError:
        return False
    return True


def open_client(uri: str) -> MlflowClient:
    """Return MLflow's client of a tracking server or database; a database's folder is made.

    Raises:
        ConfigError: for a database file in an object store.
    """
    from mlflow import MlflowClient

    if urlsplit(uri).scheme == "sqlite":
        database = uri.removeprefix("sqlite:///")
        if "://" in database:
            raise ConfigError(
                f"tracking.uri: a database file cannot stand at {database}; give the address of an "
                "MLflow server, a local sqlite:///path, or '' for no tracking"
            )
        Path(database).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri)


def _reopen(client: MlflowClient, run_id: str) -> bool:
    """Return whether the run is there; it is running again, then."""
    from mlflow.exceptions import MlflowException

    try:
        there = client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    if there:
        client.update_run(run_id, status="RUNNING")
    return there


def _create_run(client: MlflowClient, config: PipelineConfig, job: str) -> str:
    """Return the id of a new run that has its configuration and its environment."""
    from mlflow.tracking.context.registry import resolve_tags

    packages = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    # MLflow's own tags: the user, the program, and its commit where it stands in a repository.
    tags = {**resolve_tags(), "job": job, **_describe_environment(packages)}
    experiment_id = _experiment_id(client, config.tracking)
    run = client.create_run(experiment_id, run_name=f"{job}-{config.name}", tags=tags)
    run_id = str(run.info.run_id)
    _log_params(client, run_id, config)
    client.log_text(run_id, config.to_yaml(), "config.yaml")
    lines = sorted((f"{name}=={packages[name]}\n" for name in packages), key=str.lower)
    client.log_text(run_id, "".join(lines), "requirements.txt")
    return run_id


def _describe_environment(packages: Mapping[str, str]) -> dict[str, str]:
    tags = {name: packages[name] for name in ("ray", "torch") if name in packages}
    if torch := sys.modules.get("torch"):  # seconds to import, for a job that computes nothing
        tags["cuda"] = str(torch.version.cuda)
    return {"python": platform.python_version(), "platform": platform.platform(), **tags}


def _experiment_id(client: MlflowClient, config: TrackingConfig) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(config.experiment)
    if found is not None:
        return str(found.experiment_id)
    location = config.artifacts_uri
    if not location and config.uri.startswith("sqlite:///"):
        database = Path(config.uri.removeprefix("sqlite:///")).absolute()
        location = str(database.parent / "mlartifacts")
    try:
        return str(client.create_experiment(config.experiment, artifact_location=location or None))
    except MlflowException:  # another job created it in the meantime
        found = client.get_experiment_by_name(config.experiment)
        if found is None:
            raise
        return str(found.experiment_id)


def _log_params(client: MlflowClient, run_id: str, config: PipelineConfig) -> None:
    from mlflow.entities import Param

    flat = dict(_flatten(config.model_dump(mode="json", exclude={"data": {"patient_key_secret"}})))
    params = [Param(key, str(value)) for key, value in flat.items()]
    for start in range(0, len(params), 100):  # MLflow's limit for one request
        client.log_batch(run_id, params=params[start : start + 100])


def _flatten(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _flatten(value, f"{path}.{key}" if path else key)
    elif isinstance(node, list) and any(isinstance(item, dict) for item in node):
        for index, value in enumerate(node):
            yield from _flatten(value, f"{path}.{index}")
    else:
        yield path, node
