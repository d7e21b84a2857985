"""Serve the demo's checkpoint on this machine and print the page's address and a `curl` that works.

    python -m ray_jobs.demo_server

A Ray head of its own runs the deployments of serve_config.yaml until Ctrl-C.
"""

from __future__ import annotations

import argparse
import base64
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ray_jobs.demo import PROJECT, ray_head, tool
from ultra.config import load
from ultra.evaluate.predictions import read_frames, read_predictions
from ultra.storage import StorageError

START_TIMEOUT_S = 240


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until interrupted."""
    args = _parse(argv)
    root = Path(args.root).absolute()
    stopped = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: stopped.set())
    try:
        question = write_question(root)
    except StorageError:
        sys.exit(f"{root}: no finished demo here; run `make demo` first")
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "serve_config.yaml"
        config.write_text(yaml.safe_dump(local_config(root, args.port), allow_unicode=True))
        with ray_head(root / "logs" / "serve.log") as environment:
            dashboard = environment.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
            command = [tool("serve"), "deploy", "--address", dashboard, str(config)]
            subprocess.run(command, env=environment, cwd=PROJECT, check=True)
            url = f"http://127.0.0.1:{args.port}"
            if wait_until_ready(url, stopped):
                print(
                    f"\nOpen {url}/ in a browser, or ask from here:\n"
                    f"\ncurl {url}/v1/chat/completions -H 'Content-Type: application/json' "
                    f"-d @{question}\n\nCtrl-C ends it.",
                    flush=True,
                )
                stopped.wait()


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default="runs/demo", help="folder of a finished demo")
    parser.add_argument("--port", type=int, default=8000, help="default %(default)s")
    return parser.parse_args(argv)


def write_question(root: Path) -> Path:
    """Write a chat request about one exam of the demo and return the file."""
    config = load("tiny", [f"root={root}"])
    prediction = read_predictions(config.evaluate.predictions_uri)[0]
    frames = read_frames(config.data.exams_uri, {prediction.exam_id})[prediction.exam_id]
    content: list[dict[str, Any]] = [
        {
            "type": "image_url",
            "image_url": {"url": f"data:image/jpeg;base64,{base64.b64encode(frame).decode()}"},
        }
        for frame in frames
    ]
    content.append({"type": "text", "text": prediction.question})
    request = {"model": "ultra", "messages": [{"role": "user", "content": content}]}
    path = root / "question.json"
    path.write_text(json.dumps(request, ensure_ascii=False), encoding="utf-8")
    return path


def local_config(root: Path, port: int) -> dict[str, Any]:
    """Return serve_config.yaml for one small machine, with the demo's checkpoint."""
    config: dict[str, Any] = yaml.safe_load((PROJECT / "serve_config.yaml").read_text())
    config["http_options"]["port"] = port
    (application,) = config["applications"]
    application["args"]["models"] = {"ultra": str(root / "train" / "checkpoint")}
    return config


def wait_until_ready(url: str, stopped: threading.Event) -> bool:
    """Return whether the endpoint became ready before it was to stop."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not stopped.wait(0.5):
        try:
            with urllib.request.urlopen(f"{url}/health/ready", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            if time.monotonic() > deadline:
                sys.exit(f"{url} was not ready within {START_TIMEOUT_S} s; see logs/serve.log")
    return False


if __name__ == "__main__":
    main()
