"""Bring exams in, de-identified, as frame-group Parquet, and write their data card.

    ray job submit --working-dir . -- python -m ray_jobs.prepare --set root=$PWD/runs/tiny

With `--strict` a missing image is an error; without, its exam goes to quarantine.
"""

from ultra.cli import run_job
from ultra.config import PipelineConfig
from ultra.data.card import describe, write_card
from ultra.data.on_ray import prepare
from ultra.tracking import open_run


def main(config: PipelineConfig) -> None:
    """Run the job."""
    title = f"Data card of {config.name}"
    with open_run(config, "prepare") as tracker:
        counts = prepare(config.data)
        card = describe(config.data, counts)
        page = write_card(card, config.data, title)
        tracker.metrics(card.metrics())
        tracker.table("quarantine_reasons", counts.reason_rows())
        tracker.text("data_card.html", card.to_html(title))
    print(counts.summary())
    print(f"exams: {config.data.exams_uri}, quarantine: {config.data.quarantine_uri}, card: {page}")


if __name__ == "__main__":
    run_job(main, __doc__, flags={"--strict": "data.strict=true"})
