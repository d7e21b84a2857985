"""The command line of the jobs, as a user meets it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ultra.cli import config_from_args, run_job
from ultra.config import InputError, PipelineConfig, load, parse

ROOT = Path(__file__).resolve().parent.parent


def run_prepare(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "ray_jobs.prepare", *args],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_print_shows_the_whole_tree_and_stops(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        config_from_args("", ["--config", "llava-ultra-13b", "--set", "data.seed=7", "--print"])
    assert not stop.value.code
    shown = parse(yaml.safe_load(capsys.readouterr().out))
    assert shown == load("llava-ultra-13b", ["data.seed=7"])


def test_tiny_is_the_default() -> None:
    assert config_from_args("", []) == load("tiny")


def test_the_help_of_a_job_is_its_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        config_from_args("Do a thing.\n\n    the command", ["--help"])
    shown = capsys.readouterr().out
    assert "Do a thing.\n\n    the command" in shown
    assert "llava-ultra-13b" in shown


def test_a_job_that_prints_writes_nothing(tmp_path: Path) -> None:
    done = run_prepare(tmp_path, "--set", "data.seed=7", "--print")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["data"]["seed"] == 7
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--set", "data.seeed=1"], "data.seeed: unknown key; allowed: format, source_uri, "),
        (["--config", "tinny"], "unknown preset 'tinny'; known: "),
    ],
)
def test_a_mistake_ends_a_job_with_one_line(tmp_path: Path, args: list[str], message: str) -> None:
    done = run_prepare(tmp_path, *args)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_a_job_finds_wrong_is_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    def job(_: PipelineConfig) -> None:
        raise InputError("s3://none:\n  no such bucket")

    with pytest.raises(SystemExit) as stop:
        run_job(job, "", [])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "s3://none: no such bucket\n"


def test_a_fault_of_ours_is_not_hidden() -> None:
    def job(_: PipelineConfig) -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run_job(job, "", [])


def test_a_job_gets_the_configuration() -> None:
    seen: list[PipelineConfig] = []
    run_job(seen.append, "", ["--set", "name=mine"])
    assert [config.root for config in seen] == ["runs/mine"]


@pytest.mark.parametrize(
    ("job", "flag", "value"),
    [
        ("prepare", "--strict", "strict: true"),
        ("evaluate", "--register", "register_champion: true"),
    ],
)
def test_a_flag_of_a_job_is_short_for_a_value(job: str, flag: str, value: str) -> None:
    command = [sys.executable, "-m", f"ray_jobs.{job}", flag, "--print"]
    assert f" {value}\n" in subprocess.check_output(command, cwd=ROOT, text=True)


@pytest.fixture
def copied_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory of a job that came with `--working-dir`."""
    folder = tmp_path / "runtime_resources" / "working_dir_files" / "0"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)


@pytest.mark.usefixtures("copied_folder")
def test_output_that_ray_would_delete_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        config_from_args("", [])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("root: 'runs/tiny' is relative")
    assert message.count("\n") == 1


@pytest.mark.usefixtures("copied_folder")
@pytest.mark.parametrize("root", ["s3://bucket/tiny", "/data/tiny"])
def test_output_that_stays_is_accepted(root: str) -> None:
    assert config_from_args("", ["--set", f"root={root}"]).root == root
