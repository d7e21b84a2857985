"""Answer the questions about a split with a checkpoint, and keep the answers as Parquet.

    ray job submit --working-dir . -- python -m ray_jobs.predict --set root=$PWD/runs/tiny

An exam without conversations is asked for its report.
"""

from ultra.cli import run_job
from ultra.config import PipelineConfig
from ultra.evaluate.on_ray import predict


def main(config: PipelineConfig) -> None:
    """Run the job."""
    print(f"predictions: {predict(config)}")


if __name__ == "__main__":
    run_job(main, __doc__)
