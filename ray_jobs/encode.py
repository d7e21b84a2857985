"""Encode every frame once with the frozen encoders, into the feature cache.

ray job submit --working-dir . -- python -m ray_jobs.encode --set root=$PWD/runs/tiny
"""

from functools import partial

from ultra import storage
from ultra.cli import run_job
from ultra.config import PipelineConfig
from ultra.data.encoding.on_ray import encode
from ultra.model.encoders import FrozenEncoders, cache_key
from ultra.tracking import open_run


def main(config: PipelineConfig) -> None:
    """Run the job."""
    model, resources = config.model, config.encode
    device = "cuda" if resources.gpus_per_replica else "cpu"
    cache_uri = storage.join(config.data.features_uri, cache_key(model))
    with open_run(config, "encode") as tracker:
        counts = encode(config.data, resources, partial(FrozenEncoders, model, device), cache_uri)
        tracker.metrics(counts.metrics())
    print(f"{counts.summary()} {cache_uri}")


if __name__ == "__main__":
    run_job(main, __doc__)
