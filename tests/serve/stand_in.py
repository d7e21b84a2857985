"""The endpoint with the stand-in for the model, as a process of its own.

    python -m tests.serve.stand_in PORT LIMITS [KEY]

LIMITS are JSON. Everything it logs, at any level, goes to stderr. A question whose text has FAIL in
it fails with an error that quotes it.
"""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from tests.conftest import ROOT, free_port, wait_until_up
from tests.serve.questions import CANARIES
from tests.serve.test_endpoint import Script
from ultra.serve.endpoint import create_app
from ultra.serve.events import Delta, Event, Opening, Question
from ultra.serve.limits import Limits
from ultra.serve.security import ApiKeys, digest_key

ANSWER = (Opening(0, (0.5,), 9), Delta(CANARIES["answer"], 1), Delta("", 2, "stop"))


class Quoting(Script):
    """Answers, or fails with what it was asked."""

    async def answer(self, question: Question) -> AsyncGenerator[Event, None]:
        text = question.turns[-1].content
        if "FAIL AT ONCE" in text:
            raise RuntimeError(f"{text} {question.frames!r}")
        async for event in super().answer(question):
            yield event
            if "FAIL LATER" in text:
                raise RuntimeError(f"{text} {question.frames!r}")


@contextmanager
def run_stand_in(log: Path, limits: dict, key: str = "") -> Iterator[tuple[str, int]]:
    """The address and the process id of a stand-in that writes all it says to a file."""
    port = free_port()
    arguments = [str(port), json.dumps(limits), *([key] if key else [])]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.serve.stand_in", *arguments],
            cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        wait_until_up(f"http://127.0.0.1:{port}/health/live", process)
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def main(port: str, limits: str, *keys: str) -> None:
    logging.basicConfig(level=logging.DEBUG)
    limits_ = Limits(**json.loads(limits))
    app = create_app(Quoting(ANSWER), limits_, ApiKeys([digest_key(key) for key in keys]))
    uvicorn.run(app, port=int(port), log_level="trace")


if __name__ == "__main__":
    main(*sys.argv[1:])
