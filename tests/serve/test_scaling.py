"""Replicas by signals, with the context that Serve hands to a policy."""

from __future__ import annotations

import time

import pytest
from ray.serve._private.common import DeploymentID
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from ultra.serve.scaling import ScaleBySignals


def context(metrics: dict | None, target: int = 3) -> AutoscalingContext:
    return AutoscalingContext(
        deployment_id=DeploymentID("LanguageReplica", "ultra"),
        deployment_name="LanguageReplica",
        app_name="ultra",
        current_num_replicas=2,
        target_num_replicas=target,
        running_replicas=[],
        total_num_requests=50,
        total_queued_requests=0,
        aggregated_metrics=metrics,
        raw_metrics=None,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=8,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=time.time(),
        config=None,
    )


@pytest.mark.parametrize(
    ("metrics", "wanted"),
    [
        ({"answers": {"a": 12.0, "b": 8.0}, "prefill_tokens": {"a": 0.0, "b": 0.0}}, 20 / 16),
        ({"answers": {"a": 1.0, "b": 1.0}, "prefill_tokens": {"a": 9000.0, "b": 1000.0}}, 2.5),
        ({"answers": {"a": 0.0, "b": 0.0}, "prefill_tokens": {"a": 0.0, "b": 0.0}}, 0.0),
        ({"answers": {"a": 8.0}, "something else": {"a": 1e9}}, 0.5),
        ({"answers": {}}, 3),  # nobody has said anything yet
        ({}, 3),
        (None, 3),
    ],
)
def test_the_signal_that_asks_for_most_counts(metrics, wanted) -> None:
    policy = ScaleBySignals({"answers": 16, "prefill_tokens": 4000})
    assert policy(context(metrics)) == (wanted, {})


@pytest.mark.parametrize("targets", [{}, {"answers": 0}, {"answers": 4, "prefill_tokens": -1}])
def test_targets_that_say_nothing_are_refused(targets) -> None:
    with pytest.raises(ValueError, match="each above 0"):
        ScaleBySignals(targets)


def test_serve_takes_it_from_a_configuration() -> None:
    config = AutoscalingConfig.model_validate(
        {
            "policy": {
                "policy_function": "ultra.serve.scaling:ScaleBySignals",
                "policy_kwargs": {"targets": {"queued_frames": 48}},
            }
        }
    )
    policy = config.policy.get_policy()(**config.policy.policy_kwargs)
    assert policy(context({"queued_frames": {"a": 96.0}})) == (2.0, {})
