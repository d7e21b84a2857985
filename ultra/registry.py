"""Checkpoints as versions of a registered model in MLflow, and the aliases that jobs ask for.

A version's tag `checkpoint` is the address that `models:/NAME@ALIAS` stands for. Its source in
MLflow is the same address where that is s3://. A server takes no local path that is outside a run's
artifacts, so the source of such a checkpoint is the folder `checkpoint` among them, with its
config.yaml.

Training overwrites its own checkpoint, so an address alone names none: the tag `checkpoint_sha256`
says what the version was, and what is no longer there is not passed off as it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ultra import storage
from ultra.config import ConfigError, PipelineConfig, TrackingConfig
from ultra.tracking import is_there, open_client

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"
"""The best version by what `ray_jobs.evaluate --register` compared."""
CHALLENGER = "challenger"
"""The version that training wrote last; MLflow keeps `latest` for itself, the newest of all."""

_SCHEME = "models:/"
_CONFIG = "config.yaml"
_WHOLE = "language/"


def resolve_start(config: PipelineConfig) -> PipelineConfig:
    """Return the configuration with an address in `train.start_from`.

    Raises:
        ConfigError: as `resolve_version`.
    """
    start = resolve_version(config.train.start_from, config.tracking.uri)
    train = config.train.model_copy(update={"start_from": start})
    return config.model_copy(update={"train": train})


def resolve_evaluated(config: PipelineConfig) -> PipelineConfig:
    """Return the configuration with an address in `evaluate.checkpoint_uri`.

    Raises:
        ConfigError: as `resolve_version`.
    """
    checkpoint = resolve_version(config.evaluate.checkpoint_uri, config.tracking.uri)
    evaluate = config.evaluate.model_copy(update={"checkpoint_uri": checkpoint})
    return config.model_copy(update={"evaluate": evaluate})


def resolve_version(uri: str, tracking_uri: str) -> str:
    """Return the address of the checkpoint that is a version; any other address as it is.

    Args:
        uri: models:/NAME@ALIAS, models:/NAME/NUMBER, models:/NAME/latest, or an address.
        tracking_uri: MLflow's.

    Raises:
        ConfigError: when MLflow is not there or does not know the version, or another checkpoint
            stands at its address by now.
    """
    if not uri.startswith(_SCHEME):
        return uri
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.utils.models import get_model_name_and_version

    if not tracking_uri or not is_there(tracking_uri):
        raise ConfigError(
            f"{uri}: no MLflow at {tracking_uri!r} to ask; jobs read tracking.uri, "
            "serve_config.yaml tracking_uri or MLFLOW_TRACKING_URI"
        )
    client = open_client(tracking_uri)
    try:
        version = client.get_model_version(*get_model_name_and_version(client, uri))
    except (MlflowException, TypeError) as error:  # TypeError: a name alone
        raise ConfigError(
            f"{uri}: no such version at {tracking_uri}; models:/NAME@ALIAS, models:/NAME/3 or "
            f"models:/NAME/latest ({error})"
        ) from None
    address = str(version.tags.get("checkpoint", version.source))
    if digest := version.tags.get("checkpoint_sha256"):
        _check_same(uri, address, digest)
    return address


def register(tracking: TrackingConfig, run_id: str, checkpoint_uri: str) -> str:
    """Make the checkpoint that a run of training wrote a version, and return the version's name.

    Its tags are the addresses and digests of the checkpoint and of its configuration, those of the
    exams, and the run's last metrics; it is the challenger. Empty where there is no run, or no name
    for a model.
    """
    if not run_id or not tracking.model_name:
        return ""
    client = open_client(tracking.uri)
    run = client.get_run(run_id)
    tags = {
        f"metric.{name}": str(value)
        for name, value in run.data.metrics.items()
        if not name.startswith("system/")
    }
    for used in run.inputs.dataset_inputs if run.inputs else ():
        tags["exams"] = used.dataset.digest
    version = _register(client, tracking.model_name, run_id, checkpoint_uri, tags)
    client.set_registered_model_alias(version.name, CHALLENGER, version.version)
    return _name(version)


def record_scores(
    config: PipelineConfig, run_id: str, metrics: Mapping[str, float], exams: str
) -> str:
    """Write scores on the version that was evaluated; return what became of it, for people.

    Reused answers say nothing about a checkpoint and are left out. With
    `evaluate.register_champion` the checkpoint is made a version where it is none, and the
    champion where `evaluate.register_metric` is larger than the champion's on the same exams.

    Args:
        config: `evaluate.checkpoint_uri` is the checkpoint's address.
        run_id: of the evaluation; without one nothing is done.
        metrics: of the evaluation; the model's own are written.
        exams: names the exams that were asked about.

    Raises:
        ConfigError: when there is no such metric, or it is no number.
    """
    name, settings = config.tracking.model_name, config.evaluate
    if not run_id or not name:
        return ""
    client = open_client(config.tracking.uri)
    uri = settings.checkpoint_uri
    own = {
        f"metric.{key}": str(float(value))
        for key, value in metrics.items()
        if key.partition("/")[0] in {*settings.suites, "selection"}
    }
    tags = {**own, "evaluated_on": exams, "evaluate_run": run_id}
    if settings.register_champion:
        version = _register(client, name, run_id, uri, {})
    elif not settings.reuse_predictions and (found := _find(client, name, _read(uri))):
        version = found
    else:
        return ""
    for key, value in tags.items():
        client.set_model_version_tag(name, version.version, key, value)
    if not settings.register_champion:
        return f"{_name(version)} has these scores"
    return _challenge(client, version, settings.register_metric, metrics, exams)


def _challenge(
    client: MlflowClient,
    version: ModelVersion,
    metric: str,
    metrics: Mapping[str, float],
    exams: str,
) -> str:
    """Move the alias to a version that is better than the champion, and return what was done."""
    value = metrics.get(metric, math.nan)
    if math.isnan(value):
        known = ", ".join(key for key, number in metrics.items() if not math.isnan(number))
        raise ConfigError(f"evaluate.register_metric: no {metric} was measured, but {known}")
    champion = _champion(client, version.name)
    new = f"{metric} {value:.4g}"
    if champion is None:
        told = f"champion is now {_name(version)}: {new}, and there was none"
    elif champion.version == version.version:
        return f"{_name(version)} is the champion already: {new}"
    else:
        kept, best = f"kept champion {_name(champion)}", champion.tags.get(f"metric.{metric}")
        if best is None or champion.tags.get("evaluated_on") != exams:
            return (
                f"{kept}: it has no {metric} on these exams; evaluate "
                f"{_SCHEME}{version.name}@{CHAMPION} on them first"
            )
        if not value > float(best):
            return f"{kept}: {float(best):.4g} >= {value:.4g} of {_name(version)} ({metric})"
        told = f"champion is now {_name(version)}: {new} > {float(best):.4g} of {_name(champion)}"
    client.set_registered_model_alias(version.name, CHAMPION, version.version)
    return told


def _champion(client: MlflowClient, name: str) -> ModelVersion | None:
    aliases = client.get_registered_model(name).aliases
    return client.get_model_version(name, aliases[CHAMPION]) if CHAMPION in aliases else None


@dataclass(frozen=True, slots=True)
class _Content:
    """Where a checkpoint is and what is in it.

    Attributes:
        address: absolute, so that it means the same to another process.
        digest: of what training changes.
        config: its config.yaml.
    """

    address: str
    digest: str
    config: bytes


def _read(uri: str) -> _Content:
    """Return what a checkpoint is.

    The digest is of the bytes of every file but those of a whole language model, tens of GB beside
    which the connector trains as well; of these it is of the names alone.

    Raises:
        StorageError: when there is no checkpoint.
    """
    address = storage.address(*storage.resolve(uri))
    config = storage.read_bytes(storage.join(address, _CONFIG))
    digest = hashlib.sha256()
    for file in storage.list_files(address):
        name = file.removeprefix(address).lstrip("/")
        digest.update(f"{name}\n".encode())
        if not name.startswith(_WHOLE):
            with storage.open_read(file) as opened:
                while chunk := opened.read(1 << 20):
                    digest.update(chunk)
    return _Content(address, digest.hexdigest(), config)


def _check_same(uri: str, address: str, digest: str) -> None:
    try:
        same = _read(address).digest == digest
    except storage.StorageError as error:
        raise ConfigError(f"{uri}: its checkpoint is gone: {error}") from None
    if not same:
        raise ConfigError(f"{uri}: another checkpoint stands at {address} since it was registered")


def _find(client: MlflowClient, name: str, content: _Content) -> ModelVersion | None:
    """Return the newest version that is this checkpoint, if any is."""
    found = client.search_model_versions(
        f"name = '{name}' and tags.checkpoint_sha256 = '{content.digest}'",
        order_by=["version_number DESC"],
    )
    return next((v for v in found if v.tags["checkpoint"] == content.address), None)


def _register(
    client: MlflowClient, name: str, run_id: str, uri: str, tags: Mapping[str, str]
) -> ModelVersion:
    """Return the version that a checkpoint is, made from a run where it is none yet."""
    from mlflow.exceptions import MlflowException

    content = _read(uri)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    if found := _find(client, name, content):
        return found
    source = content.address
    if "://" not in source:
        client.log_text(run_id, content.config.decode(), f"checkpoint/{_CONFIG}")
        source = storage.join(client.get_run(run_id).info.artifact_uri, "checkpoint")
    own = {
        "checkpoint": content.address,
        "checkpoint_sha256": content.digest,
        "config_sha256": hashlib.sha256(content.config).hexdigest(),
    }
    return client.create_model_version(name, source, run_id, tags={**tags, **own})


def _name(version: ModelVersion) -> str:
    return f"version {version.version} of {version.name}"
