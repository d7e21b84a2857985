"""Bring exams in, de-identified, as frame-group Parquet.

ray job submit --working-dir . -- python -m ray_jobs.prepare --set root=$PWD/runs/tiny
"""

from ultra.cli import run_job
from ultra.config import PipelineConfig
from ultra.data.on_ray import prepare
from ultra.tracking import open_run


def main(config: PipelineConfig) -> None:
    """Run the job."""
    with open_run(config, "prepare") as tracker:
        counts = prepare(config.data)
        tracker.metrics(counts.metrics())
        tracker.table("quarantine_reasons", counts.reason_rows())
    print(counts.summary())
    print(f"exams: {config.data.exams_uri}, quarantine: {config.data.quarantine_uri}")


if __name__ == "__main__":
    run_job(main, __doc__, flags={"--strict": "data.strict=true"})
