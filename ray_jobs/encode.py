"""Encode every frame once with the frozen encoders, into the feature cache.

ray job submit --working-dir . -- python -m ray_jobs.encode --set root=$PWD/runs/tiny
"""

from functools import partial

from ultra import storage
from ultra.cli import run_job
from ultra.config import PipelineConfig
from ultra.data.on_ray import encode
from ultra.model.encoders import FrozenEncoders, cache_key


def main(config: PipelineConfig) -> None:
    """Run the job."""
    model, resources = config.model, config.encode
    device = "cuda" if resources.gpus_per_replica else "cpu"
    cache_uri = storage.join(config.data.features_uri, cache_key(model))
    counts = encode(config.data, resources, partial(FrozenEncoders, model, device), cache_uri)
    print(
        f"{counts.frames} frames encoded; {counts.parts_cached} of {counts.parts} parts "
        f"were in the cache {cache_uri}"
    )


if __name__ == "__main__":
    run_job(main, __doc__)
