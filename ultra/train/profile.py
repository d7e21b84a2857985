"""Where the time of a step goes: the clock tells its parts apart, torch's profiler its operators.

The profiler slows down what it records, and its events by the ten thousand are slow to read. So it
records one forward pass, with what follows it to the end of a step, that the clock leaves out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ultra.tracking import Tracker
from ultra.train.breakdown import Breakdown, Device, Operator, draw_breakdown
from ultra.train.loop import Schedule, Span, Teaching
from ultra.train.stage import StageRun

NUM_SKIPPED = 2
"""Steps before those that count: they allocate, and choose kernels."""
PARTS: list[Span] = [span for span in Span if span != Span.BETWEEN]
MAX_TRACE_BYTES = 16 * 2**20
"""Of a trace that is kept, compressed: browsers open no larger ones with ease."""


@contextmanager
def profile_stage(run: StageRun, tracker: Tracker) -> Iterator[Callable[[Span], None]]:
    """Yield what `run_stage` marks the parts of a step with.

    `train.profile_steps` steps are taken apart on the worker that tracks. On the others, which wait
    for it at their next collective, nothing happens, and nowhere does what is computed change.
    """
    count = run.config.train.profile_steps
    if not tracker.run_id or not count:
        yield lambda span: None
        return
    steps = StepProfile(run, plan_steps(run.schedule, run.teaching, count), tracker)
    try:
        yield steps
    finally:
        steps.close()


def plan_steps(schedule: Schedule, teaching: Teaching, count: int) -> range:
    """Return the steps to look at: two that warm up, `count` that are timed, one that is recorded.

    They are the first to be taken or, where the redundancy loss begins later in the stage, the
    first that have it; fewer where the stage has no more.
    """
    wanted = NUM_SKIPPED + count + 1
    taught = teaching.first - schedule.offset if teaching.kind != "none" else 0
    begin = schedule.first
    if taught + wanted <= schedule.num_steps:
        begin = max(begin, taught)
    return range(begin, min(begin + wanted, schedule.num_steps))


class StepProfile:
    """Takes the marks of a stage, and tracks its profile when the planned steps are made.

    Args:
        run: the stage.
        steps: from `plan_steps`.
        tracker: gets picture, table and trace.
    """

    def __init__(self, run: StageRun, steps: range, tracker: Tracker) -> None:
        self.run, self.steps, self.tracker = run, steps, tracker
        self.step, self.num_passes = run.schedule.first, 0
        self.span, self.since_s = Span.BETWEEN, 0.0
        self.taken_s: list[dict[Span, float]] = []
        self.recorder = profile()
        self.recording, self.named = ExitStack(), ExitStack()
        language = run.model.language
        self.hooks = [
            language.register_forward_pre_hook(lambda *_: self._enter_language()),
            language.register_forward_hook(lambda *_: self._leave_language()),
        ]

    def __call__(self, span: Span) -> None:
        """End the part that is under way, and begin another."""
        if self.step in self.steps:
            self._take(span)
        if span is Span.BETWEEN:
            self.step += 1
            if self.step == self.steps.stop:
                self.close()
                self._track()

    def close(self) -> None:
        """Let go of hooks and recorder, wherever the stage has come to."""
        for hook in self.hooks:
            hook.remove()
        self.named.close()
        self.recording.close()

    def _take(self, span: Span) -> None:
        device = self.run.engine.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # what a part began belongs to it
        if self.span is Span.BETWEEN:
            self.taken_s.append(dict.fromkeys(PARTS, 0.0))
            self.num_passes = 0
        else:
            self.taken_s[-1][self.span] += perf_counter() - self.since_s
        self.named.close()
        if span is Span.DATA:
            self.num_passes += 1
        if self.step == self.steps[-1] and self.num_passes == self.run.schedule.accumulation:
            if span is Span.DATA:
                self.recording.enter_context(self.recorder)
            if span is not Span.BETWEEN:
                self.named.enter_context(record_function(span.value))
        self.span, self.since_s = span, perf_counter()

    def _enter_language(self) -> None:
        # Validation and pictures call it too, between the steps.
        if self.span is not Span.BETWEEN:
            self(Span.LANGUAGE if torch.is_grad_enabled() else Span.TEACHER)

    def _leave_language(self) -> None:
        # What the likelihood teacher does with what it read is the last of a forward pass.
        if self.span is Span.LANGUAGE:
            self(Span.LOSSES)

    def _track(self) -> None:
        count = self.run.config.train.profile_steps
        # Not the recorded step, nor those that warm up; where a stage has no others, even these.
        timed_s = self.taken_s[:-1][-count:] or self.taken_s
        parts_ms: dict[Span, float] = {
            span: 1000 * sum(taken_s[span] for taken_s in timed_s) / len(timed_s) for span in PARTS
        }
        stage = self.run.stage.name
        device: Device = "GPU" if ProfilerActivity.CUDA in self.recorder.activities else "CPU"
        operators = list_operators(self.recorder, device)
        found = Breakdown(stage, self.step, len(timed_s), parts_ms, operators, device)
        print(found.describe(), flush=True)
        self.tracker.figure(f"profile/{stage}", draw_breakdown(found))
        self.tracker.table(f"profile/{stage}", found.rows())
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json.gz"
            self.recorder.export_chrome_trace(str(path))
            if path.stat().st_size <= MAX_TRACE_BYTES:
                self.tracker.file(f"profile/{stage}-trace.json.gz", path.read_bytes())


def list_operators(recorder: profile, device: Device) -> tuple[Operator, ...]:
    """Return what took time of a device itself, longest first.

    A GPU's own events are left out: their time is in the operators that began them. So are ranges
    that somebody named, ours among them.
    """
    operators = [
        Operator(
            event.key,
            event.count,
            (event.self_device_time_total if device == "GPU" else event.self_cpu_time_total) / 1000,
        )
        for event in recorder.key_averages()
        if event.device_type.name == "CPU" and not event.is_user_annotation
    ]
    taking = [operator for operator in operators if operator.ms > 0]
    return tuple(sorted(taking, key=lambda operator: -operator.ms))
