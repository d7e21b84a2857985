"""The two stages on Ray Train: one DeepSpeed engine a stage, checkpoints that Ray restarts from."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray.train
import ray.train.collective
from ray.train.torch import TorchTrainer

from ultra import registry, storage
from ultra.config import ConfigError, PipelineConfig, parse
from ultra.data import stream
from ultra.data.on_ray import stream_rows
from ultra.model import checkpoint
from ultra.model.checkpoint import Progress
from ultra.model.encoders import FrozenEncoders, cache_key
from ultra.tracking import Tracker, open_run, resume_tracker
from ultra.train.batches import read_inputs
from ultra.train.loop import Inputs, Metrics, run_stage
from ultra.train.progress import StepLog, UsedExams
from ultra.train.stage import StageRun, begin_stage, describe_parts, write_stage
from ultra.train.understanding import PictureLog


def fit(config: PipelineConfig) -> str:
    """Run the stages and return the address of the final checkpoint.

    A run that was cut off goes on where its last checkpoint stands when it is submitted again.

    Raises:
        ConfigError: when an unfinished run of another configuration stands at the address, or
            `train.start_from` is no version.
    """
    config = registry.resolve_start(config)
    storage.resolve(config.train.output_uri)
    source = stream.open_source(config.data, cache_uri(config), config.train.features)
    print(f"{source.num_exams} exams, from {'features' if source.features else 'pixels'}")
    final = storage.join(config.train.output_uri, "checkpoint")
    _claim(config, final)
    with open_run(config, "train") as tracker:
        stream.track_exams(tracker, config.data.exams_uri, "training")
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={
                "config": config.model_dump(mode="json"),
                "source": source,
                "run_id": tracker.run_id,
                "final": final,
                "base": checkpoint.describe_base(config.model),
            },
            scaling_config=ray.train.ScalingConfig(
                num_workers=config.train.num_workers,
                use_gpu=config.train.gpus_per_worker > 0,
                resources_per_worker=_resources(config),
            ),
            run_config=_run_config(config),
        )
        trainer.fit()
        if version := registry.register(config.tracking, tracker.run_id, final):
            print(f"{version} is the challenger")
    return final


def cache_uri(config: PipelineConfig) -> str:
    """Return the folder of the feature cache for the encoders of a configuration.

    Raises:
        ConfigError: for an unknown encoder or strategy.
    """
    return storage.join(config.data.features_uri, cache_key(config.model))


def train_worker(settings: dict[str, Any]) -> None:
    """Run the stages on one worker, from the last checkpoint where there is one."""
    config, source = parse(settings["config"]), settings["source"]
    rank = ray.train.get_context().get_world_rank()
    tracker = resume_tracker(config.tracking, settings["run_id"] if rank == 0 else "")
    tracker.watch_machine()
    restored = ray.train.get_checkpoint()
    uri = storage.address(restored.filesystem, restored.path) if restored else ""
    progress = checkpoint.read(uri).progress() if uri else Progress()
    while progress.stage < len(config.train.stages):
        start = uri or config.train.start_from
        run = begin_stage(
            config,
            progress,
            checkpoint.read(start) if start else None,
            source.num_exams,
            settings["base"],
        )
        if rank == 0:
            print(describe_parts(run))
        uri = _run(run, progress, source, tracker, settings["final"])
        run.engine.close()
        progress = checkpoint.read(uri).progress()


def _run(
    run: StageRun, progress: Progress, source: stream.Source, tracker: Tracker, final: str
) -> str:
    """Take the steps of a stage and return the address of its last checkpoint."""
    train, schedule = run.config.train, run.schedule
    log = StepLog(
        tracker, run.stage.name, schedule.num_steps, schedule.offset, train.batch_size,
        train.log_every,
    )  # fmt: skip
    used = UsedExams(progress, source.num_exams)
    pictures = PictureLog(run, source, tracker)
    saved = ""

    def report(step: int, metrics: Metrics) -> None:
        nonlocal saved
        log.add(step, metrics)
        pictures.add(step)
        done = step == schedule.num_steps
        if done or (train.checkpoint_every and step % train.checkpoint_every == 0):
            epoch, seen = used.merge()
            after = Progress(progress.stage, step, schedule.offset + step, epoch, seen)
            if done:
                after = Progress(progress.stage + 1, 0, schedule.offset + step)
            last = done and after.stage == len(train.stages)
            saved = _save(run, after, f"{run.stage.name}-{step:06d}", final if last else "")

    run_stage(run.engine, _inputs(run, source, used), schedule, run.teaching, report)
    return saved


def _inputs(run: StageRun, source: stream.Source, used: UsedExams) -> Iterator[Inputs]:
    """Return a worker's inputs; rank 0 plans the stream and hands out the shares."""
    train, context = run.config.train, ray.train.get_context()
    world_size = context.get_world_size()
    shares = None
    if context.get_world_rank() == 0:
        left = (run.schedule.num_steps - run.schedule.first) * train.batch_size
        epochs = math.ceil((left + len(used.seen)) / source.num_exams) + 1
        windows = stream.plan_windows(source.pieces, train.seed, used.epoch, epochs)
        shares = stream_rows(list(windows), used.seen, world_size)
    share = ray.train.collective.broadcast_from_rank_zero(shares)[context.get_world_rank()]
    encoders = None if source.features else FrozenEncoders(run.config.model, str(run.engine.device))
    tables = share.iter_batches(
        batch_size=train.micro_batch_size * train.gradient_accumulation,
        batch_format="pyarrow",
        prefetch_batches=2,
    )
    return read_inputs(run, (table.to_pylist() for table in tables), encoders, used.add)


def _save(run: StageRun, progress: Progress, name: str, final: str) -> str:
    """Write, publish and report a checkpoint; every worker must call it."""
    rank = ray.train.get_context().get_world_rank()
    uri = storage.join(run.config.train.output_uri, name)
    with tempfile.TemporaryDirectory() as folder:
        write_stage(run, Path(folder), progress, rank)

        def publish(_local: ray.train.Checkpoint, _name: str) -> ray.train.Checkpoint:
            storage.publish(Path(folder), uri, checkpoint.CONFIG_FILE)
            filesystem, path = storage.resolve(uri)
            return ray.train.Checkpoint(path, filesystem)

        ray.train.report(
            {"step": progress.total_step},
            checkpoint=ray.train.Checkpoint(folder) if rank == 0 else None,
            checkpoint_dir_name=name,
            checkpoint_upload_fn=publish,
        )
        if rank == 0 and final:
            shutil.rmtree(Path(folder) / "training")
            storage.publish(Path(folder), final, checkpoint.CONFIG_FILE)
    ray.train.collective.barrier()
    return uri


def _claim(config: PipelineConfig, final: str) -> None:
    claim = storage.join(config.train.output_uri, "config.yaml")
    if storage.exists(final):
        storage.delete(config.train.output_uri)
    elif storage.exists(claim) and storage.read_bytes(claim).decode() != config.to_yaml():
        raise ConfigError(
            f"train.output_uri: {config.train.output_uri} holds an unfinished run of another "
            "configuration; delete it, or give another address"
        )
    storage.write_bytes(claim, config.to_yaml().encode())


def _resources(config: PipelineConfig) -> dict[str, float]:
    resources = {"CPU": float(config.train.cpus_per_worker)}
    if config.train.gpus_per_worker:
        resources["GPU"] = float(config.train.gpus_per_worker)
    return resources


def _run_config(config: PipelineConfig) -> ray.train.RunConfig:
    filesystem, path = storage.resolve(config.train.output_uri)
    folder, _, name = path.rpartition("/")
    return ray.train.RunConfig(  # type: ignore[call-arg]  # mypy reads Train V1's
        name=name,
        storage_path=folder,
        storage_filesystem=filesystem,
        failure_config=ray.train.FailureConfig(max_failures=config.train.max_failures),
        # Ray's patch of `print` prints twice where a library has wrapped stdout, as some here do.
        worker_runtime_env={"env_vars": {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}},
    )
