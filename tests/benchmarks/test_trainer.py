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
from ultra.data.collate import Collator, Sample
from ultra.model.encoders import FrozenEncoders
from ultra.model.language import LanguageBranch
from ultra.model.llava_ultra import LlavaUltra
from ultra.model.strategies import num_visual_tokens
from ultra.train.batches import to_inputs


def test_an_exam_has_the_same_loss_on_both_sides(tmp_path) -> None:
    make_language(tmp_path / "language", 64, 2)
    config = trainer.configure(tmp_path, 2, "model.selection.strategy=first")
    write_exams(config)
    groups = trainer.read_groups(config)
    encoders = FrozenEncoders(config.model)
    model = LlavaUltra(config.model, LanguageBranch(config.model.language)).eval()
    theirs = trainer.OneFrameModel(model, encoders)
    tokenizer, language = model.language.tokenizer, config.model.language
    collate = Collator(
        tokenizer, language.template, partial(num_visual_tokens, config.model), language.max_length
    )
    rows = trainer.Rows(groups[:1], "instruct", every_frame=False)
    conversations = [conversation for _, conversation, _ in rows.rows]
    every = trainer.Rows(groups[:1], "instruct", every_frame=True)
    assert len(every) == len(groups[0].frames) * len(rows) > len(rows) > 1
    with torch.no_grad():
        losses = [
            theirs(**trainer.collate(config, encoders, tokenizer, [row]))["loss"]
            for row in rows.rows
        ]
        batch = collate([Sample(groups[0], conversations, None)])
        ours = model(**to_inputs(batch, encoders, torch.device("cpu")))["language"]
    # Here an exam's conversations are one row, whose loss is the mean of theirs.
    torch.testing.assert_close(ours, torch.stack(losses).mean(), rtol=1e-5, atol=1e-5)


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
