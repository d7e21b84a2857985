"""Pictures of validation exams in training: which exams, when, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from tests.data.exam_tables import make_exam, write_exams
from tests.model.encoder_weights import png
from ultra.config import PipelineConfig, parse
from ultra.data import parquet, stream
from ultra.data.features import features_uris, write_features
from ultra.model.encoders import FrozenEncoders, cache_key
from ultra.model.language import LanguageBranch
from ultra.model.llava_ultra import LlavaUltra
from ultra.model.trainable import select_trainable
from ultra.tracking import NullTracker
from ultra.train.batches import collator_of, to_inputs
from ultra.train.loop import Schedule, Teaching, run_stage
from ultra.train.stage import StageRun
from ultra.train.understanding import PictureLog, ends_epoch, explain, open_exams

SPLITS = ["train", "validation", "train", "validation", "validation", "test", "train"]
NUM_TRAIN, NUM_STEPS, T = 3, 5, 4
EMPTY = "exam-3"
"""A validation exam that no stage asks anything about."""


class PlainEngine:
    """Takes steps with torch alone, on the CPU."""

    device = torch.device("cpu")

    def __init__(self, model: LlavaUltra) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)

    def __call__(self, **inputs: Any) -> dict[str, torch.Tensor]:
        return self.model(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def set_learning_rate(self, rate: float) -> None:
        self.optimizer.param_groups[0]["lr"] = rate

    def alpha(self) -> float:
        return self.model.fusion.alpha[0].item()

    def gather(self, parameters: Any) -> Any:
        return nullcontext()


class Tracker(NullTracker):
    """Keeps the figures it is given."""

    run_id = "run"

    def __init__(self) -> None:
        self.figures: dict[str, Figure] = {}

    def figure(self, name: str, figure: Figure) -> None:
        self.figures[name] = figure


@pytest.fixture(scope="module")
def config(random_config: PipelineConfig) -> PipelineConfig:
    raw = random_config.model_dump(mode="json")
    raw["train"] |= {"batch_size": 2, "micro_batch_size": 2, "explained_exams": 3}
    raw["model"]["selection"] |= {"gradient": "gumbel"}  # draws in every step
    raw["model"]["language"]["lora"] |= {"dropout": 0.3}
    return parse(raw | {"tracking": {"uri": "sqlite:///nowhere.db"}})


@pytest.fixture(scope="module")
def uris(config: PipelineConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The exams in two parts, and the cache of their features."""
    folder: Path = tmp_path_factory.mktemp("exams")
    rng = np.random.default_rng(0)
    exams = []
    for i, split in enumerate(SPLITS):
        frames = tuple(png(rng.integers(0, 256, (20, 26, 3))) for _ in range(2 + i % 3))
        exam = make_exam(i, split, frames)
        exams.append(replace(exam, conversations=()) if exam.exam_id == EMPTY else exam)
    parts = write_exams(folder / "exams", [exams[:4], exams[4:]])
    cache = str(folder / cache_key(config.model))
    encoders = FrozenEncoders(config.model)
    for part in parts:
        for index, target in enumerate(features_uris(part, cache)):
            write_features(part, index, target, encoders)
    return str(folder / "exams"), cache


def open_source(config: PipelineConfig, uris: tuple[str, str], use: str) -> stream.Source:
    data = config.data.model_copy(update={"exams_uri": uris[0]})
    return stream.open_source(data, uris[1], use)


def begin(config: PipelineConfig, stage: int = 1) -> StageRun:
    torch.manual_seed(0)
    model = LlavaUltra(config.model, LanguageBranch(config.model.language)).train()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.2)  # a LoRA whose dropout is felt
    select_trainable(model, config.train.stages[stage].trainable)
    schedule = Schedule(0, NUM_STEPS, 1, lambda step: 1e-2)
    teaching = Teaching("none", 0)
    engine: Any = PlainEngine(model)
    return StageRun(config, config.train.stages[stage], model, engine, teaching, schedule, {})


def batches(run: StageRun, source: stream.Source) -> Iterator[dict[str, Any]]:
    collate = collator_of(run)
    rows = stream.read_split(source, "train", NUM_TRAIN)
    samples = [stream.to_sample(row, run.stage, 0, T, "float16") for row in rows]
    while True:
        for i in range(NUM_TRAIN):
            yield to_inputs(collate([samples[i], samples[i - 1]]), None, torch.device("cpu"))


def train(config, uris, tracker, num_pictures: int) -> tuple[list[dict[str, float]], StageRun]:
    train = config.train.model_copy(update={"explained_exams": num_pictures})
    run = begin(config.model_copy(update={"train": train}))
    source = open_source(config, uris, "require")
    pictures = PictureLog(run, source, tracker)
    rows: list[dict[str, float]] = []

    def report(step: int, metrics: dict[str, float]) -> None:
        rows.append(metrics)
        pictures.add(step)
        assert all(module.training for module in run.model.modules())

    run_stage(run.engine, batches(run, source), run.schedule, run.teaching, report)
    return rows, run


def test_training_goes_on_exactly_as_without_pictures(config, uris) -> None:
    tracker = Tracker()
    with_them, one = train(config, uris, tracker, 3)
    without, other = train(config, uris, Tracker(), 0)
    assert with_them == without
    assert len({row["loss"] for row in without}) == NUM_STEPS
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name]), name
    # Two of three exams a step: passes end in steps 2, 3 and 5, the last of the stage.
    names = [f"understanding/instruct-{s:06d}/exam-{e}" for s in (2, 3, 5) for e in (1, 4)]
    assert list(tracker.figures) == names
    titles = {name: [a.get_title() for a in f.axes] for name, f in tracker.figures.items()}
    assert len([t for t in titles[names[0]] if t.startswith("frame ")]) == 3
    assert titles[names[0]] != titles[names[-2]]  # the same exam, later


@pytest.mark.parametrize(
    ("batch_size", "num_exams", "steps"),
    [(2, 3, [2, 3, 5, 6, 8]), (4, 8, [2, 4, 6, 8]), (8, 4, list(range(1, 9))), (1, 99, [])],
)
def test_where_passes_end(batch_size, num_exams, steps) -> None:
    assert [s for s in range(1, 9) if ends_epoch(s, batch_size, num_exams)] == steps


def test_a_stage_that_ends_within_a_pass_is_shown_too(config, uris) -> None:
    run, tracker = begin(config, stage=0), Tracker()
    source = replace(open_source(config, uris, "auto"), num_exams=1000)
    pictures = PictureLog(run, source, tracker)
    for step in range(1, NUM_STEPS + 1):
        pictures.add(step)
    assert list(tracker.figures) == [
        f"understanding/align-00000{NUM_STEPS}/exam-{e}" for e in (1, 4)
    ]


def test_features_and_pixels_are_understood_alike(config, uris) -> None:
    run = begin(config)
    found = {}
    for use in ("require", "pixels"):
        exams = open_exams(run, open_source(config, uris, use), 3)
        assert [exam.group.exam_id for exam in exams] == ["exam-1", "exam-4"]  # 3 asks nothing
        assert [len(exam.group.frames) for exam in exams] == [3, 3]
        found[use] = [explain(run, exam) for exam in exams]
    for cached, seen in zip(found["require"], found["pixels"], strict=True):
        assert cached.chosen == seen.chosen
        np.testing.assert_allclose(cached.token_scores_KT, seen.token_scores_KT, atol=5e-3)
        np.testing.assert_allclose(cached.attention_T, seen.attention_T, atol=5e-4)


@pytest.mark.parametrize("strategy", ["all", "composite"])
def test_other_strategies(config, uris, strategy) -> None:
    raw = config.model_dump(mode="json")
    raw["model"]["selection"]["strategy"] = strategy
    changed, tracker = parse(raw), Tracker()
    run = begin(changed)
    PictureLog(run, open_source(changed, uris, "pixels"), tracker).add(NUM_STEPS)
    shown = [[a for a in f.axes if "frame " in a.get_title()] for f in tracker.figures.values()]
    assert [len(axes) for axes in shown] == ([2, 2] if strategy == "composite" else [4, 4])


def test_without_validation_exams_or_tracking_there_is_nothing(config, uris, tmp_path) -> None:
    parts = write_exams(tmp_path / "exams", [[make_exam(i) for i in range(3)]])
    data = config.data.model_copy(update={"exams_uri": str(tmp_path / "exams")})
    assert parquet.part_uris(data.exams_uri) == parts
    run, tracker = begin(config), Tracker()
    PictureLog(run, stream.open_source(data, "nowhere", "pixels"), tracker).add(NUM_STEPS)
    assert tracker.figures == {}
    source = open_source(config, uris, "require")
    untracked = config.model_copy(
        update={"tracking": config.tracking.model_copy(update={"uri": ""})}
    )
    assert PictureLog(begin(untracked), source, NullTracker()).exams == []
    # A worker that does not track computes with the others.
    assert len(PictureLog(begin(config), source, NullTracker()).exams) == 2
