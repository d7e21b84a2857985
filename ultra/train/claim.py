"""Whether an unfinished run can be gone on with under a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from ultra.config import ConfigError, PipelineConfig, parse

MAY_CHANGE = {
    "num_workers", "cpus_per_worker", "gpus_per_worker", "micro_batch_size", "zero",
    "gradient_checkpointing", "features", "max_failures", "checkpoint_every", "keep_last",
    "log_every", "explained_exams", "profile_steps",
}  # fmt: skip
"""Keys of `train` that say how a run is computed, not what it computes."""


def find_difference(claimed: str, config: PipelineConfig) -> str:
    """Return the first key by which the run of a configuration is another; empty for the same run.

    Args:
        claimed: the configuration of the unfinished run, as `to_yaml` wrote it.
        config: the one to go on with.
    """
    try:
        theirs = parse(yaml.safe_load(claimed))
    except (ConfigError, yaml.YAMLError):  # written by another version of ultra
        return "its keys"
    ours = parse(yaml.safe_load(config.to_yaml()))  # without the secret, as theirs
    pairs = zip(_decisive(theirs), _decisive(ours), strict=False)
    return next((key for (key, value), (_, wanted) in pairs if value != wanted), "")


def _decisive(config: PipelineConfig) -> Iterator[tuple[str, Any]]:
    for name in ("data", "model", "train"):
        section = getattr(config, name).model_dump(mode="json")
        for key in sorted(section.keys() - (MAY_CHANGE if name == "train" else set())):
            yield f"{name}.{key}", section[key]
