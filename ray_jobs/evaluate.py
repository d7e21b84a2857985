"""Answer the questions about a split with a checkpoint, and score the answers.

    ray job submit --working-dir . -- python -m ray_jobs.evaluate --set root=$PWD/runs/tiny

Scores, tables and pictures go to MLflow; scores and tables also to `evaluate.results_uri`.
"""

from ultra.cli import run_job
from ultra.config import PipelineConfig
from ultra.evaluate.on_ray import evaluate


def main(config: PipelineConfig) -> None:
    """Run the job."""
    for name, value in evaluate(config).metrics.items():
        print(f"{name:40} {value:.4g}")


if __name__ == "__main__":
    run_job(main, __doc__)
