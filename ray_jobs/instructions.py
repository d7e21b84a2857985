"""Write instruction conversations from the reports of prepared exams, into the same rows.

ray job submit --working-dir . -- python -m ray_jobs.instructions --set root=$PWD/runs/tiny
"""

from ultra.cli import run_job
from ultra.config import PipelineConfig
from ultra.data.on_ray import write_instructions
from ultra.tracking import open_run


def main(config: PipelineConfig) -> None:
    """Run the job."""
    with open_run(config, "instructions") as tracker:
        num_exams = write_instructions(config.data)
        tracker.metrics({"exams": num_exams})
    print(f"conversations for {num_exams} exams: {config.data.exams_uri}")


if __name__ == "__main__":
    run_job(main, __doc__)
