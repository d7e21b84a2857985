"""The steps of a stage with a plain torch engine: no DeepSpeed, no Ray, no cluster."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from ultra.config import StageConfig
from ultra.data.collate import Collator, Sample
from ultra.model.encoders import FrozenEncoders
from ultra.model.language import LanguageBranch
from ultra.model.llava_ultra import LlavaUltra
from ultra.model.strategies import num_visual_tokens
from ultra.model.teacher import AttentionTeacher
from ultra.model.trainable import select_trainable
from ultra.train.batches import encode_batch, to_inputs
from ultra.train.loop import Schedule, Teaching, run_stage
from ultra.train.schedule import learning_rate
from ultra.types import Conversation, FrameGroup, Turn

T, CLIP, SAM = 4, 20, 36
PARTS = ("projectors", "alpha", "scorer", "lora")


class EagerEngine:
    """What DeepSpeed does on one worker, in torch: accumulate, clip, step."""

    def __init__(self, model: LlavaUltra, accumulation: int = 1) -> None:
        self.model, self.accumulation = model, accumulation
        select_trainable(model, PARTS)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1.0, weight_decay=0)
        self.rates: list[float] = []
        self.inputs: list[dict] = []
        self.num_forwards = 0

    def __call__(self, **inputs):
        self.inputs.append(inputs)
        return self.model(**inputs)

    def backward(self, loss) -> None:
        (loss / self.accumulation).backward()

    def step(self) -> None:
        self.num_forwards += 1
        if self.num_forwards % self.accumulation == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def set_learning_rate(self, rate: float) -> None:
        self.rates.append(rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def alpha(self) -> float | None:
        return float(self.model.fusion.alpha.detach()[0])


@pytest.fixture
def model(random_config) -> LlavaUltra:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return LlavaUltra(random_config.model, LanguageBranch(random_config.model.language)).train()


def make_samples(num_frames: tuple[int, ...] = (3, 1, 2)) -> list[Sample]:
    rng = np.random.default_rng(0)
    samples = []
    for i, count in enumerate(num_frames):
        group = FrameGroup(
            exam_id=f"exam-{i}",
            patient_key="p",
            site="肝",
            findings="肝左叶见囊肿" if i % 2 else "肝右叶未见结节",
            diagnosis="囊肿",
            frames=(),
            frame_sizes=((8, 6),) * count,
            frame_sources=("cine",) * count,
        )
        answer = "囊肿" if i % 2 else "正常，边界清"
        turns = (Turn("user", "左叶见？"), Turn("assistant", answer))
        features = {
            name: rng.normal(size=(count, T, width)).astype(np.float16)
            for name, width in (("clip", CLIP), ("sam", SAM))
        }
        samples.append(Sample(group, [Conversation("align", "t", turns)], features))
    return samples


def make_batches(model, sizes: tuple[tuple[int, ...], ...] = ((3, 1, 2),)):
    config = model.config
    collator = Collator(
        model.language.tokenizer,
        "plain",
        partial(num_visual_tokens, config),
        config.language.max_length,
    )
    batches = [to_inputs(collator(make_samples(s)), None, torch.device("cpu")) for s in sizes]
    return itertools.cycle(batches)


def make_schedule(num_steps: int, rate: float = 5e-3, **values) -> Schedule:
    return Schedule(
        **{
            "first": 0,
            "num_steps": num_steps,
            "accumulation": 1,
            "learning_rate": lambda step: rate,
            **values,
        }
    )


NO_TEACHING = Teaching("none", 0)


def run(model, schedule, teaching=NO_TEACHING, accumulation=1, batches=None):
    engine = EagerEngine(model, accumulation)
    reported: list[tuple[int, dict]] = []
    batches = make_batches(model) if batches is None else batches
    run_stage(engine, batches, schedule, teaching, lambda *step: reported.append(step))
    return engine, reported


def test_losses_fall_and_every_number_is_reported(model) -> None:
    alpha = float(model.fusion.alpha.detach()[0])
    _, reported = run(model, make_schedule(25))
    assert [step for step, _ in reported] == list(range(1, 26))
    losses = [metrics["loss"] for _, metrics in reported]
    vocabulary = len(model.language.embedding.weight)
    assert losses[0] == pytest.approx(np.log(vocabulary), rel=0.05)  # it knows nothing
    assert losses[-1] < losses[0] - 0.3  # the frozen head's small weights allow about 0.5
    names = {"loss", "language", "redundancy", "entropy", "learning_rate", "alpha"}
    assert {frozenset(metrics) for _, metrics in reported} == {frozenset(names)}
    assert reported[-1][1]["alpha"] == float(model.fusion.alpha.detach()[0]) != alpha


def test_the_schedules_rates_are_applied_and_reported(model) -> None:
    stage = StageConfig(name="align", trainable=("scorer",), steps=6, learning_rate=4e-3)
    schedule = make_schedule(6, learning_rate=partial(learning_rate, num_steps=6, stage=stage))
    engine, reported = run(model, schedule)
    # No warm-up in so few steps: a half cosine from the top.
    expected = [4e-3 * (1 + np.cos(np.pi * step / 6)) / 2 for step in range(6)]
    assert engine.rates == pytest.approx(expected)
    assert [metrics["learning_rate"] for _, metrics in reported] == pytest.approx(expected)
    assert engine.optimizer.param_groups[0]["lr"] == engine.rates[-1]


def test_a_step_takes_its_forward_passes_and_reports_their_mean(model) -> None:
    sizes = ((3, 1), (2, 2))
    with torch.no_grad():
        inputs = make_batches(model, sizes)
        alone = [float(model(**next(inputs))["loss"]) for _ in range(2)]
    schedule = make_schedule(3, accumulation=2, learning_rate=lambda step: 0.0)
    engine, reported = run(model, schedule, accumulation=2, batches=make_batches(model, sizes))
    assert engine.num_forwards == 6
    assert len(engine.rates) == 3
    for _, metrics in reported:
        assert metrics["loss"] == pytest.approx(np.mean(alone), rel=1e-5)


@pytest.mark.parametrize("first", [0, 2])
def test_a_loss_that_is_no_number_names_its_step(model, first) -> None:
    batches = [next(make_batches(model)) for _ in range(3)]
    broken = {name: features.clone() for name, features in batches[2]["features"].items()}
    broken["clip"][0, 0, 0, 0] = float("nan")
    batches[2] = {**batches[2], "features": broken}
    schedule = make_schedule(9, first=first, offset=40)
    reported: list[int] = []
    with pytest.raises(FloatingPointError, match=f"the loss is nan at step {42 + first}"):
        run_stage(
            EagerEngine(model),
            iter(batches),
            schedule,
            NO_TEACHING,
            lambda step, _: reported.append(step),
        )
    assert reported == [first + 1, first + 2]


def test_going_on_begins_at_the_first_step_left(model) -> None:
    rates = []
    schedule = make_schedule(7, first=4, learning_rate=lambda step: rates.append(step) or 1e-3)
    _, reported = run(model, schedule)
    assert rates == [4, 5, 6]
    assert [step for step, _ in reported] == [5, 6, 7]


@pytest.mark.parametrize(("offset", "first_taught"), [(0, 3), (2, 1), (5, 0)])
def test_teaching_starts_at_its_step_over_all_stages(model, offset, first_taught) -> None:
    teacher = AttentionTeacher(model.config, model.language)
    taken = []

    def snapshot() -> None:
        taken.append(len(engine.inputs))
        teacher.copy_from(model.fusion, model.language)

    teaching = Teaching("attention", 3, teacher, snapshot)
    engine = EagerEngine(model)
    reported: list[dict] = []
    run_stage(
        engine,
        make_batches(model, ((3, 1, 2), (2, 2, 3))),
        make_schedule(6, offset=offset, accumulation=2),
        teaching,
        lambda _, metrics: reported.append(metrics),
    )
    assert [metrics["redundancy"] > 0 for metrics in reported] == [
        step >= first_taught for step in range(6)
    ]
    taught = [bool(inputs.get("teach")) for inputs in engine.inputs]
    assert taught == [i // 2 >= first_taught for i in range(12)]
    assert taken == [2 * first_taught]  # once, before the first forward that needs it
    assert teaching.taken
    # The snapshot scores a batch alike however far the model has come since.
    scores = [inputs["teacher_BK"] for inputs in engine.inputs[2 * first_taught :: 2]]
    assert all(torch.equal(score, scores[0]) for score in scores)
    assert scores[0].shape == (3, 3)


def test_a_snapshot_from_a_checkpoint_is_not_taken_again(model) -> None:
    teacher = AttentionTeacher(model.config, model.language)
    teacher.copy_from(model.fusion, model.language)

    def snapshot() -> None:
        raise AssertionError("there is one already")

    teaching = Teaching("attention", 0, teacher, snapshot, taken=True)
    _, reported = run(model, make_schedule(2), teaching)
    assert all(metrics["redundancy"] > 0 for _, metrics in reported)


def test_the_likelihood_teacher_needs_no_snapshot(random_config, model) -> None:
    selection = random_config.model.selection.model_copy(update={"teacher": "likelihood"})
    model.config = model.config.model_copy(update={"selection": selection})
    _, reported = run(model, make_schedule(3), Teaching("likelihood", 1))
    assert [metrics["redundancy"] > 0 for _, metrics in reported] == [False, True, True]


def test_a_run_cut_in_two_draws_as_one_that_was_not(random_config) -> None:
    selection = random_config.model.selection.model_copy(update={"gradient": "gumbel"})
    config = random_config.model.model_copy(update={"selection": selection})

    def losses(*spans: tuple[int, int]) -> list[float]:
        torch.manual_seed(0)
        model = LlavaUltra(config, LanguageBranch(config.language)).train()
        engine, found = EagerEngine(model), []
        for first, end in spans:
            torch.manual_seed(99 + first)  # whatever a restart leaves behind
            batches = make_batches(model)
            schedule = make_schedule(end, first=first, seed=3)
            run_stage(
                engine,
                batches,
                schedule,
                NO_TEACHING,
                lambda _, metrics: found.append(metrics["loss"]),
            )
        return found

    assert losses((0, 3), (3, 6)) == losses((0, 6))


def test_pixels_and_features_are_the_same_inputs(random_config, model) -> None:
    encoders = FrozenEncoders(random_config.model)
    rng = np.random.default_rng(1)

    def make_frame() -> bytes:
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(file, "PNG")
        return file.getvalue()

    groups = [tuple(make_frame() for _ in range(count)) for count in (3, 1)]
    samples = make_samples((3, 1))
    collator = Collator(model.language.tokenizer, "plain", lambda k: T, 400)
    with_frames = [
        Sample(replace(s.group, frames=g), s.conversations, None)
        for s, g in zip(samples, groups, strict=True)
    ]
    with_features = [
        Sample(s.group, s.conversations, encoders([g])[0])
        for s, g in zip(samples, groups, strict=True)
    ]
    cpu = torch.device("cpu")
    pixels = to_inputs(collator(with_frames), encoders, cpu)
    cached = to_inputs(collator(with_features), None, cpu)
    assert pixels.keys() == cached.keys()
    for name, expected in cached["features"].items():
        assert pixels["features"][name].shape == (2, 3, T, {"clip": CLIP, "sam": SAM}[name])
        assert (pixels["features"][name][1, 1:] == 0).all()
        torch.testing.assert_close(pixels["features"][name], expected, rtol=1e-2, atol=1e-3)
    losses = [float(model(**inputs)["loss"].detach()) for inputs in (pixels, cached)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    encoded = encode_batch(collator(with_frames), encoders, cached["frame_mask_BK"])
    assert encoded["clip"].dtype == torch.float16


def test_layers_computed_again_give_the_same_gradients_and_keep_less(model) -> None:
    inputs = next(make_batches(model))
    select_trainable(model, PARTS)
    kept, gradients = [], []
    for again in (False, True):
        if again:
            model.language.base.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, sizes=sizes: sizes.append(tensor.numel()) or tensor, lambda t: t
        ):
            loss = model(**inputs)["loss"]
        loss.backward()
        kept.append(sum(sizes))
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)
    assert kept[1] < kept[0] / 2


def test_a_report_may_end_the_stage(model) -> None:
    taken = []
    schedule = Schedule(0, 5, 1, lambda step: 0.1)

    def report(step, metrics) -> bool:
        taken.append(step)
        return step == 2

    run_stage(EagerEngine(model), make_batches(model), schedule, Teaching("none", 0), report)
    assert taken == [1, 2]
