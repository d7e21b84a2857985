"""Take simulated exams and a real ultrasound cine through the whole pipeline on this machine.

    python -m ray_jobs.demo

It starts a local Ray head where none runs, submits every job with `ray job submit` and stops the
head it started. The outcome is a table here, `summary.json` and `report.html`.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ultra import storage
from ultra.config import InputError, PipelineConfig, load
from ultra.data import parquet
from ultra.evaluate.predictions import read_frames, read_predictions
from ultra.evaluate.report import (
    Exam,
    pick_exams,
    show_exam,
    show_results,
    spread_exams,
)
from ultra.evaluate.results import read_summary
from ultra.evaluate.tables import Summary
from ultra.page import build_page
from ultra.tracking import read_history

PROJECT = Path(__file__).resolve().parent.parent
NUM_SHOWN = 12
OBJECT_STORE_BYTES = 512 * 2**20
START_TIMEOUT_S = 120

SCORES = {"em": "strict/em", "f1": "strict/f1-char", "bleu4": "strict/bleu4-char"}
"""Those of summary.json and of the short table."""
NOTICE = (
    "The tiny model behind this page was trained on simulated ultrasound only and knows nothing "
    "else: what it says about the real cine below means nothing. Nothing here is a medical device, "
    "and nothing here may be used for diagnosis or treatment."
)


@dataclass(slots=True)
class Jobs:
    """Submits jobs and keeps their logs and times."""

    logs: Path
    environment: Mapping[str, str]
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, module: str, overrides: Sequence[str], name: str = "") -> None:
        """Submit a job and wait for its end; exit with the tail of its log when it fails."""
        name = name or module
        started = time.monotonic()
        log = self.logs / f"{name}.log"
        sets = [part for item in overrides for part in ("--set", item)]
        with log.open("wb") as output:
            code = subprocess.run(
                [
                    *(tool("ray"), "job", "submit", "--working-dir", str(PROJECT)),
                    *("--submission-id", f"{name}-{secrets.token_hex(4)}", "--"),
                    *("python", "-m", f"ray_jobs.{module}", "--config", "tiny", *sets),
                ],
                env=dict(self.environment),
                stdout=output,
                stderr=subprocess.STDOUT,
            ).returncode
        if code:
            tail = log.read_text(errors="replace").splitlines()[-30:]
            sys.exit("\n".join([*tail, f"{name}: the job failed; its whole log: {log}"]))
        self.add(name, started)

    def add(self, name: str, started: float) -> None:
        """Note and print the seconds of a step that began at `started`."""
        self.seconds[name] = round(time.monotonic() - started, 1)
        print(f"{name:16} {self.seconds[name]:6.1f} s", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo."""
    args = _parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the head ends too
    started = time.monotonic()
    root = args.root if "://" in args.root else str(Path(args.root).absolute())
    report = Path(args.report or ("runs/demo" if "://" in root else root)).absolute()
    logs = report / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    overrides = [f"root={root}", f"tracking.uri=sqlite:///{report}/mlflow.db", *args.overrides]
    real_overrides = _real_overrides(overrides, root)
    try:
        config, real_config = load("tiny", overrides), load("tiny", real_overrides)
        source = write_real_exam(real_config.data.source_uri)
        with ThreadPoolExecutor(1) as beside, ray_head(logs / "ray.log") as environment:
            jobs = Jobs(logs, environment)
            jobs.add("ray", started)
            jobs.run("prepare", overrides)
            # The real cine goes beside the simulated exams, one job of it at a time.
            let_in = beside.submit(jobs.run, "prepare", real_overrides, "real-prepare")
            for job in ("instructions", "encode", "train"):
                jobs.run(job, overrides)
            let_in.result()
            answered = None
            if parquet.read_parts(real_config.data.exams_uri):
                answered = beside.submit(jobs.run, "predict", real_overrides, "real-predict")
            jobs.run("evaluate", overrides)
            if answered is not None:
                answered.result()
        summary = read_summary(config.evaluate.results_uri)
        real = read_real_exam(real_config)
        page = draw_report(config, summary, real)
    except InputError as error:
        sys.exit(str(error))
    results = describe(summary, real, source)
    results |= {"seconds": round(time.monotonic() - started, 1), "steps": jobs.seconds}
    text = json.dumps(results, ensure_ascii=False, indent=1)
    (report / "summary.json").write_text(text + "\n", encoding="utf-8")
    (report / "report.html").write_text(page, encoding="utf-8")
    print_results(summary, results)
    print(f"\nreport   {report / 'report.html'}\nsummary  {report / 'summary.json'}")
    print(f"runs     mlflow ui --backend-store-uri {config.tracking.uri}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--root",
        default="runs/demo",
        help="folder or s3:// address of everything that is written; default %(default)s",
    )
    parser.add_argument(
        "--report",
        metavar="FOLDER",
        help="local folder of summary, report, logs and MLflow; default: the root, or runs/demo",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=c",
        dest="overrides",
        help="replace one value of the preset `tiny` in every job; may be given again",
    )
    return parser.parse_args(argv)


def _real_overrides(overrides: Sequence[str], root: str) -> list[str]:
    real = f"{root}/real"
    return [
        *overrides,
        "data.format=folder",
        f"data.source_uri={real}/folder",
        f"data.exams_uri={real}/exams",
        f"data.quarantine_uri={real}/quarantine",
        f"data.audit_uri={real}/audit",
        f"data.card_uri={real}/card",
        "data.max_frames=16",
        "data.test_fraction=1",
        "data.validation_fraction=0",
        "tracking.uri=",  # the runs of the simulated exams are enough
        f"evaluate.predictions_uri={real}/predictions",
        "evaluate.split=test",
    ]


@contextmanager
def ray_head(log: Path) -> Iterator[dict[str, str]]:
    """Yield the environment in which `ray job submit` finds a cluster.

    A cluster that RAY_ADDRESS names or that `ray start --head` began here is used as it is. A head
    of our own listens to whoever knows its token, and ends with the block.
    """
    environment = dict(os.environ)
    if {"RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"} & environment.keys() or _head_runs():
        yield environment
        return
    dashboard, client = free_port(), free_port()
    address = f"http://127.0.0.1:{dashboard}"
    environment |= {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # 5 are few on a small machine
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "ultra.serve.gateway:middlewares",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # it ends when its jobs have
    }
    with tempfile.TemporaryDirectory(prefix="ultra-ray-", ignore_cleanup_errors=True) as folder:
        command = [
            *(tool("ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--port=0"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
            *("--dashboard-agent-listen-port=0", f"--ray-client-server-port={client}"),
            *(f"--num-cpus={max(2, os.cpu_count() or 1)}", f"--temp-dir={folder}"),
            f"--object-store-memory={OBJECT_STORE_BYTES}",
        ]
        with log.open("wb") as output:
            head = subprocess.Popen(
                command,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            _wait_until_up(f"{address}/api/version", head, log)
            logs = f"{folder}/session_latest/logs"
            yield environment | {"RAY_API_SERVER_ADDRESS": address, "ULTRA_RAY_LOGS": logs}
        finally:
            head.terminate()  # `--block` passes it on to every process of the head
            head.wait()


def _head_runs() -> bool:
    noted = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    if not noted.exists():
        return False
    host, _, port = noted.read_text().strip().rpartition(":")
    with socket.socket() as probe:
        probe.settimeout(2)
        return port.isdigit() and probe.connect_ex((host, int(port))) == 0


def _wait_until_up(url: str, head: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while head.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except urllib.error.HTTPError:
            return  # it answers, if only to ask for the token
        except OSError:
            time.sleep(0.2)
        else:
            return
    tail = log.read_text(errors="replace").splitlines()[-30:]
    sys.exit("\n".join([*tail, f"the Ray head did not start; its whole log: {log}"]))


def free_port() -> int:
    """Return a port of the loopback address that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tool(name: str) -> str:
    """Return the program of that name, of this Python's environment where it has one."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name) or name


def write_real_exam(folder_uri: str) -> str:
    """Write a real cardiac cine as a one-exam folder and return the file's name.

    `pydicom-data` brings a cine of 120 frames whose ultrasound region is marked. Without it the
    cine that pydicom ships stands in; its region does not fit its frames, so `prepare` refuses it.
    """
    from pydicom.data import get_testdata_file

    names = ("color3d_jpeg_baseline.dcm", "examples_ybr_color.dcm")
    found = (get_testdata_file(name, download=False) for name in names)
    path = Path(str(next(path for path in found if path)))
    exam = {
        "exam_id": "real-cine",
        "patient_id": "pydicom",
        "site": "心脏",
        "findings": "真实心脏超声动态图像，无报告。",
        "diagnosis": "无诊断。",
        "frames": [path.name],
    }
    storage.write_bytes(storage.join(folder_uri, path.name), path.read_bytes())
    line = json.dumps(exam, ensure_ascii=False) + "\n"
    storage.write_bytes(storage.join(folder_uri, "exams.jsonl"), line.encode())
    return path.name


def read_real_exam(config: PipelineConfig) -> Exam | None:
    """Return the real exam with its answer; None where `prepare` refused it."""
    if not parquet.read_parts(config.data.exams_uri):
        return None
    predictions = read_predictions(config.evaluate.predictions_uri)
    frames = read_frames(config.data.exams_uri, {p.exam_id for p in predictions})
    return pick_exams(predictions, frames)[0]


def describe(summary: Summary, real: Exam | None, source: str) -> dict[str, Any]:
    """Return the numbers of summary.json."""
    results: dict[str, Any] = {
        "selection_accuracy": summary.metrics["selection/accuracy"],
        "selection_chance": summary.metrics["selection/chance"],
    }
    for row in ("", "constant", "question_only"):
        for short, name in SCORES.items():
            key, metric = (f"{row}_{short}", f"{row}/{name}") if row else (short, name)
            results[key] = summary.metrics[metric]
    results["num_exams"] = summary.metrics["num_exams"]
    results["num_questions"] = summary.metrics["num_questions"]
    first = real.predictions[0] if real else None
    results["real_exam"] = {
        "file": source,
        "frames_kept": len(real.frames) if real else 0,
        "chosen_frame": first.chosen if first else None,
        "question": first.question if first else None,
        "answer": first.answer if first else None,
    }
    return results


def draw_report(config: PipelineConfig, summary: Summary, real: Exam | None) -> str:
    """Return report.html."""
    predictions = read_predictions(config.evaluate.predictions_uri)
    shown = spread_exams(predictions, NUM_SHOWN)
    exams = pick_exams(predictions, read_frames(config.data.exams_uri, shown))
    sections = show_results(summary, exams, read_history(config, "train"))
    refused = "<p>It was refused: nothing shows that its frames carry no identity.</p>"
    sections.insert(0, ("A real cardiac cine", show_exam(real) if real else refused))
    return build_page("Ultra demo", sections, NOTICE)


def print_results(summary: Summary, results: Mapping[str, Any]) -> None:
    """Print the short table."""
    print("\n" + " " * 16 + "".join(f"{name:>20}" for name in SCORES.values()))
    for row in summary.tables["answers"]:
        values = [row.get(name) for name in SCORES.values()]
        cells = (f"{'-':>20}" if value is None else f"{value:20.3f}" for value in values)
        print(f"{row['row']:16}" + "".join(cells))
    for row in summary.tables["selection"][:1]:
        print(f"frame selection  {row['accuracy']:.3f} over {row['exams']} exams (chance "
              f"{row['chance']:.3f}, brightest {row['brightest']:.3f}, darkest "
              f"{row['darkest']:.3f})")  # fmt: skip
    real = results["real_exam"]
    if real["frames_kept"]:
        told = f"{real['frames_kept']} frames kept, frame {real['chosen_frame']} chosen; "
        print(f"real cine        {told}answer: {real['answer']}")
    else:
        print(f"real cine        {real['file']} was refused: it may carry identity")
    print(f"\n{NOTICE}")


if __name__ == "__main__":
    main()
