"""Which unfinished runs may be gone on with: other machines may, another run may not."""

from __future__ import annotations

import pytest

from ultra.config import load
from ultra.train.claim import find_difference

BASE = ["root=/r", "data.patient_key_secret=s"]


@pytest.mark.parametrize(
    ("overrides", "difference"),
    [
        ([], ""),
        (["train.num_workers=1", "train.zero.stage=3", "train.micro_batch_size=6"], ""),
        (["train.checkpoint_every=7", "train.keep_last=2", "tracking.uri="], ""),
        (["data.patient_key_secret=other"], ""),  # written nowhere, so it cannot differ
        (["train.batch_size=48"], "train.batch_size"),
        (["train.seed=1"], "train.seed"),
        (["train.stages.1.learning_rate=1"], "train.stages"),
        (["model.selection.temperature=0.5"], "model.selection"),
        (["data.site_cue=false"], "data.site_cue"),
    ],
)
def test_the_first_key_that_makes_it_another_run_is_named(overrides, difference) -> None:
    claimed = load("tiny", BASE).to_yaml()
    assert find_difference(claimed, load("tiny", [*BASE, *overrides])) == difference


def test_what_another_version_wrote_is_another_run() -> None:
    assert find_difference("name: other\n", load("tiny", BASE)) == "its keys"
