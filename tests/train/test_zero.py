"""DeepSpeed under Ray Train with two workers: curves, checkpoints, resumption, unequal groups."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ultra.config import PipelineConfig, parse

NUM_STEPS, CUT = 6, 4
"""CUT is past the warm-up of the teacher, which ends after three steps."""
TOLERANCE = 2e-4
"""Largest difference of a loss between ZeRO stages: they add gradients in another order."""


def batches(rank: int) -> Iterator[dict[str, Any]]:
    """Inputs of sizes that differ pairwise; groups of one frame on worker 1, of six on worker 0."""
    generator = torch.Generator().manual_seed(rank)
    num_frames = 1 if rank else 6
    while True:
        ids = torch.randint(5, 50, (2, 12), generator=generator)
        ids[:, 1:5] = -1
        labels = ids.clone()
        labels[:, :6] = -100
        yield {
            "features": {
                "clip": torch.randn(2, num_frames, 4, 20, generator=generator).half(),
                "sam": torch.randn(2, num_frames, 4, 36, generator=generator).half(),
            },
            "frame_mask_BK": torch.ones(2, num_frames, dtype=torch.bool),
            "input_ids_BS": ids,
            "labels_BS": labels,
            "text_mask_BS": torch.ones(2, 12, dtype=torch.bool),
            "findings_ids_BS": torch.randint(5, 50, (2, 7), generator=generator),
            "findings_mask_BS": torch.ones(2, 7, dtype=torch.bool),
        }


def interleave(*streams: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    while True:
        yield from (next(stream) for stream in streams)


def worker(settings: dict[str, Any]) -> None:
    """Take the steps of `instruct`, write a checkpoint and compare it with the model in memory."""
    import ray.train

    from ultra.model import checkpoint
    from ultra.model.checkpoint import Progress
    from ultra.model.understanding import understand
    from ultra.train.loop import run_stage
    from ultra.train.stage import begin_stage, write_stage

    torch.set_num_threads(1)
    rank = ray.train.get_context().get_world_rank()
    config, folder = parse(settings["config"]), Path(settings["folder"])
    start = checkpoint.read(settings["start"]) if settings["start"] else None
    progress = start.progress() if start else Progress(stage=1)
    base = checkpoint.describe_base(config.model)
    run = begin_stage(config, progress, start, 100, base)
    losses: list[tuple[float, float]] = []
    exam, understood = next(batches(0)), []  # the same on every worker

    def report(step: int, metrics: dict[str, float]) -> None:
        losses.append((metrics["loss"], metrics["redundancy"]))
        if settings["explain"]:
            found = understand(
                run.model.config, run.model.fusion, run.model.scorer, run.model.language,
                {name: f[:1].to(run.engine.device) for name, f in exam["features"].items()},
                exam["input_ids_BS"][0].tolist(), exam["labels_BS"][0].tolist(),
                gather=run.engine.gather,
            )  # fmt: skip
            arrays = (found.token_scores_KT, *found.encoder_scores.values(), found.attention_T)
            understood.append([array.tolist() for array in arrays])
        if step in (CUT, NUM_STEPS):
            target = folder if step == NUM_STEPS else folder / "cut"
            target.mkdir(parents=True, exist_ok=True)
            write_stage(run, target, Progress(1, step, step, 0, ((0, "a"), (0, "b"))), rank)

    # One worker alone reads in turn what two would read side by side.
    alone = config.train.num_workers == 1
    stream = interleave(batches(0), batches(1)) if alone else batches(rank)
    for _ in range(progress.step * config.train.gradient_accumulation):
        next(stream)
    run_stage(run.engine, stream, run.schedule, run.teaching, report)
    weights, moments = run.engine.weights(), run.engine.moments()
    if rank == 0:
        (folder / "losses.json").write_text(json.dumps(losses))
        (folder / "understood.json").write_text(json.dumps(understood))
        torch.save(weights, folder / "in_memory.pt")
        torch.save({"exp_avg_sq": moments.exp_avg_sq}, folder / "moments.pt")
    run.engine.close()


def train(
    config: PipelineConfig, folder: Path, zero: int, *, workers: int = 2, start: str = "",
    explain: bool = False,
) -> list[tuple[float, float]]:  # fmt: skip
    import ray.cloudpickle
    import ray.train
    from ray.train.torch import TorchTrainer

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers import no tests
    raw = config.model_dump(mode="json")
    stages = [{**stage, "steps": NUM_STEPS} for stage in raw["train"]["stages"]]
    raw["train"] |= {
        "zero": {"stage": zero}, "num_workers": workers, "batch_size": 4,
        "micro_batch_size": 2, "stages": stages,
    }  # fmt: skip
    raw["model"]["selection"]["teacher_warmup_steps"] = 3
    settings = {"config": raw, "folder": str(folder), "start": start, "explain": explain}
    TorchTrainer(
        worker,
        train_loop_config=settings,
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers, resources_per_worker={"CPU": 0.5}
        ),
        run_config=ray.train.RunConfig(name=folder.name, storage_path=str(folder.parent / "ray")),
    ).fit()
    losses: list[tuple[float, float]] = json.loads((folder / "losses.json").read_text())
    return losses


@pytest.fixture(scope="module")
def runs(
    ray_cluster: None, random_config: PipelineConfig, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("zero")
    for zero in (0, 2, 3):
        train(random_config, folder / f"zero{zero}", zero)
    return {zero: folder / f"zero{zero}" for zero in (0, 2, 3)}


def losses_of(folder: Path) -> torch.Tensor:
    return torch.tensor(json.loads((folder / "losses.json").read_text()))


def test_the_stages_of_zero_agree_and_groups_of_one_and_six_frames_do_not_hang(
    runs: dict[int, Path],
) -> None:
    plain = losses_of(runs[0])
    assert plain.shape == (NUM_STEPS, 2)
    assert (plain[:3, 1] == 0).all()
    assert (plain[3:, 1] > 0.5).all()  # six frames on worker 0: the teacher is felt
    for zero in (2, 3):
        assert (losses_of(runs[zero]) - plain).abs().max() < TOLERANCE


@pytest.mark.slow
def test_understanding_an_exam_after_every_step_changes_nothing(
    runs: dict[int, Path], random_config: PipelineConfig, tmp_path: Path
) -> None:
    understood = []
    for zero in (0, 3):
        train(random_config, tmp_path / f"zero{zero}", zero, explain=True)
        assert torch.equal(losses_of(tmp_path / f"zero{zero}"), losses_of(runs[zero]))
        weights = [torch.load(f / "in_memory.pt") for f in (tmp_path / f"zero{zero}", runs[zero])]
        assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
        understood.append(json.loads((tmp_path / f"zero{zero}" / "understood.json").read_text()))
    plain, partitioned = understood
    assert len(plain) == NUM_STEPS
    assert plain[0] != plain[-1]
    for ours, theirs in zip(plain, partitioned, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b), atol=2e-3, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_gradient_checkpointing_leaves_the_losses_as_they_are(
    runs: dict[int, Path], random_config: PipelineConfig, tmp_path: Path, zero: int
) -> None:
    settings = random_config.train.model_copy(update={"gradient_checkpointing": True})
    config = random_config.model_copy(update={"train": settings})
    train(config, tmp_path / "again", zero)
    assert (losses_of(tmp_path / "again") - losses_of(runs[zero])).abs().max() < 1e-6


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_checkpoint_is_the_model_in_memory(
    runs: dict[int, Path], random_config: PipelineConfig, zero: int
) -> None:
    from ultra.model import checkpoint
    from ultra.model.teacher import AttentionTeacher

    folder = runs[zero]
    in_memory = torch.load(folder / "in_memory.pt")
    model = checkpoint.load_model(str(folder))
    loaded = dict(model.named_parameters())
    assert {n for n in loaded if n.startswith(("fusion.", "scorer."))} < in_memory.keys()
    for name, tensor in in_memory.items():
        assert torch.equal(loaded[name], tensor), name
    moments = checkpoint.read(str(folder)).moments()
    assert moments.masters.keys() == in_memory.keys()
    for name, tensor in torch.load(folder / "moments.pt")["exp_avg_sq"].items():
        assert torch.equal(moments.exp_avg_sq[name], tensor), name
    state = checkpoint.read(str(folder)).teacher()
    assert state is not None
    AttentionTeacher(checkpoint.read(str(folder)).config.model, model.language).load_state_dict(
        state
    )


@pytest.mark.parametrize("zero", [2, 3])
def test_answers_of_a_reloaded_checkpoint_are_those_of_the_model_in_memory(
    runs: dict[int, Path], random_config: PipelineConfig, zero: int
) -> None:
    from ultra.model import checkpoint
    from ultra.model.language import LanguageBranch
    from ultra.model.llava_ultra import LlavaUltra

    reloaded = checkpoint.load_model(str(runs[zero])).eval()
    fresh = LlavaUltra(random_config.model, LanguageBranch(random_config.model.language)).eval()
    fresh.load_state_dict(torch.load(runs[zero] / "in_memory.pt"), strict=False)
    embeds = torch.randn(3, 8, 24, generator=torch.Generator().manual_seed(4))
    answers = [
        m.language.model.generate(
            inputs_embeds=embeds, max_new_tokens=9, do_sample=False, pad_token_id=2
        )
        for m in (reloaded, fresh)
    ]
    assert torch.equal(*answers)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after", "workers"), [(2, 3, 2), (3, 2, 2), (2, 0, 1)])
def test_a_run_resumes_under_another_stage_and_number_of_workers(
    runs: dict[int, Path],
    random_config: PipelineConfig,
    tmp_path: Path,
    before: int,
    after: int,
    workers: int,
) -> None:
    """The weights end as those of the run that was not cut off."""
    from ultra.model import checkpoint

    cut = runs[before] / "cut"
    progress = checkpoint.read(str(cut)).progress()
    assert (progress.step, progress.seen) == (CUT, ((0, "a"), (0, "b")))
    rest = train(random_config, tmp_path / "rest", after, workers=workers, start=str(cut))
    assert len(rest) == NUM_STEPS - CUT
    whole, resumed = (torch.load(f / "in_memory.pt") for f in (runs[0], tmp_path / "rest"))
    moved = dict(checkpoint.load_model(str(cut)).named_parameters())
    for name, tensor in whole.items():
        assert (tensor - resumed[name]).abs().max() < TOLERANCE, name
    assert max((whole[n] - moved[n].detach()).abs().max() for n in whole) > 5 * TOLERANCE


def with_precision(config: PipelineConfig, precision: str) -> PipelineConfig:
    """The configuration with a precision, and the language model's weights in bfloat16."""
    language = config.model.language.model_copy(update={"dtype": "bfloat16"})
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"language": language}),
            "train": config.train.model_copy(update={"precision": precision}),
        }
    )


@pytest.mark.slow
def test_auto_is_float32_where_there_is_no_gpu(
    ray_cluster: None, random_config: PipelineConfig, tmp_path: Path
) -> None:
    curves = [
        train(with_precision(random_config, precision), tmp_path / precision, 2, workers=1)
        for precision in ("auto", "float32")
    ]
    assert curves[0] == curves[1]
    weights = torch.load(tmp_path / "auto" / "in_memory.pt").values()
    assert {weight.dtype for weight in weights} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_run_goes_on_where_auto_is_another_precision(
    ray_cluster: None, random_config: PipelineConfig, tmp_path: Path, before: str, after: str
) -> None:
    """Masters are float32 under both, so all that differs is what the steps round."""
    from ultra.model import checkpoint

    whole = train(with_precision(random_config, before), tmp_path / "whole", 2, workers=1)
    cut = tmp_path / "whole" / "cut"
    config = with_precision(random_config, after)
    rest = train(config, tmp_path / "rest", 2, workers=1, start=str(cut))
    torch.testing.assert_close(torch.tensor(rest), torch.tensor(whole[CUT:]), atol=0.02, rtol=0)
    masters = [
        checkpoint.read(str(folder)).moments().masters
        for folder in (cut, tmp_path / "whole", tmp_path / "rest")
    ]
    moved = max((masters[1][name] - start).abs().max() for name, start in masters[0].items())
    apart = max((masters[1][name] - ours).abs().max() for name, ours in masters[2].items())
    assert apart < 0.5 * moved
    assert {m.dtype for state in masters for m in state.values()} == {torch.float32}
