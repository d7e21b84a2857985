"""Trainings killed again and again: do they end where one that nobody touched ends?

    python -m benchmarks.survival

One small training runs undisturbed. Then the same training loses, each at three random steps before
and after the teacher's warm-up, a worker, the process that hands out the data, and its driver, all
by SIGKILL; it goes from two workers to one and back, from ZeRO-2 to ZeRO-3 and back; it is told to
stop by SIGTERM, at a worker and at the driver; and it loses one of the nodes of a Ray cluster. A
driver that ended is submitted again. There is a checkpoint at every step, which tells what exams
the training had seen.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

from benchmarks.stand import write_result
from ray_jobs.demo import PROJECT
from ultra.config import PipelineConfig, load
from ultra.data import parquet
from ultra.model import checkpoint
from ultra.tracking import read_history

STEPS, BATCH, WARMUP = 6, 8, 4
"""Steps of each of the two stages, exams of a step, and steps before the teacher is felt."""
TIMEOUT_S = 300
STOPPED = 128 + signal.SIGTERM

BASE = (
    "data.simulator.num_patients=12",
    "data.validation_fraction=0",
    "model.selection.teacher=attention",
    f"model.selection.teacher_warmup_steps={WARMUP}",
    *(f"train.stages.{stage}.steps={STEPS}" for stage in (0, 1)),
    f"train.batch_size={BATCH}",
    "train.micro_batch_size=4",
    "train.checkpoint_every=1",
    "train.max_failures=3",
    "train.log_every=1",
    "train.explained_exams=0",
)
ALONE_ZERO_3 = ("train.num_workers=1", "train.zero.stage=3")
WORKER, DATA, DRIVER = "RayTrainWorker", "SplitCoordinator", "driver"


@dataclass(frozen=True, slots=True)
class Blow:
    """What happens to a training, and how it is submitted again if that ends its driver.

    Attributes:
        step: checkpoint, counted over both stages, at whose sight it happens.
        victim: begins the title of a process of Ray; or the driver, or a node.
        number: of the signal.
        again: what is set when it is submitted again.
    """

    step: int
    victim: str
    number: int = signal.SIGKILL
    again: tuple[str, ...] = ()


@dataclass(slots=True)
class Training:
    """A training under `root` that is submitted to a cluster as often as it takes."""

    cluster: Cluster
    root: Path
    name: str
    overrides: Sequence[str] = ()
    codes: list[int] = field(default_factory=list)
    kills: int = 0

    def config(self, *overrides: str) -> PipelineConfig:
        """Return its configuration."""
        own = [
            f"root={self.root}", f"train.output_uri={self.root}/{self.name}",
            f"tracking.uri=sqlite:///{self.root}/{self.name}.db",
        ]  # fmt: skip
        return load("tiny", [*BASE, *own, *self.overrides, *overrides])

    def run(self, blows: Sequence[Blow] = ()) -> None:
        """Train to the end, through every blow."""
        left = list(blows)
        again: tuple[str, ...] = ()
        while not self.codes or self.codes[-1]:
            if len(self.codes) > len(blows):
                raise RuntimeError(f"{self.name} does not end: {self.codes}\n{self.tail()}")
            driver = self._submit(again)
            while driver.poll() is None and left:
                if self._stands(left[0].step):
                    again = left[0].again or again
                    self._strike(left.pop(0), driver)
                time.sleep(0.02)
            self.codes.append(driver.wait(TIMEOUT_S))
        if left:
            raise RuntimeError(f"{self.name} ended before {left}")

    def _submit(self, again: Sequence[str]) -> subprocess.Popen[bytes]:
        path = self.root / f"{self.name}.yaml"
        path.write_text(self.config(*again).to_yaml())
        environment = {**os.environ, "RAY_ADDRESS": self.cluster.address}
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(PROJECT), environment.get("PYTHONPATH", "")]
        )
        with (self.root / f"{self.name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "ray_jobs.train", "--config", str(path)],
                env=environment, cwd=self.root, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def _stands(self, step: int) -> bool:
        index, inner = divmod(step - 1, STEPS)
        return any((self.root / self.name).glob(f"{index + 1}-*-{inner + 1:06d}/config.yaml"))

    def _strike(self, blow: Blow, driver: subprocess.Popen[bytes]) -> None:
        self.kills += 1
        if blow.victim == DRIVER:
            driver.send_signal(blow.number)
            return
        while driver.poll() is None:
            if victims := processes(blow.victim):
                if blow.victim == "node":
                    return
                victims[0].send_signal(blow.number)
                return
            time.sleep(0.05)

    def tail(self) -> str:
        """Return the end of its log."""
        return (self.root / f"{self.name}.log").read_text(errors="replace")[-4000:]

    def outcome(self, reference: Training | None = None) -> dict[str, Any]:
        """Return how it ended, and how far from the one that nobody touched."""
        found = {
            "submitted": len(self.codes), "kills": self.kills, "exit_codes": self.codes,
            "final_loss": self.final_loss(), **count_exams(self.root / self.name, self.num_exams()),
        }  # fmt: skip
        if reference is not None:
            found["loss_difference"] = abs(found["final_loss"] - reference.final_loss())
            found["weight_difference"] = largest_difference(self.final(), reference.final())
        return found

    def num_exams(self) -> int:
        """Return the exams of an epoch."""
        parts = parquet.part_uris(self.config().data.exams_uri)
        return sum(parquet.read_column(part, "split").count("train") for part in parts)

    def final(self) -> Path:
        """Return the folder of its final checkpoint."""
        return self.root / self.name / "checkpoint"

    def final_loss(self) -> float:
        """Return the loss of the last step."""
        step, loss = max(read_history(self.config(), "train")["loss"])
        assert step == 2 * STEPS, step
        return loss


def processes(title: str) -> list[psutil.Process]:
    """Return the processes of our own clusters whose title has the name of an actor, by age."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith(f"ray::{title}"):
                found.append((process.create_time(), process.pid, process))
        except psutil.Error:  # it has just ended
            continue
    return [process for *_, process in sorted(found, key=lambda item: item[:2])]


def count_exams(folder: Path, num_exams: int) -> dict[str, int]:
    """Return over all checkpoints how often an exam was seen twice in an epoch, or passed over.

    After n steps n times BATCH places were filled; those that brought nothing new to their epoch
    were filled twice. One of a later epoch before an earlier one was complete passed somebody over.
    """
    twice, missed, looked = 0, 0, 0
    for path in sorted(folder.glob("?-*-??????")):
        progress = checkpoint.read(str(path)).progress()
        if progress.step == 0:  # a stage's end: the next one begins anew
            continue
        looked += 1
        new = progress.epoch * num_exams + len(progress.seen)
        twice = max(twice, progress.step * BATCH - new)
        missed = max(missed, sum(epoch > progress.epoch for epoch, _ in progress.seen))
    return {"checkpoints": looked, "seen_twice": twice, "missed": missed}


def largest_difference(ours: Path, theirs: Path) -> float:
    """Return the largest difference of any weight of two checkpoints."""
    differences = [0.0]
    for file in ("connector.safetensors", "adapter/adapter_model.safetensors"):
        a, b = load_file(ours / file), load_file(theirs / file)
        assert a.keys() == b.keys()
        differences += [float((a[name] - b[name]).abs().max()) for name in a]
    return max(differences)


def draw_steps(chance: random.Random, count: int) -> list[int]:
    """Return random steps in order, at least one before and one after the warm-up where possible.

    One apart at least, so that a training makes headway between two blows.
    """
    while True:
        steps = sorted(chance.sample(range(1, 2 * STEPS - 1), count))
        apart = all(b - a > 1 for a, b in itertools.pairwise(steps))
        if apart and (count == 1 or steps[0] < WARMUP < steps[-1]):
            return steps


@contextmanager
def ray_nodes(cpus: Sequence[int]) -> Iterator[Cluster]:
    """Yield a Ray cluster of real nodes on this machine, the head first."""
    cluster = Cluster()
    try:
        for number in cpus:
            cluster.add_node(
                num_cpus=number, object_store_memory=150 * 2**20, include_dashboard=False
            )
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()


def prepare(root: Path, cluster: Cluster) -> None:
    """Write the exams and their features, with the jobs that users run."""
    config = Training(cluster, root, "untouched").config()
    path = root / "data.yaml"
    path.write_text(config.to_yaml())
    environment = {**os.environ, "RAY_ADDRESS": cluster.address, "PYTHONPATH": str(PROJECT)}
    for job in ("prepare", "instructions", "encode"):
        command = [sys.executable, "-m", f"ray_jobs.{job}", "--config", str(path)]
        with (root / f"{job}.log").open("wb") as log:
            subprocess.run(command, env=environment, cwd=root, stdout=log, stderr=log, check=True)


def disturb(chance: random.Random, count: int) -> Mapping[str, Sequence[Blow]]:
    """Return name -> blows of every disturbed training on one node."""
    kill = partial(draw_steps, chance, count)
    return {
        "worker": [Blow(step, WORKER) for step in kill()],
        "data": [Blow(step, DATA) for step in kill()],
        "driver": [Blow(step, DRIVER) for step in kill()],
        "elastic": [
            Blow(step, DRIVER, again=again)
            for step, again in zip(
                draw_steps(chance, 2),
                (ALONE_ZERO_3, ("train.num_workers=2", "train.zero.stage=2")),
                strict=True,
            )
        ],
        "preempted": [
            Blow(step, victim, signal.SIGTERM)
            for step, victim in zip(draw_steps(chance, 2), (WORKER, DRIVER), strict=True)
        ],
    }


def lose_node(root: Path, step: int) -> Training:
    """Train on two of three nodes beside the head, of which one that trains dies at a step."""
    with ray_nodes([2, 2, 2, 2]) as cluster:
        # A node has room for one worker; what is left on the head reads the data.
        training = Training(cluster, root, "node", ["train.cpus_per_worker=1.5"])
        nodes = cluster.list_all_nodes()[1:]

        def strike(_blow: Blow, _driver: subprocess.Popen[bytes]) -> None:
            node = next(n for n in nodes if trains_on(n))
            cluster.remove_node(node, allow_graceful=False)
            training.kills += 1

        training._strike = strike  # type: ignore[method-assign]
        training.run([Blow(step, "node")])
    return training


def trains_on(node: Any) -> bool:
    """Return whether a training worker runs on a node."""
    raylet = next(p.process.pid for p in node.all_processes["raylet"])
    return any(p.ppid() == raylet for p in processes(WORKER))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=3, help="of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the steps")
    parser.add_argument("--only", nargs="+", help="some of the disturbed trainings")
    args = parser.parse_args(argv)
    chance = random.Random(args.seed)
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true"}
    parts = {}

    def add(training: Training, reference: Training | None) -> None:
        parts[training.name] = training.outcome(reference)
        sys.stderr.write(f"{training.name}: {parts[training.name]}\n")

    with tempfile.TemporaryDirectory(prefix="survival-") as name:
        root = Path(name)
        with ray_nodes([6]) as cluster:
            prepare(root, cluster)
            untouched = Training(cluster, root, "untouched")
            untouched.run()
            add(untouched, None)
            for title, blows in disturb(chance, args.kills).items():
                if args.only is None or title in args.only:
                    training = Training(cluster, root, title)
                    training.run(blows)
                    add(training, untouched)
        if args.only is None or "node" in args.only:
            add(lose_node(root, chance.choice(range(2, 2 * STEPS - 3))), untouched)
    disturbed = [part for title, part in parts.items() if title != "untouched"]
    headline = {
        "kills": sum(part["kills"] for part in disturbed),
        "largest_loss_difference": max(part["loss_difference"] for part in disturbed),
        "largest_weight_difference": max(part["weight_difference"] for part in disturbed),
        "seen_twice": max(part["seen_twice"] for part in parts.values()),
        "missed": max(part["missed"] for part in parts.values()),
    }
    write_result("survival", {"trainings": parts, **headline}, headline)


if __name__ == "__main__":
    main()
