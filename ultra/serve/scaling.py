"""How many replicas a deployment should have: by what it says of itself, not by open requests.

serve_config.yaml names this policy and its targets. Serve applies the delays and the bounds that
stand beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ScaleBySignals:
    """An autoscaling policy of Ray Serve.

    Args:
        targets: name of a signal of `record_autoscaling_stats` -> how much of it one replica is to
            have. Of several signals the one that asks for most replicas counts.

    Raises:
        ValueError: for a target that is not above 0, or none at all.
    """

    def __init__(self, targets: Mapping[str, float]) -> None:
        if not targets or min(targets.values()) <= 0:
            raise ValueError(f"targets {dict(targets)}: at least one, and each above 0")
        self.targets = dict(targets)

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """Return the number of replicas wanted, not rounded, and no state.

        Args:
            context: Serve's AutoscalingContext.
        """
        signals = context.aggregated_metrics or {}
        wanted = [
            sum(signals[name].values()) / target
            for name, target in self.targets.items()
            if signals.get(name)
        ]
        # Before a replica has said anything there is nothing to go by.
        return max(wanted, default=context.target_num_replicas), {}
