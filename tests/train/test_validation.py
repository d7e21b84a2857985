"""Loss per token and choice of frames over the validation split, shared by workers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.data.exam_tables import make_exam, write_exams
from tests.model.encoder_weights import png
from ultra.config import ConfigError
from ultra.data import stream
from ultra.model.encoders import FrozenEncoders
from ultra.model.language import LanguageBranch
from ultra.model.llava_ultra import LlavaUltra
from ultra.train.batches import collator_of, to_inputs
from ultra.train.validation import LOSS, SELECTION, Validation, gradable, list_places

NUM = 7
"""Exams of the validation split, among two of training; odd, so two workers share unequally."""


def make_exams() -> list:
    generator = torch.Generator().manual_seed(3)
    exams = []
    for number in range(NUM + 2):
        count = 1 + number % 3
        frames = tuple(
            png(torch.randint(0, 256, (19, 11, 3), generator=generator).numpy().astype("uint8"))
            for _ in range(count)
        )
        exam = make_exam(number, "train" if number in (2, 5) else "validation", frames)
        valid = (True, False, False)[:count] if number != 4 else None
        exams.append(replace(exam, valid=valid))
    return exams


@pytest.fixture
def source(tmp_path: Path) -> stream.Source:
    exams = make_exams()
    parts = write_exams(tmp_path / "exams", [exams[:5], exams[5:]])
    pieces = [
        stream.Piece(part, group)
        for part in parts
        for group in range(len(stream.features_uris(part, "")))
    ]
    return stream.Source(tuple(pieces), False, 2)


@pytest.fixture
def run(random_config) -> Any:
    torch.manual_seed(0)
    model = LlavaUltra(random_config.model, LanguageBranch(random_config.model.language)).train()
    torch.nn.init.normal_(model.scorer.weight)

    class Engine:
        device = torch.device("cpu")

        def __call__(self, **inputs):
            return model(**inputs)

    train = random_config.train.model_copy(update={"micro_batch_size": 2})
    return SimpleNamespace(
        config=random_config.model_copy(update={"train": train}),
        stage=random_config.train.stages[1], model=model, engine=Engine(),
        schedule=SimpleNamespace(seed=0),
    )  # fmt: skip


def expected(run: Any, source: stream.Source, encoders: FrozenEncoders) -> tuple[float, float]:
    """Loss per token and accuracy, exam by exam, by the model's own logits."""
    nats, tokens, right, known = 0.0, 0, 0, 0
    model, config = run.model.eval(), run.config.model
    for row in stream.read_split(source, "validation", 99):
        sample = stream.to_sample(row, run.stage, 0, config.tokens_per_frame, config.vision.dtype)
        batch = collator_of(run)([sample])
        inputs = to_inputs(batch, encoders, torch.device("cpu"))
        with torch.no_grad():
            visual = model.fusion(inputs["features"])
            scores = model.scorer(visual, inputs["frame_mask_BK"])
            chosen = int(scores[0].argmax())
            ids, labels = inputs["input_ids_BS"][0], inputs["labels_BS"][0]
            embeds = model.language.embedding(ids.clamp(min=0))
            embeds[ids == -1] = visual[0, chosen].to(embeds.dtype)
            logits = model.language.model(inputs_embeds=embeds[None]).logits[0]
        for place in range(1, len(ids)):
            if labels[place] != -100:
                nats -= float(torch.log_softmax(logits[place - 1], -1)[labels[place]])
                tokens += 1
        valid = sample.group.valid
        if valid is not None and len(valid) > 1:
            right, known = right + valid[chosen], known + 1
    model.train()
    return nats / tokens, right / known


def test_it_is_the_mean_over_all_tokens_of_the_split(run, source) -> None:
    encoders = FrozenEncoders(run.config.model)
    loss, accuracy = expected(run, source, encoders)
    metrics = Validation(run, source, encoders, 0, 1).measure()
    assert metrics == {LOSS: pytest.approx(loss, rel=1e-5), SELECTION: pytest.approx(accuracy)}
    assert run.model.training
    assert all(p.grad is None for p in run.model.parameters())


def test_workers_share_the_exams_and_take_as_many_forward_passes(run, source, monkeypatch) -> None:
    encoders = FrozenEncoders(run.config.model)
    whole = Validation(run, source, encoders, 0, 1).measure()
    shares: list[torch.Tensor] = []
    forwards = []
    for rank in range(3):
        found: list[torch.Tensor] = []
        monkeypatch.setattr(
            "ultra.train.validation.add_up", lambda sums, f=found: f.append(sums) or sums
        )
        validation = Validation(run, source, encoders, rank, 3)
        validation.measure()
        shares += found
        forwards.append(validation.num_forwards)
    assert forwards == [2, 2, 2]
    nats, tokens, right, known = torch.stack(shares).sum(0).tolist()
    assert whole[LOSS] == pytest.approx(nats / tokens, rel=1e-5)
    assert whole[SELECTION] == pytest.approx(right / known)


def test_more_workers_than_exams(run, source) -> None:
    limited = run.config.train.model_copy(update={"validation_exams": 1})
    run.config = run.config.model_copy(update={"train": limited})
    encoders = FrozenEncoders(run.config.model)
    alone = Validation(run, source, encoders, 0, 1)
    idle = Validation(run, source, encoders, 1, 2)
    assert (len(alone.own), len(idle.own), idle.num_forwards) == (1, 0, 1)
    assert alone.measure()[LOSS] > 0


def test_a_split_without_exams_is_refused(run, source) -> None:
    empty = stream.Source((), False, 2)
    with pytest.raises(ConfigError, match="no exam in the validation split"):
        Validation(run, empty, None, 0, 1)
    assert len(list_places(source)) == NUM


@pytest.mark.parametrize(
    ("valid", "pictures", "answer"),
    [
        (None, 2, False), ((True, True), 2, False), ((False, False), 2, False),
        ((True, False), 2, True), ((True, False), 1, False),
    ],
)  # fmt: skip
def test_a_choice_is_graded_where_it_can_be_wrong(valid, pictures, answer) -> None:
    assert gradable(valid, pictures) is answer
