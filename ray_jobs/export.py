"""Write prepared exams for other trainers: LLaVA's JSON, or messages as JSON lines.

    ray job submit --working-dir . -- python -m ray_jobs.export --set root=$PWD/runs/tiny

`--set data.export_format=messages` gives the second.
"""

from ultra.cli import run_job
from ultra.config import PipelineConfig
from ultra.data.on_ray import export


def main(config: PipelineConfig) -> None:
    """Run the job."""
    counts, files = export(config.data)
    print(
        f"{counts.conversations} conversations of {counts.exams} exams, {counts.frames} frames; "
        f"{counts.without_conversations} exams have no conversation and are left out"
    )
    print("\n".join(files))


if __name__ == "__main__":
    run_job(main, __doc__)
