"""Where the time of a step goes, by a clock of our own, and that nothing else changes."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch.profiler import profile, record_function

from tests.test_presets import rows_of
from tests.train.test_loop import EagerEngine, make_batches, make_schedule
from ultra.config import PipelineConfig, parse
from ultra.model.language import LanguageBranch
from ultra.model.llava_ultra import LlavaUltra
from ultra.tracking import NullTracker, Tracker, open_run
from ultra.train.alone import fit_alone
from ultra.train.loop import Schedule, Span, Teaching, run_stage
from ultra.train.profile import StepProfile, list_operators, plan_steps, profile_stage
from ultra.train.stage import StageRun

NO_TEACHING, LIKELIHOOD = Teaching("none", 0), Teaching("likelihood", 0)
TOOK_S = {
    Span.DATA: 5.0, Span.FORWARD: 2.0, Span.LANGUAGE: 7.0, Span.TEACHER: 11.0, Span.BACKWARD: 13.0,
    Span.UPDATE: 17.0, Span.OTHER: 1.0,
}  # fmt: skip


class Records(NullTracker):
    """Keeps what it is given."""

    run_id = "run"

    def __init__(self) -> None:
        self.figures: dict[str, Figure] = {}
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self.files: dict[str, bytes] = {}

    def figure(self, name: str, figure: Figure) -> None:
        self.figures[name] = figure

    def table(self, name: str, rows: Any) -> None:
        self.tables.setdefault(name, []).extend(rows)

    def file(self, name: str, content: bytes) -> None:
        self.files[name] = content


class Clock:
    """Stands still but for what is put on it."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def slow_down(self, thing: Any, name: str, seconds: Any) -> None:
        """Make a method take so many seconds, or those that a function gives."""
        method = getattr(thing, name)

        def slowed(*args: Any, **kwargs: Any) -> Any:
            self.now_s += seconds() if callable(seconds) else seconds
            return method(*args, **kwargs)

        setattr(thing, name, slowed)


class Engine(EagerEngine):
    device = torch.device("cpu")


def begin(
    config: PipelineConfig, schedule: Schedule, teaching: Teaching = NO_TEACHING, count: int = 3
) -> StageRun:
    raw = config.model_dump(mode="json")
    raw["train"]["profile_steps"] = count
    raw["model"]["selection"] |= {"gradient": "gumbel", "teacher": "likelihood"}  # draws
    raw["model"]["language"]["lora"] |= {"dropout": 0.3}
    config = parse(raw)
    torch.manual_seed(0)
    model = LlavaUltra(config.model, LanguageBranch(config.model.language)).train()
    engine: Any = Engine(model, schedule.accumulation)
    return StageRun(config, config.train.stages[1], model, engine, teaching, schedule, {})


def take_steps(run: StageRun, tracker: Tracker, report: Any = lambda step, metrics: None) -> None:
    batches = make_batches(run.model, ((3, 1), (2, 2)))
    with profile_stage(run, tracker) as mark:
        run_stage(run.engine, batches, run.schedule, run.teaching, report, mark)
    assert not run.model.language._forward_hooks
    assert not run.model.language._forward_pre_hooks


def parts_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {row["name"]: row["ms"] for row in rows if row["kind"] == "part"}


def test_parts_are_what_each_takes_and_add_up_to_the_step(
    random_config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, tracker = Clock(), Records()
    monkeypatch.setattr("ultra.train.profile.perf_counter", clock)
    run = begin(random_config, make_schedule(9, accumulation=2), LIKELIHOOD)
    steps_done, ends_s = 0, [0.0]

    def uneven(seconds: float) -> float:
        # The two steps that warm up and the one that is recorded are not like the others.
        return seconds + (1000.0 if steps_done in (0, 1, 5) else 0.0)

    engine, model = run.engine, run.model
    clock.slow_down(engine, "set_learning_rate", TOOK_S[Span.OTHER])
    clock.slow_down(engine, "backward", TOOK_S[Span.BACKWARD])
    clock.slow_down(engine, "step", lambda: uneven(TOOK_S[Span.UPDATE]))
    clock.slow_down(model.fusion, "forward", TOOK_S[Span.FORWARD])
    clock.slow_down(
        model.language,
        "forward",
        lambda: TOOK_S[Span.LANGUAGE if torch.is_grad_enabled() else Span.TEACHER],
    )
    batches = make_batches(model, ((3, 1), (2, 2)))

    def slow_batches() -> Iterator[Any]:
        for batch in batches:
            clock.now_s += TOOK_S[Span.DATA]
            yield batch

    def report(step: int, metrics: Any) -> None:
        nonlocal steps_done
        steps_done = step
        ends_s.append(clock.now_s)
        with torch.no_grad():
            model(**next(batches))  # a look at other exams, which no step has part in
        clock.now_s += 500.0

    with profile_stage(run, tracker) as mark:
        run_stage(engine, slow_batches(), run.schedule, run.teaching, report, mark)
    found = parts_of(tracker.tables["profile/instruct"])
    expected = {span: 2000 * seconds for span, seconds in TOOK_S.items()} | {Span.OTHER: 1000}
    assert found == {**expected, Span.LOSSES: 0}
    between_s = 500 + TOOK_S[Span.FORWARD] + TOOK_S[Span.TEACHER]  # the look has no gradients
    assert sum(found.values()) == 1000 * (ends_s[4] - ends_s[3] - between_s)
    assert {row["step"] for row in tracker.tables["profile/instruct"]} == {6}


@pytest.mark.parametrize(
    ("first", "num_steps", "offset", "teaching", "expected"),
    [
        (0, 60, 0, NO_TEACHING, range(6)),
        (0, 60, 0, Teaching("attention", 20), range(20, 26)),
        (0, 60, 15, Teaching("attention", 20), range(5, 11)),
        (0, 60, 60, Teaching("attention", 20), range(6)),  # begun before this stage
        (0, 60, 0, Teaching("attention", 54), range(54, 60)),
        (0, 60, 0, Teaching("attention", 55), range(6)),  # too little of the stage has it
        (0, 60, 0, Teaching("none", 20), range(6)),
        (30, 60, 0, Teaching("attention", 20), range(30, 36)),  # goes on from a checkpoint
        (10, 60, 0, Teaching("attention", 20), range(20, 26)),
        (58, 60, 0, Teaching("attention", 20), range(58, 60)),
        (0, 1, 0, NO_TEACHING, range(1)),
    ],
)
def test_which_steps_are_looked_at(first, num_steps, offset, teaching, expected) -> None:
    assert plan_steps(make_schedule(num_steps, first=first, offset=offset), teaching, 3) == expected


def test_training_goes_on_exactly_as_without_a_profile(random_config: PipelineConfig) -> None:
    found = []
    for count in (2, 0):
        run = begin(random_config, make_schedule(7, accumulation=2, seed=4), LIKELIHOOD, count)
        rows: list[Any] = []
        tracker = Records()

        def report(step: int, metrics: Any, rows: list[Any] = rows) -> None:
            rows.append((step, metrics, torch.rand(2).tolist()))

        take_steps(run, tracker, report)
        assert list(tracker.figures) == (["profile/instruct"] if count else [])
        found.append((rows, run.model.state_dict()))
    (with_it, one), (without, other) = found
    assert with_it == without
    assert len({metrics["loss"] for _, metrics, _ in without}) == 7
    assert [name for name, tensor in one.items() if not torch.equal(tensor, other[name])] == []


@pytest.mark.parametrize(("num_steps", "first"), [(1, 0), (2, 0), (6, 5), (4, 0)])
def test_a_stage_with_fewer_steps_has_a_profile_of_those(
    random_config: PipelineConfig, num_steps: int, first: int
) -> None:
    tracker = Records()
    take_steps(begin(random_config, make_schedule(num_steps, first=first)), tracker)
    rows = tracker.tables["profile/instruct"]
    assert {row["step"] for row in rows} == {num_steps}
    assert parts_of(rows).keys() == {span for span in Span if span is not Span.BETWEEN}
    assert parts_of(rows)[Span.BACKWARD] > 0
    assert any(row["kind"] == "operator" for row in rows)


@pytest.mark.parametrize("last", [1, 5, 6, 7])
def test_a_stage_may_end_before_its_profile_does(random_config: PipelineConfig, last: int) -> None:
    tracker = Records()
    run = begin(random_config, make_schedule(20))
    take_steps(run, tracker, lambda step, metrics: step == last)
    assert bool(tracker.figures) == (last >= 6)


def test_an_error_while_it_records_comes_through(random_config: PipelineConfig) -> None:
    run, tracker = begin(random_config, make_schedule(2)), Records()
    steps = []

    def fail() -> None:
        steps.append(1)
        if len(steps) == 2:
            raise RuntimeError("out of memory")

    run.engine.step = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="out of memory"):
        take_steps(run, tracker)
    assert not tracker.figures
    assert not run.model.language._forward_hooks
    take_steps(begin(random_config, make_schedule(1)), tracker)  # another can record
    assert tracker.figures


def test_without_steps_or_tracking_there_is_none(
    random_config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepProfile, "__init__", None)  # not even made
    tracker = Records()
    take_steps(begin(random_config, make_schedule(2), count=0), tracker)
    take_steps(begin(random_config, make_schedule(2), count=3), NullTracker())
    assert not tracker.figures


def test_operators_are_counted_and_named_ranges_are_none() -> None:
    square = torch.rand(64, 64)
    with profile() as recorder, record_function(Span.FORWARD.value):
        for _ in range(5):
            torch.mm(square, square)
        square.tanh()
    found = list_operators(recorder, "CPU")
    calls = {operator.name: operator.calls for operator in found}
    assert (calls["aten::mm"], calls["aten::tanh"]) == (5, 1)
    assert Span.FORWARD not in calls
    times = [operator.ms for operator in found]
    assert times == sorted(times, reverse=True)
    assert min(times) > 0


def test_mlflow_gets_picture_table_and_trace(
    random_config: PipelineConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    raw = random_config.model_dump(mode="json")
    raw["tracking"] = {"uri": f"sqlite:///{tmp_path}/mlflow.db"}
    config, slept_s = parse(raw), 0.1

    def slow_rows() -> Iterator[dict[str, Any]]:
        for row in rows_of(random_config):
            time.sleep(slept_s)
            yield row

    with open_run(config, "train") as tracker:
        fit_alone(config, slow_rows(), 5, tmp_path / "stages", tracker=tracker)
    client = MlflowClient(config.tracking.uri)
    files = {artifact.path for artifact in client.list_artifacts(tracker.run_id, "profile")}
    endings = (".json", ".png", "-trace.json.gz")
    assert files == {f"profile/{name}{e}" for name in ("align", "instruct") for e in endings}

    def read(name: str) -> bytes:
        return Path(client.download_artifacts(tracker.run_id, name, str(tmp_path))).read_bytes()

    assert read("profile/align.png").startswith(b"\x89PNG")
    table = json.loads(read("profile/align.json"))
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    parts = parts_of(rows)
    # Four rows a step, and a sleep is never shorter than was asked for.
    assert max(parts, key=lambda name: parts[name]) == Span.DATA
    assert parts[Span.DATA] >= 1000 * slept_s * config.train.batch_size
    for kind in ("part", "operator"):
        assert sum(r["percent"] for r in rows if r["kind"] == kind) == pytest.approx(100)
    lines = [line for line in capsys.readouterr().out.splitlines() if " a step " in line]
    assert [line.split(": of ")[0] for line in lines] == ["align", "instruct"]
    assert lines[0].split(" a step ")[1].split(", ")[0].endswith(" % waiting for data")
    events = json.loads(gzip.decompress(read("profile/instruct-trace.json.gz")))["traceEvents"]
    named = [e["name"] for e in events if e.get("cat") == "user_annotation"]
    wanted = [Span.DATA, Span.TEACHER, Span.FORWARD, Span.LANGUAGE, Span.LOSSES, Span.BACKWARD]
    assert [name for name in named if name in set(Span)][: len(wanted)] == wanted
