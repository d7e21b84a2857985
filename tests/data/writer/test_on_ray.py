from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.data.writer.endpoint_server import COMPLETION_TOKENS, PROMPT_TOKENS, Account, serve
from ultra import storage
from ultra.config import ConfigError, DataConfig, InputError, InstructionsConfig
from ultra.data import parquet
from ultra.data.schema import EXAMS, from_row, to_row
from ultra.data.writer.endpoint import read_costs
from ultra.data.writer.on_ray import write_instructions
from ultra.types import FrameGroup

pytestmark = pytest.mark.usefixtures("ray_cluster")

COST = (2 * PROMPT_TOKENS + 8 * COMPLETION_TOKENS) / 1e6


def exam(number: int) -> FrameGroup:
    """An exam whose report holds its number, so that no two share a reply."""
    return FrameGroup(
        f"e-{number}", f"p-{number}", "肝脏", f"肝右叶见一无回声区，大小约{number}mm，边界清晰。",
        "肝右叶囊肿。", (b"frame",), ((8, 6),), ("1",),
    )  # fmt: skip


def write(text: str) -> str:
    """A true answer, and one that claims another side."""
    size = re.search(r"\d+mm", text)
    assert size is not None
    answers = [("size", "多大？", size[0]), ("side", "哪一侧？", "左叶")]
    turns = [{"task": t, "turns": [{"question": q, "answer": a}]} for t, q, a in answers]
    return json.dumps({"conversations": turns}, ensure_ascii=False)


def configs(root: str, base_url: str, **changes: Any) -> tuple[DataConfig, InstructionsConfig]:
    given = {
        "writer": "endpoint",
        "base_url": base_url,
        "model": "m",
        "api_key_env": "",
        "replies_uri": f"{root}/instructions",
        "rejected_uri": f"{root}/rejected",
        "max_concurrency": 4,
        "max_tokens": 500,
        "prompt_price": 2,
        "completion_price": 8,
        "timeout_s": 30,
        **changes,
    }
    return DataConfig(exams_uri=f"{root}/exams"), InstructionsConfig(**given)


def write_table(data: DataConfig, num_exams: int, num_parts: int = 3) -> None:
    parts = []
    for start in range(num_parts):
        numbers = range(10 + start, 10 + num_exams, num_parts)
        rows = [to_row(exam(n)) for n in numbers]
        part = parquet.write_part(
            rows, data.exams_uri, EXAMS, position=start, row_group_bytes=2**20
        )
        assert part is not None
        parts.append(part)
    parquet.publish_parts(data.exams_uri, parts)


def rows(uri: str) -> list[dict[str, Any]]:
    return [row for part in parquet.part_uris(uri) for row in parquet.read_rows(part)]


def told(data: DataConfig) -> dict[str, list[str]]:
    """The answers of the second stage, by exam."""
    groups = map(from_row, rows(data.exams_uri))
    return {
        g.exam_id: [c.turns[1].content for c in g.conversations if c.stage == "instruct"]
        for g in groups
    }


def check_whole_run(root: str) -> None:
    with serve(write, {"11mm": ["429"], "12mm": ["500"], "13mm": ["drop"], "14mm": ["400"]}) as (
        url,
        account,
    ):
        data, config = configs(root, url, review_uri=f"{root}/review.csv")
        write_table(data, 8)
        counts = write_instructions(data, config)
        assert counts.bill.states == {"paid": 7, "failed": 1}
        assert counts.bill.failures == {"status 400": 1}
        assert counts.bill.cost == pytest.approx(7 * COST)
        assert counts.filled.rejected == {"side": 7}
        assert counts.filled.unwritten == 1
        assert counts.metrics()["conversations_rejected"] == 7
        assert told(data) == {f"e-{n}": [f"{n}mm"] if n != 14 else [] for n in range(10, 18)}
        found = rows(config.rejected_uri)
        assert {r["exam_id"] for r in found} == {f"e-{n}" for n in range(10, 18) if n != 14}
        assert {r["reason"] for r in found} == {"side: 左"}
        before = account.requests.copy()
        again = write_instructions(data, config)
        assert again.bill.states == {"kept": 7, "paid": 1}
        assert again.bill.cost == pytest.approx(COST)
        assert again.bill.spent == pytest.approx(8 * COST)
        assert told(data) == {f"e-{n}": [f"{n}mm"] for n in range(10, 18)}
        assert (account.requests - before).total() == 1
    assert set(account.answered.values()) == {1}
    sheet = storage.read_bytes(config.review_uri).decode("utf-8-sig")
    reviewed = list(csv.DictReader(io.StringIO(sheet, newline="")))
    assert len(reviewed) == again.sheet_rows == 8 * 4  # findings, report, size, and the false side
    assert "replies: 7 kept, 1 paid" in again.summary()


def test_a_whole_run_and_another_one(tmp_path: Path) -> None:
    check_whole_run(str(tmp_path))


@pytest.mark.slow
def test_a_whole_run_on_an_object_store(s3_bucket: str) -> None:
    check_whole_run(f"{s3_bucket}/writer")


def test_no_more_requests_are_under_way_than_allowed_over_all_parts(tmp_path: Path) -> None:
    with serve(write, pause_s=0.1) as (url, account):
        data, config = configs(str(tmp_path), url, max_concurrency=5)
        write_table(data, 40, num_parts=4)
        assert write_instructions(data, config).bill.states == {"paid": 40}
    assert account.most_at_once == 5


def test_what_the_cap_leaves_is_said_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    with serve(write) as (url, account):
        data, config = configs(str(tmp_path), url, spend_cap=5 * COST)
        write_table(data, 12)
        counts = write_instructions(data, config)
        paid = counts.bill.states["paid"]
        assert 1 <= paid <= 5
        assert counts.left == 12 - paid == counts.filled.unwritten
        assert f"{counts.left} exams are left" in counts.summary()
        assert counts.bill.spent <= 5 * COST
        again = write_instructions(data, config.model_copy(update={"spend_cap": 100 * COST}))
        assert again.bill.states == {"kept": paid, "paid": 12 - paid}
        assert (again.left, again.filled.unwritten) == (0, 0)
    assert account.requests.total() == 12


def test_an_endpoint_that_refuses_ends_the_job_with_one_line(tmp_path: Path) -> None:
    with serve(write, {"mm": ["401"] * 99}) as (url, _):
        data, config = configs(str(tmp_path), url)
        write_table(data, 6)
        before = rows(data.exams_uri)
        with pytest.raises(InputError, match=r"instructions\.base_url: .* status 401") as found:
            write_instructions(data, config)
    assert "\n" not in str(found.value)
    assert rows(data.exams_uri) == before


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    data, config = configs(str(tmp_path), "http://127.0.0.1:1/v1", api_key_env="NO_SUCH_KEY")
    write_table(data, 3)
    with pytest.raises(ConfigError, match="the variable NO_SUCH_KEY is not set"):
        write_instructions(data, config)


def test_a_key_is_sent_and_written_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WRITER_KEY", "very-secret")
    with serve(write) as (url, account):
        data, config = configs(str(tmp_path), url, api_key_env="WRITER_KEY")
        write_table(data, 3)
        write_instructions(data, config)
    assert account.keys == {"very-secret"}
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert not any(b"very-secret" in p.read_bytes() for p in files)


def test_decisions_of_the_sheet_are_honoured_by_the_next_run(tmp_path: Path) -> None:
    with serve(write) as (url, _):
        data, config = configs(str(tmp_path), url, review_uri=str(tmp_path / "review.csv"))
        write_table(data, 3)
        write_instructions(data, config)
        path = Path(config.review_uri)
        sheet = path.read_bytes().decode("utf-8-sig")
        lines = list(csv.reader(io.StringIO(sheet, newline="")))
        places = {name: n for n, name in enumerate(lines[0])}
        choices = {("e-10", "size"): ("edit", "约10mm"), ("e-11", "size"): ("discard", ""),
                   ("e-12", "side"): ("accept", "")}  # fmt: skip
        for line in lines[1:]:
            key = (line[places["exam_id"]], line[places["task"]])
            line[-2:] = choices.get(key, ("", ""))
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            csv.writer(file).writerows(lines)
        for _ in range(2):
            counts = write_instructions(data, config)
            assert told(data) == {"e-10": ["约10mm"], "e-11": [], "e-12": ["12mm", "左叶"]}
            assert counts.filled.reviewed == {"accept": 1, "edit": 1, "discard": 1}
        lines[2][-2] = "perhaps"
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            csv.writer(file).writerows(lines)
        with pytest.raises(InputError, match="row 3: decision 'perhaps'"):
            write_instructions(data, config)


JOB = """
import sys, ray
from ultra.cli import run_job
from ray_jobs.instructions import main
ray.init(sys.argv.pop(1), log_to_driver=False, logging_level="error")
run_job(main, "job", sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_job_goes_on_without_paying_twice(tmp_path: Path) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    with serve(write, pause_s=0.15) as (url, account):
        data, config = configs(str(tmp_path), url, max_concurrency=2)
        write_table(data, 30)
        command = [sys.executable, "-c", JOB, address, *job_arguments(tmp_path, config)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with (tmp_path / "log").open("wb") as log:
            job = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            try:
                wait_for(lambda: len(read_costs(config.replies_uri)) >= 8 or job.poll() is not None)
                assert job.poll() is None, (tmp_path / "log").read_text()
            finally:
                job.send_signal(signal.SIGKILL)
                job.wait()
        wait_until_quiet(account)
        kept = set(read_costs(config.replies_uri))
        before = account.requests.copy()
        assert 8 <= len(kept) < 30
        assert told(data) == {f"e-{n}": [] for n in range(10, 40)}  # the old table stands
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert f"{len(kept)} kept, {30 - len(kept)} paid" in done.stdout
    asked_again = set(before) & set(account.requests - before)
    assert not asked_again & kept  # what had been paid for when the job died was not paid again
    assert len(asked_again) <= config.max_concurrency  # what was under way then could not be kept
    assert told(data) == {f"e-{n}": [f"{n}mm"] for n in range(10, 40)}


def job_arguments(root: Path, config: InstructionsConfig) -> Iterator[str]:
    yield from ("--config", "tiny", "--set", f"root={root}", "--set", "tracking.uri=")
    for name, value in config.model_dump(exclude_defaults=True).items():
        yield from ("--set", f"instructions.{name}={value}")


def wait_for(condition: Any, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_until_quiet(account: Account) -> None:
    """Return when nothing has been asked for a while: the actor of the dead job is gone."""
    seen, since = -1, time.monotonic()
    while time.monotonic() - since < 3:
        if account.requests.total() != seen:
            seen, since = account.requests.total(), time.monotonic()
        time.sleep(0.1)
