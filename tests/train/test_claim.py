"""Which unfinished runs may be gone on with: other machines may, another run may not."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ultra.config import load
from ultra.train.claim import Claim, delete_claim, find_difference, read_claim, write_claim

BASE = ["root=/r", "data.patient_key_secret=s"]


@pytest.mark.parametrize(
    ("overrides", "difference"),
    [
        ([], ""),
        (["train.num_workers=1", "train.zero.stage=3", "train.micro_batch_size=6"], ""),
        (["train.checkpoint_every=7", "train.keep_last=2", "tracking.uri="], ""),
        (["data.patient_key_secret=other"], ""),  # written nowhere, so it cannot differ
        (["train.precision=bfloat16"], "train.precision"),
        (["train.batch_size=48"], "train.batch_size"),
        (["train.seed=1"], "train.seed"),
        (["train.stages.1.learning_rate=1"], "train.stages"),
        (["model.selection.temperature=0.5"], "model.selection"),
        (["data.site_cue=false"], "data.site_cue"),
    ],
)
def test_the_first_key_that_makes_it_another_run_is_named(overrides, difference) -> None:
    claim = Claim("", yaml.safe_load(load("tiny", BASE).to_yaml()))
    assert find_difference(claim, load("tiny", [*BASE, *overrides])) == difference


def test_a_claim_stands_until_it_is_deleted(tmp_path: Path) -> None:
    config = load("tiny", [f"root={tmp_path}"])
    assert read_claim(config) is None
    write_claim(config, "5e1f")
    claim = read_claim(config)
    assert claim is not None
    assert claim.run_id == "5e1f"
    assert find_difference(claim, config) == ""
    delete_claim(config)
    assert read_claim(config) is None


@pytest.mark.parametrize("content", ["name: other\n", "", "- a\n", "name: [\n"])
def test_what_another_version_wrote_is_another_run(content: str, tmp_path: Path) -> None:
    config = load("tiny", [f"root={tmp_path}"])
    write_claim(config, "")
    (tmp_path / "train" / "config.yaml").write_text(content)
    claim = read_claim(config)
    assert claim is not None
    assert find_difference(claim, config) == "its keys"
