"""Which exams were used, pass by pass, and the numbers of every step."""

from __future__ import annotations

import numpy as np

from ultra.model.checkpoint import Progress
from ultra.train.progress import StepLog, UsedExams
from ultra.types import Batch

EMPTY = np.zeros((1, 1), dtype=np.int64)


def make_batch(*used: tuple[int, str]) -> Batch:
    return Batch(
        exam_ids=tuple(exam for _, exam in used),
        epochs=tuple(epoch for epoch, _ in used),
        frames=None,
        features=None,
        frame_mask_BK=EMPTY.astype(bool),
        input_ids_BS=EMPTY,
        labels_BS=EMPTY,
        text_mask_BS=EMPTY.astype(bool),
        conversation_BS=EMPTY,
        findings_ids_BS=EMPTY,
        findings_mask_BS=EMPTY.astype(bool),
    )


def test_a_pass_is_forgotten_once_every_exam_was_used() -> None:
    used = UsedExams(Progress(), 3)
    assert used.merge() == (0, ())
    used.add(make_batch((0, "b"), (0, "a")))
    assert used.merge() == (0, ((0, "a"), (0, "b")))
    used.add(make_batch((0, "c"), (1, "b")))  # a batch may reach into the next pass
    assert used.merge() == (1, ((1, "b"),))


def test_several_passes_may_end_between_two_looks() -> None:
    used = UsedExams(Progress(), 2)
    used.add(make_batch((0, "a"), (0, "b"), (1, "a"), (1, "b"), (2, "b")))
    assert used.merge() == (2, ((2, "b"),))


def test_a_later_pass_does_not_end_an_earlier_one() -> None:
    used = UsedExams(Progress(), 2)
    used.add(make_batch((1, "a"), (1, "b"), (0, "a")))
    assert used.merge() == (0, ((0, "a"), (1, "a"), (1, "b")))
    used.add(make_batch((0, "b")))
    assert used.merge() == (2, ())


def test_an_exam_counts_once_however_often_it_came() -> None:
    used = UsedExams(Progress(), 2)
    used.add(make_batch((0, "a")))
    used.add(make_batch((0, "a")))
    assert used.merge() == (0, ((0, "a"),))


def test_it_goes_on_from_a_checkpoint() -> None:
    progress = Progress(stage=1, step=4, epoch=5, seen=((5, "a"), (6, "c")))
    used = UsedExams(progress, 3)
    used.add(make_batch((5, "b"), (5, "c")))
    assert used.merge() == (6, ((6, "c"),))


class Tracker:
    """Keeps what a tracker is told."""

    def __init__(self) -> None:
        self.rows: list[list] = []

    def series(self, rows) -> None:
        self.rows.append(rows)


def test_steps_are_reported_in_bundles_and_at_the_end(capsys) -> None:
    tracker = Tracker()
    log = StepLog(tracker, "align", num_steps=5, offset=100, batch_size=4, every=2)
    for step in range(1, 6):
        log.add(step, {"loss": step / 2, "alpha": 0.25})
    totals = [[total for total, _ in rows] for rows in tracker.rows]
    assert totals == [[101, 102], [103, 104], [105]]
    numbers = [metrics for rows in tracker.rows for _, metrics in rows]
    assert [m["loss"] for m in numbers] == [0.5, 1.0, 1.5, 2.0, 2.5]
    assert {m["alpha"] for m in numbers} == {0.25}
    assert ["samples_per_second" in m for m in numbers] == [False, True, False, True, True]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  loss")[0] for line in lines] == ["align 2/5", "align 4/5", "align 5/5"]
    assert "loss 2.500  alpha 0.250" in lines[-1]
