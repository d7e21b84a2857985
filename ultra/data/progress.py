"""How far a data job has come, as a line for people."""

from __future__ import annotations

from collections.abc import Mapping

EVERY_S = 5.0
"""Between two lines."""


def describe_progress(name: str, total: int, counts: Mapping[str, int], elapsed_s: float) -> str:
    """Return the progress of a job, e.g. `prepare: 1,200 of 10,000 exams (31/s), 4 min left`.

    Args:
        name: of the job.
        total: how many there are of the first of `counts`.
        counts: what is done so far, by name; `bytes` are those of the `frames`.
        elapsed_s: since the job began.
    """
    (unit, done), *others = ((what, count) for what, count in counts.items() if what != "bytes")
    parts = [f"{name}: {done:,} of {total:,} {unit} ({_rate(done, elapsed_s)})"]
    parts += [f"{count:,} {what} ({_rate(count, elapsed_s)})" for what, count in others if count]
    if counts.get("bytes") and counts.get("frames"):
        parts.append(f"{counts['bytes'] / counts['frames']:,.0f} bytes a frame")
    if 0 < done < total:
        parts.append(f"{_span(elapsed_s / done * (total - done))} left")
    return ", ".join(parts)


def _rate(count: int, elapsed_s: float) -> str:
    rate = count / elapsed_s if elapsed_s else 0.0
    return f"{rate:.1f}/s" if rate < 10 else f"{rate:,.0f}/s"


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
