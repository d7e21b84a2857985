"""What holds for the repository as a whole: its layout, its imports, its files and its README."""

from __future__ import annotations

import argparse
import ast
import base64
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from ultra.cli import config_from_args
from ultra.config import PipelineConfig, load, preset_names

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(p for top in ("ultra", "ray_jobs") for p in (ROOT / top).rglob("*.py"))
JOBS = sorted(p.stem for p in (ROOT / "ray_jobs").glob("*.py") if p.stem != "__init__")
MODULES = sorted(
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in SOURCES
)
GENERATED = {"__pycache__", "build", "dist", "runs"}
HOSTS = {
    "127.0.0.1", "localhost", "mlflow", "arxiv.org", "keepachangelog.com", "semver.org",
    "www.apache.org", "www.w3.org",
}  # fmt: skip
"""Whom an address in a file may name; none is a registry of packages, images or weights."""


def shipped_files() -> Iterator[Path]:
    for folder, names, files in os.walk(ROOT):
        names[:] = [
            name for name in names
            if name not in GENERATED and (not name.startswith(".") or name == ".ci")
            and not name.endswith(".egg-info")
        ]  # fmt: skip
        yield from (Path(folder) / file for file in files)


def text_files() -> Iterator[tuple[Path, str]]:
    for path in shipped_files():
        try:
            yield path, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def read_yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def run_python(code: str, folder: Path) -> str:
    """Return what a fresh interpreter prints, run in `folder`."""
    (folder / "home").mkdir()
    (folder / "tmp").mkdir()
    (folder / "empty").mkdir()
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_", "MLFLOW_"))},
        "PYTHONPATH": str(ROOT),
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=folder / "empty",
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# Cluster and serving


def test_the_cluster_passes_ray_s_own_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray.autoscaler._private.util import prepare_config, validate_config

    monkeypatch.chdir(ROOT)
    config = read_yaml("cluster.yaml")
    validate_config(prepare_config(config))
    assert all((ROOT / local).exists() for local in config["file_mounts"].values())
    image = config["docker"]["image"]
    version = f"{sys.version_info.major}{sys.version_info.minor}"
    assert image.startswith(f"rayproject/ray:{ray.__version__}-py{version}")


def test_the_cluster_s_validation_can_fail() -> None:
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = read_yaml("cluster.yaml") | {"max_wokers": 3}
    with pytest.raises(ValidationError, match="max_wokers"):
        validate_config(prepare_config(config))


def test_the_serve_config_fits_its_schema_and_the_application() -> None:
    from ray.serve.schema import ServeDeploySchema

    from ultra.serve.limits import ServeArgs

    schema = ServeDeploySchema.model_validate(read_yaml("serve_config.yaml"))
    (application,) = schema.applications
    ServeArgs.model_validate(application.args)
    module_name, _, builder = application.import_path.partition(":")
    module = importlib.import_module(module_name)
    assert callable(getattr(module, builder))
    for deployment in application.deployments:
        assert getattr(module, deployment.name).name == deployment.name


# Imports


def test_the_model_needs_neither_ray_nor_mlflow_nor_deepspeed(tmp_path: Path) -> None:
    modules = [m for m in MODULES if m.startswith("ultra.model") or m == "ultra.model"]
    assert len(modules) > 10
    code = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
print(sorted({{"ray", "mlflow", "deepspeed", "transformers", "peft"}} & sys.modules.keys()))
"""
    assert run_python(code, tmp_path).strip() == "[]"


def test_nothing_happens_at_import(tmp_path: Path) -> None:
    # Other packages do things when they are imported, so all is imported twice: the second time
    # only our own modules run.
    code = f"""
import importlib, os, sys, threading
from pathlib import Path

def import_all():
    for name in {MODULES!r}:
        importlib.import_module(name)

def state():
    files = sorted(str(p) for top in (os.environ["HOME"], os.environ["TMPDIR"], os.getcwd())
                   for p in Path(top).rglob("*"))
    return {{**os.environ, "files": files, "folder": os.getcwd(), "path": sys.path[:],
            "threads": threading.active_count()}}

clean = dict(os.environ)
import_all()
assert not os.listdir("."), os.listdir(".")
for name in [m for m in sys.modules if m.split(".")[0] in ("ultra", "ray_jobs")]:
    del sys.modules[name]
os.environ.clear()
os.environ.update(clean)
before = state()
import_all()
after = state()
# Names only: an environment may hold what no log should.
changed = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
assert not changed, changed
import ray
assert not ray.is_initialized()
print("quiet")
"""
    assert run_python(code, tmp_path).endswith("quiet\n")


# Files and code


def test_job_files_stay_thin() -> None:
    lengths = {p.name: len(p.read_text().splitlines()) for p in (ROOT / "ray_jobs").glob("*.py")}
    del lengths["demo.py"], lengths["demo_server.py"]  # they drive jobs, they are none
    assert {name: n for name, n in lengths.items() if n > 40} == {}


def test_no_function_is_long() -> None:
    long = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                length = node.end_lineno - node.lineno + 1
                if length > 60:
                    long.append(f"{path.relative_to(ROOT)} {node.name}: {length} lines")
    assert long == []


def test_names_say_what_things_are() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert [p for p in shipped_files() if p.stem in vague and p.suffix == ".py"] == []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                assert not node.name.endswith(("Manager", "Factory", "Helper", "Utils")), node.name


def test_tests_mirror_the_package() -> None:
    whole = {"architecture", "deploy", "outages", "pipeline", "presets", *JOBS}
    for path in (ROOT / "tests").rglob("test_*.py"):
        folder = path.parent.relative_to(ROOT / "tests")
        subject = path.stem.removeprefix("test_")
        if not folder.parts and subject in whole:
            continue
        source = ROOT / (folder if folder.parts == ("benchmarks",) else "ultra" / folder)
        found = source.rglob("*.py") if folder.parts else source.glob("*.py")
        modules = {p.stem for p in found}
        named = any(subject == module or subject.endswith(f"_{module}") for module in modules)
        assert named, f"{path.relative_to(ROOT)} tests no module of ultra/{folder}"
    for package in (ROOT / "ultra").glob("*/__init__.py"):
        tests = ROOT / "tests" / package.parent.name
        assert list(tests.glob("test_*.py")), f"no tests of {package.parent.name}"


def test_no_file_names_this_machine_or_a_registry() -> None:
    address = re.compile(r"\b[a-z][a-z0-9+]*://([A-Za-z0-9.-]+)")
    schemes = ("s3://", "sqlite://", "file://")
    homes = re.compile(r"(?<![\w.~])/(?:Users|home|root|work|mnt)/\w")
    found = []
    for path, text in text_files():
        name = path.relative_to(ROOT)
        for match in address.finditer(text):
            host = match[1].rstrip(".")
            if not match[0].startswith(schemes) and host not in HOSTS and "." in host:
                found.append(f"{name}: {match[0]}")
        if str(ROOT) in text:
            found.append(f"{name}: {ROOT}")
        found += [f"{name}: {match[0]}" for match in homes.finditer(text)]
        if re.search(r"(?<!no-emit-)index-url|--find-links", text) and path != Path(__file__):
            found.append(f"{name}: an index")
    assert found == []


def test_the_lock_pins_everything_and_holds_no_address() -> None:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.lstrip().startswith("#")]
    assert len(pins) > 50
    pinned = re.compile(r"[a-z0-9][a-z0-9._-]*(\[[a-z0-9,-]+\])?==[\w.+!-]+( ; .+)?")
    assert [line for line in pins if not pinned.fullmatch(line)] == []
    assert not any("://" in line for line in lines)


# Commands


def commands_of(block: str) -> list[list[str]]:
    """Return the commands of a shell block, each as its words; a here-document is left out."""
    block = re.sub(r"<<(\w+)\n.*?\n\1\n", "\n", block, flags=re.DOTALL)
    lines = block.replace("\\\n", " ").splitlines()
    commands = [part for line in lines for part in line.split(" && ")]
    return [words for words in (shlex.split(c, comments=True) for c in commands) if words]


def shell_blocks(text: str) -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def check_job(module: str, args: list[str]) -> None:
    """Fail unless the module exists and takes the arguments."""
    if module.startswith("benchmarks."):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
        importlib.import_module(module)._parse(args)
        return
    if module == "ultra":
        assert isinstance(importlib.import_module("ultra.__main__")._parse(args), tuple)
        return
    assert module.removeprefix("ray_jobs.") in JOBS, module
    if module in {"ray_jobs.demo", "ray_jobs.demo_server"}:
        parsed = importlib.import_module(module)._parse(args)
        assert isinstance(parsed, argparse.Namespace)
        return
    args = [arg.replace("$PWD", str(ROOT)) for arg in args]
    assert isinstance(config_from_args(module, args), PipelineConfig)


def check_click(command: Any, name: str, args: list[str]) -> Any:
    """Return the parameters of a click command as it parses them; fail where it would."""
    return command.make_context(name, list(args)).params


def check_command(words: list[str]) -> None:
    """Fail unless a command would be understood by what it calls."""
    program, args = Path(words[0]).name, words[1:]
    if program == "make":
        assert args
        assert set(args) <= make_targets(), args
    elif program == "python":
        assert args[0] == "-m", words
        check_job(args[1], args[2:])
    elif program == "ray":
        check_ray(args)
    elif program == "serve":
        from ray.serve.scripts import cli

        params = check_click(cli.commands[args[0]], args[0], args[1:])
        assert (ROOT / params["config_or_import_path"]).is_file()
    elif program == "curl":
        assert args[0].startswith("http://127.0.0.1:8000/")
    else:
        assert program in {"git", "cd", "."}, f"no check for {words}"


def check_ray(args: list[str]) -> None:
    from ray.scripts.scripts import cli

    if args[0] == "job":
        params = check_click(cli.commands["job"].commands[args[1]], args[1], args[2:])
        assert params["working_dir"] == "."
        check_command(list(params["entrypoint"]))
    else:
        params = check_click(cli.commands[args[0]], args[0], args[1:])
        assert (ROOT / params["cluster_config_file"]).is_file()


def test_every_job_of_the_makefile_takes_its_arguments() -> None:
    recipes = re.findall(r"^\t\$\(RUN\) -m (ray_jobs\..*)", (ROOT / "Makefile").read_text(), re.M)
    assert recipes
    for recipe in recipes:
        check_command(["python", "-m", *shlex.split(recipe)])


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_every_command_of_a_document_is_understood(name: str) -> None:
    commands = [c for b in shell_blocks((ROOT / name).read_text()) for c in commands_of(b)]
    assert commands
    for words in commands:
        check_command(words)


def test_a_command_that_is_wrong_is_found() -> None:
    for command in (
        "make dmeo",
        "python -m ray_jobs.trian",
        "ray up clutser.yaml",
        "ray job submit --working-dir . -- python -m ray_jobs.none",
        "serve deploy none.yaml",
        "rm -rf all",
    ):
        with pytest.raises(AssertionError):
            check_command(shlex.split(command))
    with pytest.raises(SystemExit):
        check_command(shlex.split("python -m ray_jobs.train --set train.workers=3"))


def test_the_readme_names_targets_keys_and_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([a-z-]+)`", text):
        assert target in make_targets(), target
    sections = "|".join(PipelineConfig.model_fields)
    keys = re.findall(rf"`((?:{sections})\.[a-z_.]+)`", text)
    assert len(keys) >= 4
    for key in keys:
        section: Any = load("tiny")
        for part in key.split("."):
            assert part in type(section).model_fields, key
            section = getattr(section, part)
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 8
    for link in links:
        assert link.startswith("https://") or (ROOT / link.partition("#")[0]).exists(), link


def test_the_readme_s_exam_is_accepted(tmp_path: Path) -> None:
    from ultra.config import DataConfig
    from ultra.data.importers.folder import list_exams

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^```json\n(.*?)\n```", text, flags=re.MULTILINE)
    (tmp_path / "exams.jsonl").write_text(line, encoding="utf-8")
    (entry,) = list_exams(DataConfig(source_uri=str(tmp_path)))
    assert entry.reason == ""
    assert len(entry.frames) == 2


def test_the_readme_s_question_is_accepted(tmp_path: Path) -> None:
    from ultra.serve.api import parse_chat
    from ultra.serve.images import open_images
    from ultra.serve.limits import Limits

    frames = {}
    for number in (1, 2):
        image = io.BytesIO()
        Image.new("L", (400, 300), 40 * number).save(image, "PNG")
        frames[f"{number}.png"] = image.getvalue()
        (tmp_path / f"{number}.png").write_bytes(image.getvalue())
    stand_in = tmp_path / "bin" / "curl"
    stand_in.parent.mkdir()
    stand_in.write_text("#!/bin/sh\ncat\n")
    stand_in.chmod(0o755)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = [block for block in shell_blocks(text) if "curl" in block]
    body = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        check=True,
        timeout=60,
    ).stdout
    assert base64.b64encode(frames["1.png"]) in body
    question = parse_chat(body, Limits(), open_images)
    assert question.frames == tuple(frames.values())
    assert [turn.role for turn in question.turns] == ["user"]


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_loads_and_opens_with_its_command(name: str) -> None:
    assert load(name).name == name
    text = (ROOT / "ultra" / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    lines = text.splitlines()
    opening = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    indented = "\n".join(line[5:] for line in opening if line.startswith("#     "))
    commands = commands_of(indented)
    assert commands
    for words in commands:
        check_command(words)
        assert words[0] == "make" or name in words


@pytest.mark.parametrize("job", JOBS)
def test_a_job_s_docstring_holds_its_command(job: str) -> None:
    docstring = ast.get_docstring(ast.parse((ROOT / "ray_jobs" / f"{job}.py").read_text()))
    assert docstring is not None
    lines = [line.strip() for line in docstring.replace("\\\n", " ").splitlines()]
    (command,) = [shlex.split(line) for line in lines if f"python -m ray_jobs.{job}" in line]
    check_command(command)
