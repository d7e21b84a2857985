"""A whole two-stage training by ultra, and by transformers' own Trainer.

    python -m benchmarks.trainer
    python -m benchmarks.trainer --quick   # small; prints its result and keeps nothing

Both train the same parts of the same model on all conversations of the same simulated exams: tiny
encoders, a random LLaMA of 256 channels and 6 layers, aligned for one epoch, instructed with LoRA
for another, as `llava-ultra-7b` does. The Trainer's model decodes and encodes frames in every step,
as LLaVA does; its rows are a conversation each, and padded. It shows the language model one frame
of an exam, or the text with every frame in turn, as prior practice has it. ultra encodes every
frame of every exam once, which is counted, and chooses among them, taught by attention; its rows
are an exam each, the conversations behind the frame they share. `tokens_per_batch` says how many
tokens, filling included, a forward pass of each has: ultra's has no more. A step is one pass; it
has more conversations of the second stage on ultra's side, which so takes fewer steps.

A sample is one conversation in one epoch, whatever frames it was shown with. Counted is everything
from the exams on disk to the final weights, each in a process of its own with as many threads as
there are cores, the processes in turn. Then follows what each measure brings, by leaving it out;
and what users run, the jobs on a Ray cluster, with one worker of one thread, and with two on twice
as many exams a step.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any
from unittest import mock

import ray
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from benchmarks.features import MANY_EPOCHS, cache_uri, encode, write_exams
from benchmarks.stand import make_language, spread, write_result
from ultra.config import PipelineConfig, StageConfig, load
from ultra.data import schema, stream
from ultra.data.collate import Collator, Sample, pad, pick_conversations
from ultra.data.encoding.on_ray import encode as encode_on_ray
from ultra.data.prompts import encode_conversation
from ultra.model.encoders import FrozenEncoders
from ultra.model.language import LanguageBranch, load_tokenizer
from ultra.model.llava_ultra import LlavaUltra
from ultra.model.packing import plan_packing
from ultra.model.pictures import decode
from ultra.model.splice import splice
from ultra.model.strategies import num_visual_tokens
from ultra.model.trainable import select_trainable
from ultra.tracking import read_history
from ultra.train.alone import fit_alone
from ultra.train.on_ray import fit
from ultra.types import IGNORED, Batch, Conversation, FrameGroup

ROWS = 24
"""Of the Trainer, in a step."""
EXAMS = 8
"""Of ultra, in a step."""
TWO_PASSES = f"train.micro_batch_size={EXAMS // 2}"
ROW_EACH = (
    "train.stages.0.conversations=one",
    "train.stages.0.epochs=2",
    "train.stages.1.conversations=one",
    "train.stages.1.epochs=8",
    f"train.batch_size={ROWS}",
    f"train.micro_batch_size={ROWS}",
)
MEASURES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "all": ((), ()),
    "from pixels in every step": (("train.features=pixels",), ()),
    "the text with every frame": (("model.selection.strategy=each",), ()),
    "no teacher": (("model.selection.teacher=none",), ()),
    "a row for each conversation": (ROW_EACH, ()),
    "two passes": ((TWO_PASSES,), ()),
    "two passes, no packing": ((TWO_PASSES,), ("packing",)),
    "two passes, no packing, no grouping": ((TWO_PASSES,), ("packing", "grouping")),
}
"""What is left out -> how: settings, and what is switched off below them."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    patients, rounds = (24, 1) if args.quick else (60, 3)
    measures = ("all", "two passes, no packing, no grouping") if args.quick else tuple(MEASURES)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        width, layers = (64, 2) if args.quick else (256, 6)
        make_language(root / "language", width, layers)
        config = configure(root, patients)
        write_exams(config)
        result = compare(root, patients, rounds) | {
            "tokens_per_batch": count_tokens(config),
            "measures": leave_out(root, patients, rounds, measures),
            "on_ray": scale(root, patients, rounds),
        }
    headline = {
        "over_one_frame": result["over_one_frame"]["median"],
        "over_every_frame": result["over_every_frame"]["median"],
        "weak_scaling": result["on_ray"]["weak_scaling"]["median"],
        "ultra_samples_per_s": result["samples_per_s"]["ultra"]["median"],
    }
    if args.quick:
        print(json.dumps({"benchmark": "trainer", **headline}))
    else:
        write_result("trainer", result, headline)


def configure(root: Path, patients: int, *overrides: str) -> PipelineConfig:
    """Return the tiny preset with a larger language model and the teacher of the large presets."""
    return load(
        "tiny",
        [
            f"root={root}",
            f"model.language.weights={root}/language",
            f"data.simulator.num_patients={patients}",
            "data.test_fraction=0",
            "data.validation_fraction=0",
            "data.row_group_mib=1",
            "model.selection.teacher=attention",
            "model.selection.teacher_warmup_steps=10",
            "train.stages.0={name: align, trainable: [projectors, alpha, scorer], epochs: 1, "
            "learning_rate: 1.0e-3, conversations: all}",
            "train.stages.1={name: instruct, trainable: [projectors, alpha, scorer, lora], "
            "epochs: 1, learning_rate: 1.0e-3, conversations: all}",
            "train.num_workers=1",
            f"train.batch_size={EXAMS}",
            f"train.micro_batch_size={EXAMS}",
            "train.explained_exams=0",
            "train.profile_steps=0",
            "tracking.uri=''",
            *overrides,
        ],
    )


def compare(root: Path, patients: int, rounds: int) -> dict[str, Any]:
    """Return samples per second of both Trainers and of ultra, and the ratios of each round."""
    ways: Mapping[str, Callable[[], float]] = {
        "trainer_every_frame": partial(run, train_by_trainer, root, patients, (), (), True),
        "trainer_one_frame": partial(run, train_by_trainer, root, patients, (), (), False),
        "ultra": partial(run, train_by_ultra, root, patients, (), ()),
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, train in ways.items():
            rates[way].append(train())
    ours = rates["ultra"]
    return {
        "samples_per_s": {way: spread(found, 1) for way, found in rates.items()},
        "over_one_frame": _ratios(ours, rates["trainer_one_frame"]),
        "over_every_frame": _ratios(ours, rates["trainer_every_frame"]),
    }


def leave_out(root: Path, patients: int, rounds: int, names: Sequence[str]) -> dict[str, Any]:
    """Return for each measure samples per second without it, and the share of all of them."""
    rates: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            settings, off = MEASURES[name]
            rates[name].append(run(train_by_ultra, root, patients, settings, off))
    return {
        name: {"samples_per_s": spread(found, 1), "of_all": _ratios(found, rates["all"])}
        for name, found in rates.items()
    }


def _ratios(some: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    return spread([a / b for a, b in zip(some, others, strict=True)], 2)


def run(
    train: Callable[..., float],
    root: Path,
    patients: int,
    settings: Sequence[str],
    off: Sequence[str],
    *args: Any,
) -> float:
    """Return what a training gives in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_run, train, root, patients, settings, off, *args).result()


def _run(
    train: Callable[..., float],
    root: Path,
    patients: int,
    settings: Sequence[str],
    off: Sequence[str],
    *args: Any,
) -> float:
    config = configure(root, patients, *settings)
    shutil.rmtree(config.data.features_uri, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as switched:
        if "packing" in off:
            switched.enter_context(mock.patch("ultra.model.packing.fit", _apart))
        if "grouping" in off:
            switched.enter_context(mock.patch.object(Collator, "batches", _in_order))
        return train(config, Path(folder), *args)


def _apart(lengths: Sequence[int]) -> list[list[int]]:
    return [[row] for row in range(len(lengths))]


def _in_order(collate: Collator, samples: Sequence[Sample], size: int) -> Iterator[Batch]:
    return (collate(samples[i : i + size]) for i in range(0, len(samples), size))


def train_by_ultra(config: PipelineConfig, folder: Path) -> float:
    """Encode, run both stages in this process, and return the samples per second."""
    begun_s = time.perf_counter()
    if config.train.features != "pixels":
        encode(config)
    source = stream.open_source(config.data, cache_uri(config), config.train.features)
    encoders = None if source.features else FrozenEncoders(config.model)
    windows = stream.plan_windows(source.pieces, config.train.seed, 0, MANY_EPOCHS)
    rows = (row for window in windows for row in stream.read_window(window, ()))
    fit_alone(config, rows, source.num_exams, folder, encoders=encoders)
    seconds = time.perf_counter() - begun_s
    return count_samples(config, read_groups(config)) / seconds


def scale(root: Path, patients: int, rounds: int) -> dict[str, Any]:
    """Return what the jobs give on a Ray cluster with one worker and with two.

    `whole` counts encoding, the start of every process and the checkpoints, as above; `stepping`
    are the exams per second between the steps of the second stage, without its first two.
    """
    environment = {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    whole: dict[int, list[float]] = {1: [], 2: []}
    stepping: dict[int, list[float]] = {1: [], 2: []}
    with mock.patch.dict(os.environ, environment):
        ray.init(num_cpus=2, object_store_memory=300 * 2**20, include_dashboard=False)
        try:
            for number in range(rounds):
                for workers in whole:
                    rates = train_on_ray(root, patients, workers, f"ray-{workers}-{number}")
                    whole[workers].append(rates[0])
                    stepping[workers].append(rates[1])
        finally:
            ray.shutdown()
    return {
        "whole": {str(n): spread(found, 1) for n, found in whole.items()},
        "stepping": {str(n): spread(found, 1) for n, found in stepping.items()},
        "weak_scaling": _ratios(stepping[2], stepping[1]),
    }


def train_on_ray(root: Path, patients: int, workers: int, name: str) -> tuple[float, float]:
    """Run the jobs `encode` and `train` and return the samples per second, whole and stepping."""
    config = configure(
        root,
        patients,
        f"train.num_workers={workers}",
        "train.cpus_per_worker=0.5",
        f"train.batch_size={EXAMS * workers}",
        "train.log_every=1",
        "encode={num_replicas: 2, cpus_per_replica: 0.5}",
        f"train.output_uri={root}/{name}",
        f"tracking.uri=sqlite:///{root}/{name}.db",
        "tracking.model_name=''",
    )
    shutil.rmtree(config.data.features_uri, ignore_errors=True)
    begun_s = time.perf_counter()
    build = partial(FrozenEncoders, config.model)
    encode_on_ray(config.data, config.encode, build, cache_uri(config))
    fit(config)
    seconds = time.perf_counter() - begun_s
    groups = read_groups(config)
    history = read_history(config, "train")["samples_per_second"]
    align = -(-len(groups) // config.train.batch_size)
    rates = [rate for step, rate in history if step > align + 2]
    return count_samples(config, groups) / seconds, len(rates) / sum(1 / r for r in rates)


Row = tuple[FrameGroup, Conversation, int]
"""An exam, one of its conversations, and the frame it is shown with."""


class Rows(Dataset[Row]):
    """The conversations of a stage with one frame, or with each in turn."""

    def __init__(self, groups: Sequence[FrameGroup], stage: str, every_frame: bool) -> None:
        self.rows = [
            (group, conversation, place)
            for group in groups
            for conversation in group.conversations
            if conversation.stage == stage
            for place in range(len(group.frames) if every_frame else 1)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


class OneFrameModel(nn.Module):
    """Frozen encoders, projectors and language model behind the forward that a Trainer calls."""

    def __init__(self, model: LlavaUltra, encoders: FrozenEncoders) -> None:
        super().__init__()
        self.model, self.encoders = model, [encoders]  # in a list: no part of what is trained

    def forward(
        self, pixels: list[Any], input_ids: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """Return the loss of a batch of rows with one frame each."""
        encoded = self.encoders[0].encode_pixels(pixels)
        visual_BTD = self.model.fusion({name: f[:, None] for name, f in encoded.items()})[:, 0]
        embeds = splice(self.model.language.embedding, input_ids, visual_BTD.flatten(0, 1))
        output = self.model.language.model(
            inputs_embeds=embeds, attention_mask=attention_mask, labels=labels, use_cache=False
        )
        return {"loss": output.loss}


def train_by_trainer(config: PipelineConfig, folder: Path, every_frame: bool) -> float:
    """Run both stages by transformers' Trainer and return the samples per second."""
    begun_s = time.perf_counter()
    groups = read_groups(config)
    encoders = FrozenEncoders(config.model)
    model = LlavaUltra(config.model, LanguageBranch(config.model.language))
    wrapped = OneFrameModel(model, encoders)
    for stage in config.train.stages:
        select_trainable(model, stage.trainable)
        trainer = Trainer(
            model=wrapped,
            args=make_arguments(config, stage, folder),
            train_dataset=Rows(groups, stage.name, every_frame),
            data_collator=partial(collate, config, encoders, model.language.tokenizer),
        )
        trainer.train()
    torch.save(model.state_dict(), folder / "model.pt")
    return count_samples(config, groups) / (time.perf_counter() - begun_s)


def make_arguments(config: PipelineConfig, stage: StageConfig, folder: Path) -> TrainingArguments:
    """Return a stage as a Trainer takes it; what does not stand here is as it comes."""
    train = config.train
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=stage.epochs or 1,
        per_device_train_batch_size=ROWS,
        learning_rate=stage.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=stage.warmup_fraction,  # below 1: a share
        max_grad_norm=train.gradient_clip,
        weight_decay=train.weight_decay,
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
        seed=train.seed,
    )


def collate(
    config: PipelineConfig, encoders: FrozenEncoders, tokenizer: Any, rows: Sequence[Row]
) -> dict[str, Any]:
    """Return the inputs of `OneFrameModel` for rows: pixels, and ids padded to the longest."""
    language, num_visual = config.model.language, config.model.tokens_per_frame
    texts = [
        encode_conversation(tokenizer, language.template, conversation.turns, num_visual)
        for _, conversation, _ in rows
    ]
    ids, mask = pad([ids[: language.max_length] for ids, _ in texts], 0)
    labels, _ = pad([labels[: language.max_length] for _, labels in texts], IGNORED)
    return {
        "pixels": [encoders.preprocess(decode(group.frames[place])) for group, _, place in rows],
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask).long(),
        "labels": torch.from_numpy(labels),
    }


def read_groups(config: PipelineConfig) -> list[FrameGroup]:
    """Return the exams that are trained on."""
    source = stream.open_source(config.data, "", "pixels")
    rows = stream.read_split(source, "train", source.num_exams)
    return [schema.from_row(row) for row in rows]


def count_samples(config: PipelineConfig, groups: Sequence[FrameGroup]) -> int:
    """Return the conversations that are learnt in all epochs of both stages."""
    return sum(
        (stage.epochs or 0) * len(pick_conversations(group, stage, config.train.seed, epoch=0))
        for stage in config.train.stages
        for group in groups
    )


def count_tokens(config: PipelineConfig) -> dict[str, dict[str, int]]:
    """Return stage -> the tokens of a mean forward pass, filling included, on both sides."""
    groups, encoders = read_groups(config), FrozenEncoders(config.model)
    tokenizer = load_tokenizer(Path(config.model.language.weights))
    language = config.model.language
    found: dict[str, dict[str, int]] = {}
    for stage in config.train.stages:
        rows = Rows(groups, stage.name, every_frame=False).rows
        random.Random(0).shuffle(rows)
        whole = range(0, len(rows) - ROWS + 1, ROWS)
        theirs = [
            collate(config, encoders, tokenizer, rows[i : i + ROWS])["input_ids"].numel()
            for i in whole
        ]
        collator = Collator(
            tokenizer, language.template, partial(num_visual_tokens, config.model),
            language.max_length,
        )  # fmt: skip
        samples = [
            Sample(group, pick_conversations(group, stage, config.train.seed, 0), None)
            for group in random.Random(0).sample(groups, len(groups))
        ]
        batches = collator.batches(samples[: len(samples) // EXAMS * EXAMS], EXAMS)
        ours = [
            plan_packing(*(torch.from_numpy(a) for a in (b.text_mask_BS, b.conversation_BS)))
            for b in batches
        ]
        found[stage.name] = {
            "trainer": round(mean(theirs)),
            "ultra": round(mean(packing.source_PL.numel() for packing in ours)),
        }
    return found


if __name__ == "__main__":
    main()
