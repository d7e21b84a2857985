"""The benchmark against the Trainer: both sides train the same model, and all of it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial

import pytest
import torch

from benchmarks import trainer
from benchmarks.features import write_exams
from benchmarks.stand import make_language
from tests.conftest import ROOT
from ultra.data.collate import Collator, Sample, pick_conversation
from ultra.model.encoders import FrozenEncoders
from ultra.model.language import LanguageBranch
from ultra.model.llava_ultra import LlavaUltra
from ultra.model.strategies import num_visual_tokens
from ultra.train.batches import to_inputs


def test_a_row_has_the_same_loss_on_both_sides(tmp_path) -> None:
    make_language(tmp_path / "language", 64, 2)
    config = trainer.configure(tmp_path, 2, "model.selection.strategy=first")
    write_exams(config)
    groups = trainer.read_groups(config)
    assert len(trainer.Rows(groups, every_frame=False)) == len(groups)
    assert len(trainer.Rows(groups, every_frame=True)) == sum(len(g.frames) for g in groups)
    encoders = FrozenEncoders(config.model)
    model = LlavaUltra(config.model, LanguageBranch(config.model.language)).eval()
    stage = config.train.stages[1]
    rows = [(groups[0], 0)]
    with torch.no_grad():
        inputs = trainer.collate(config, encoders, model, stage, rows)
        theirs = trainer.OneFrameModel(model, encoders)(**inputs)["loss"]
        collate = Collator(
            model.language.tokenizer,
            config.model.language.template,
            partial(num_visual_tokens, config.model),
            config.model.language.max_length,
        )
        conversation = pick_conversation(groups[0], stage.name, config.train.seed, 0)
        batch = collate([Sample(groups[0], conversation, None)])
        ours = model(**to_inputs(batch, encoders, torch.device("cpu")))["language"]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_way_runs() -> None:
    command = [sys.executable, "-m", "benchmarks.trainer", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    line = json.loads(done.stdout.splitlines()[-1])
    assert line.keys() == {
        "benchmark", "over_one_frame", "over_every_frame", "weak_scaling", "ultra_samples_per_s",
    }  # fmt: skip
    assert all(value > 0 for name, value in line.items() if name != "benchmark")
