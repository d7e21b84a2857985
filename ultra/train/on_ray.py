"""The two stages on Ray Train: one DeepSpeed engine a stage, checkpoints that Ray restarts from."""

from __future__ import annotations

import math
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
import ray.train.collective
import torch
from ray.train.torch import TorchTrainer

from ultra import registry, storage
from ultra.config import PipelineConfig, parse
from ultra.data import stream
from ultra.data.on_ray import stream_rows
from ultra.model import checkpoint
from ultra.model.checkpoint import Progress
from ultra.model.encoders import FrozenEncoders, cache_key
from ultra.tracking import Tracker, open_run, resume_tracker
from ultra.train.batches import read_inputs
from ultra.train.claim import delete_claim, find_ended, write_claim
from ultra.train.loop import Inputs, run_stage
from ultra.train.profile import profile_stage
from ultra.train.progress import UsedExams, add_up
from ultra.train.stage import StageRun, begin_stage, describe_parts, place_checkpoint, write_stage
from ultra.train.stop.on_ray import Bell, TorchWithBell, hang_bell, ring_on_sigterm
from ultra.train.validation import Validation
from ultra.train.watch import Moment, StageWatch

BEST, FINAL = "best", "checkpoint"
"""Names under `train.output_uri`, beside the claim and the checkpoints of steps."""


def fit(config: PipelineConfig) -> str:
    """Run the stages and return the address of the final checkpoint.

    A run that was cut off goes on where its last checkpoint stands when it is submitted again, on
    other machines too: `claim.MAY_CHANGE` names what may differ. One that was cut off at its very
    end is only registered, under the MLflow run that trained it.

    Raises:
        ConfigError: when an unfinished run of another configuration stands at the address, or
            `train.start_from` is no version.
        SystemExit: with 143 when SIGTERM came, here or at a worker, and a checkpoint is written.
    """
    config = registry.resolve_start(config)
    storage.resolve(config.train.output_uri)
    source = stream.open_source(config.data, cache_uri(config), config.train.features)
    print(f"{source.num_exams} exams, from {'features' if source.features else 'pixels'}")
    final = storage.join(config.train.output_uri, FINAL)
    ended = find_ended(config, final)
    with open_run(config, "train", ended.run_id if ended else "") as tracker:
        if not ended:
            write_claim(config, tracker.run_id)
            _train(config, source, tracker)
        if not checkpoint.exists(final):
            print("stopped as asked to; submit the job again and it goes on", flush=True)
            raise SystemExit(128 + signal.SIGTERM)
        if version := registry.register(config.tracking, tracker.run_id, final):
            print(f"{version} is the challenger")
    delete_claim(config)
    return final


def _train(config: PipelineConfig, source: stream.Source, tracker: Tracker) -> None:
    """Run the stages until they end, or until somebody asks to stop."""
    stream.track_exams(tracker, config.data.exams_uri, "training")
    bell = hang_bell()
    with ring_on_sigterm(bell):
        TorchTrainer(
            train_worker,
            train_loop_config={
                "config": config.model_dump(mode="json"),
                "source": source,
                "run_id": tracker.run_id,
                "bell": bell,
                "last": _find_last(config),
                "base": checkpoint.describe_base(config.model),
            },
            torch_config=TorchWithBell(bell=bell),
            scaling_config=ray.train.ScalingConfig(
                num_workers=config.train.num_workers,
                use_gpu=config.train.gpus_per_worker > 0,
                resources_per_worker=_resources(config),
            ),
            run_config=_run_config(config),
        ).fit()


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
    uri = max(uri, settings["last"], key=place_checkpoint) or config.train.resume_from
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
        moment = _run(run, progress, source, tracker, settings["bell"])
        run.engine.close()
        if moment.progress.stage == progress.stage:  # asked to stop
            return
        uri, progress = storage.join(config.train.output_uri, moment.name), moment.progress


def _run(
    run: StageRun, progress: Progress, source: stream.Source, tracker: Tracker, bell: Bell
) -> Moment:
    """Take the steps of a stage and return the moment that was kept last."""
    context, model = ray.train.get_context(), run.config.model
    rank, world_size = context.get_world_rank(), context.get_world_size()
    encoders = None if source.features else FrozenEncoders(model, str(run.engine.device))
    validation = None
    if run.config.train.validate_every is not None:
        validation = Validation(run, source, encoders, rank, world_size)

    def asked_to_stop() -> bool:
        return bool(add_up(torch.tensor([float(rank == 0 and bell.rang())]))[0])

    watch = StageWatch(
        run, progress, source, tracker, validation, partial(_save, run), asked_to_stop
    )
    inputs = _inputs(run, source, encoders, watch.used)
    with profile_stage(run, tracker) as mark:
        run_stage(run.engine, inputs, run.schedule, run.teaching, watch, mark)
    assert watch.kept is not None, "a stage ends with a checkpoint"
    return watch.kept


def _inputs(
    run: StageRun, source: stream.Source, encoders: FrozenEncoders | None, used: UsedExams
) -> Iterator[Inputs]:
    """Return a worker's inputs; rank 0 plans the stream and hands out the shares."""
    train, context = run.config.train, ray.train.get_context()
    shares = None
    if context.get_world_rank() == 0:
        left = (run.schedule.num_steps - run.schedule.first) * train.batch_size
        epochs = math.ceil((left + len(used.seen)) / source.num_exams) + 1
        windows = stream.plan_windows(source.pieces, train.seed, used.epoch, epochs)
        shares = stream_rows(list(windows), used.seen, context.get_world_size(), train.batch_size)
    share = ray.train.collective.broadcast_from_rank_zero(shares)[context.get_world_rank()]
    tables = share.iter_batches(
        batch_size=train.micro_batch_size * train.gradient_accumulation,
        batch_format="pyarrow",
        prefetch_batches=2,
    )
    return read_inputs(run, (table.to_pylist() for table in tables), encoders, used.add)


def _save(run: StageRun, moment: Moment) -> None:
    """Write, publish and report a checkpoint; every worker must call it."""
    rank = ray.train.get_context().get_world_rank()
    output, last = run.config.train.output_uri, checkpoint.CONFIG_FILE
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not moment.goes_back:
            write_stage(run, folder, moment.progress, rank)
        elif rank == 0:
            shutil.copytree(storage.fetch(storage.join(output, BEST)), folder, dirs_exist_ok=True)
            checkpoint.amend(folder, run.config, moment.progress)

        def publish(_local: ray.train.Checkpoint, _name: str) -> ray.train.Checkpoint:
            # The moment's own comes last: no run goes on from one that knows of a better or a
            # final one which is not there.
            if moment.best:
                storage.publish(folder, storage.join(output, BEST), last)
            if moment.final:
                _publish_final(run.config, folder)
            uri = storage.join(output, moment.name)
            storage.publish(folder, uri, last)
            filesystem, path = storage.resolve(uri)
            return ray.train.Checkpoint(path, filesystem)

        ray.train.report(
            {"step": moment.progress.total_step},
            checkpoint=ray.train.Checkpoint(name) if rank == 0 else None,
            checkpoint_dir_name=moment.name,
            checkpoint_upload_fn=publish,
        )
    ray.train.collective.barrier()


def _publish_final(config: PipelineConfig, folder: Path) -> None:
    """Publish what evaluation and serving need of the last checkpoint."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        shutil.copytree(folder, name, copy_function=os.link, dirs_exist_ok=True)
        checkpoint.amend(Path(name), config, None)
        final = storage.join(config.train.output_uri, FINAL)
        storage.publish(Path(name), final, checkpoint.CONFIG_FILE)


def _find_last(config: PipelineConfig) -> str:
    """Return the furthest whole checkpoint of an unfinished run; Ray may not have noted it yet."""
    output = config.train.output_uri
    names = [uri.split("/")[-2] for uri in storage.list_files(output, f"/{checkpoint.CONFIG_FILE}")]
    last = max(names, key=place_checkpoint, default="")
    return storage.join(output, last) if place_checkpoint(last) > (0, 0) else ""


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
        checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.train.keep_last),
        # Ray's patch of `print` prints twice where a library has wrapped stdout, as some here do.
        # Kineto, in torch's profiler, reports that it begins, and that there is no GPU, as errors.
        worker_runtime_env={
            "env_vars": {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0", "KINETO_LOG_LEVEL": "99"}
        },
    )
