"""Write instruction conversations from the reports of prepared exams, into the same rows.

ray job submit --working-dir . -- python -m ray_jobs.instructions --set root=$PWD/runs/tiny
"""

from ultra.cli import run_job
from ultra.config import PipelineConfig
from ultra.data.writer.on_ray import write_instructions
from ultra.tracking import open_run


def main(config: PipelineConfig) -> None:
    """Run the job."""
    with open_run(config, "instructions") as tracker:
        counts = write_instructions(config.data, config.instructions)
        tracker.metrics(counts.metrics())
        tracker.table("reasons", counts.reason_rows())
    print(counts.summary())
    print(f"exams: {config.data.exams_uri}, rejected: {config.instructions.rejected_uri}")


if __name__ == "__main__":
    run_job(main, __doc__)
