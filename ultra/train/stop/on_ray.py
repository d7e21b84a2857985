"""SIGTERM, at the driver or at any worker, asks the whole training to stop after its next step.

Ray runs the training in a thread of a worker, where no signal arrives, and gives SIGTERM to a
handler of its own that exits at once. So a worker's main thread gets another handler, which rings a
bell that the training listens to between its steps.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.backend import Backend
from ray.train.torch import TorchConfig


@dataclass(frozen=True, slots=True)
class Bell:
    """Rung by whoever wants the training to stop, heard wherever it runs."""

    actor: Any

    def ring(self) -> None:
        """Ask the training to stop."""
        self.actor.ring.remote()

    def rang(self) -> bool:
        """Return whether somebody asked."""
        return bool(ray.get(self.actor.rang.remote()))


def hang_bell() -> Bell:
    """Return a bell that nobody has rung; it lasts as long as this driver."""
    # A node may die under it. It then begins anew elsewhere, and a ring is lost at worst.
    lasting = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Rung)
    return Bell(lasting.remote())


class _Rung:
    def __init__(self) -> None:
        self.rung = False

    def ring(self) -> None:
        self.rung = True

    def rang(self) -> bool:
        return self.rung


@contextmanager
def ring_on_sigterm(bell: Bell) -> Iterator[None]:
    """Let the first SIGTERM ring the bell, the second one end this process as ever."""
    if threading.current_thread() is not threading.main_thread():
        yield  # no signal arrives here
        return
    before = _listen(bell)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _listen(bell: Bell) -> Any:
    def ring(*_: Any) -> None:
        signal.signal(signal.SIGTERM, before)
        # In a thread: between two tasks of an actor, Ray aborts a process whose main thread calls.
        threading.Thread(target=bell.ring).start()

    before = signal.signal(signal.SIGTERM, ring)
    return before


@dataclass
class TorchWithBell(TorchConfig):
    """Ray's process group of torch, on workers that ring a bell when SIGTERM comes."""

    bell: Bell | None = None

    @property
    def backend_cls(self) -> type[Backend]:
        """The class that sets the workers up."""
        return _BackendWithBell


class _BackendWithBell(TorchConfig().backend_cls):  # type: ignore[misc]  # a class made there
    def on_training_start(self, worker_group: Any, backend_config: TorchWithBell) -> None:
        super().on_training_start(worker_group, backend_config)
        worker_group.execute(_hear, backend_config.bell)


def _hear(bell: Bell) -> None:
    _listen(bell)
