"""The claim of an unfinished run on its address, and whether the run can be gone on with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from ultra import storage
from ultra.config import ConfigError, PipelineConfig, parse
from ultra.model import checkpoint

CLAIM = "config.yaml"
"""Its name under `train.output_uri`."""

MAY_CHANGE = {
    "num_workers", "cpus_per_worker", "gpus_per_worker", "micro_batch_size", "zero",
    "gradient_checkpointing", "features", "max_failures", "checkpoint_every", "keep_last",
    "log_every", "explained_exams", "profile_steps",
}  # fmt: skip
"""Keys of `train` that say how a run is computed, not what it computes."""

_RUN = "mlflow_run"


@dataclass(frozen=True, slots=True)
class Claim:
    """What stands at the address of a run until it has ended and everybody was told.

    Attributes:
        run_id: of its MLflow run; empty where nothing is tracked.
        config: its configuration, as `PipelineConfig.to_yaml` wrote it.
    """

    run_id: str
    config: dict[str, Any]


def find_ended(config: PipelineConfig, final: str) -> Claim | None:
    """Return the claim of a run that has written its final checkpoint, and could say so to nobody.

    None where the run is to begin or to go on. What another run left that has ended is deleted.

    Raises:
        ConfigError: when an unfinished run of another configuration stands at the address.
    """
    claim = read_claim(config)
    difference = find_difference(claim, config) if claim else ""
    if checkpoint.exists(final):
        if claim and not difference:
            return claim
        storage.delete(config.train.output_uri)
    elif difference:
        raise ConfigError(
            f"train.output_uri: {config.train.output_uri} holds an unfinished run of another "
            f"configuration, it differs in {difference}; delete it, or give another address"
        )
    return None


def read_claim(config: PipelineConfig) -> Claim | None:
    """Return the claim at the address of a configuration; None where no run is unfinished."""
    uri = storage.join(config.train.output_uri, CLAIM)
    if not storage.exists(uri):
        return None
    try:
        tree = yaml.safe_load(storage.read_bytes(uri))
    except yaml.YAMLError:
        tree = None
    tree = tree if isinstance(tree, dict) else {}
    return Claim(str(tree.pop(_RUN, "")), tree)


def write_claim(config: PipelineConfig, run_id: str) -> None:
    """Claim the address of a configuration for its run."""
    content = f"{yaml.safe_dump({_RUN: run_id})}{config.to_yaml()}"
    storage.write_bytes(storage.join(config.train.output_uri, CLAIM), content.encode())


def delete_claim(config: PipelineConfig) -> None:
    """Say that the run is at its end."""
    storage.delete(storage.join(config.train.output_uri, CLAIM))


def find_difference(claim: Claim, config: PipelineConfig) -> str:
    """Return the first key by which the run of a configuration is another; empty for the same run.

    Args:
        claim: of the unfinished run.
        config: the one to go on with.
    """
    try:
        theirs = parse(claim.config)
    except ConfigError:  # written by another version of ultra
        return "its keys"
    ours = parse(yaml.safe_load(config.to_yaml()))  # without the secret, as theirs
    pairs = zip(_decisive(theirs), _decisive(ours), strict=False)
    return next((key for (key, value), (_, wanted) in pairs if value != wanted), "")


def _decisive(config: PipelineConfig) -> Iterator[tuple[str, Any]]:
    for name in ("data", "model", "train"):
        section = getattr(config, name).model_dump(mode="json")
        for key in sorted(section.keys() - (MAY_CHANGE if name == "train" else set())):
            yield f"{name}.{key}", section[key]
