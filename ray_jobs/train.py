"""Tune the model in two stages, align and instruct.

ray job submit --working-dir . -- python -m ray_jobs.train --set root=$PWD/runs/tiny
"""

from ultra.cli import run_job
from ultra.config import PipelineConfig
from ultra.train.on_ray import fit


def main(config: PipelineConfig) -> None:
    """Run the job."""
    print(f"checkpoint {fit(config)}")


if __name__ == "__main__":
    run_job(main, __doc__)
