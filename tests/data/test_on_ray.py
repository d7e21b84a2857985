"""The stream of training rows on a real Ray cluster."""

from __future__ import annotations

import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest

from tests.data.exam_tables import make_exam, write_exams
from ultra.data import stream


@pytest.mark.parametrize("num_workers", [2, 3])
def test_a_step_has_the_same_exams_however_many_workers_share_it(
    ray_cluster: None, tmp_path: Path, num_workers: int
) -> None:
    from ultra.data.on_ray import stream_rows

    batch, cut = 6, 2
    write_exams(tmp_path / "exams", [[make_exam(i) for i in range(11)], [make_exam(11)]])
    pieces = stream.list_pieces(str(tmp_path / "exams"), "")
    pieces = [replace(piece, features_uri="") for piece in pieces]
    windows = list(stream.plan_windows(pieces, 3, 0, num_epochs=3))
    rows = [(row["epoch"], row["exam_id"]) for w in windows for row in stream.read_window(w, ())]
    steps = [set(rows[start : start + batch]) for start in range(0, 24, batch)]

    def take(share: Any, count: int) -> list[list[tuple[int, str]]]:
        tables = share.iter_batches(batch_size=batch // num_workers, batch_format="pyarrow")
        found = []
        for table in islice(tables, count):
            found.append([(row["epoch"], row["exam_id"]) for row in table.to_pylist()])
        return found

    def read(seen: Collection[tuple[int, str]], count: int) -> list[set[tuple[int, str]]]:
        shares = stream_rows(windows, seen, num_workers, batch)
        with ThreadPoolExecutor(num_workers) as pool:
            found = list(pool.map(lambda share: take(share, count), shares))
        return [set(chain.from_iterable(parts)) for parts in zip(*found, strict=True)]

    assert read((), 4) == steps
    seen = set().union(*steps[:cut])  # as if the run had been cut off there
    assert read(seen, 4 - cut) == steps[cut:]


def test_the_control_loop_rests_between_its_steps(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ultra.data import on_ray

    steps_s: list[float] = []
    rest = on_ray.Rest.on_execution_step

    def count(self: Any, executor: Any) -> None:
        rest(self, executor)
        steps_s.append(time.perf_counter())

    monkeypatch.setattr(on_ray.Rest, "on_execution_step", count)
    write_exams(tmp_path / "exams", [[make_exam(i) for i in range(5)]])
    pieces = stream.list_pieces(str(tmp_path / "exams"), "")
    pieces = [replace(piece, features_uri="") for piece in pieces]
    windows = list(stream.plan_windows(pieces, 3, 0, num_epochs=4))
    (rows,) = on_ray.stream_rows(windows, (), 1, 5)
    assert sum(table.num_rows for table in rows.iter_batches(batch_format="pyarrow")) == 20
    assert len(steps_s) > 3
    assert (steps_s[-1] - steps_s[0]) >= 0.01 * (len(steps_s) - 1)
