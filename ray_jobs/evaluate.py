"""Answer the questions about a split with a checkpoint, and score the answers.

    ray job submit --working-dir . -- python -m ray_jobs.evaluate --set root=$PWD/runs/tiny

Scores, tables and pictures go to MLflow; scores and tables also to `evaluate.results_uri`, where
`tables.md` has those that papers print. With `--set evaluate.reuse_predictions=true` the answers
that are there are scored anew, without a model. Public sets are read without a `prepare`
(`evaluate.exams`), and other models answer beside ours (`evaluate.others`).

With `--register` the checkpoint becomes a version of the registered model, and its `champion` where
`evaluate.register_metric` is better than the champion's on the same exams.
"""

from ultra.cli import run_job
from ultra.config import PipelineConfig
from ultra.evaluate.on_ray import evaluate
from ultra.evaluate.results import format_scores


def main(config: PipelineConfig) -> None:
    """Run the job."""
    others = [other.name for other in config.evaluate.others]
    print(format_scores(evaluate(config).metrics, others))
    print(f"tables: {config.evaluate.results_uri}")


if __name__ == "__main__":
    run_job(main, __doc__, flags={"--register": "evaluate.register_champion=true"})
