"""The command line every job shares."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ultra.config import ConfigError, InputError, PipelineConfig, load, preset_names


def run_job(
    job: Callable[[PipelineConfig], None],
    description: str | None,
    argv: Sequence[str] | None = None,
    flags: Mapping[str, str] | None = None,
) -> None:
    """Run a job with the configuration the command line names.

    What the user can put right ends the process with one line and status 2.

    Args:
        job: what to run.
        description: of the job, for `--help`.
        argv: the command line; None means the process's own.
        flags: further options of the job, each short for one `--set`.
    """
    config = config_from_args(description, argv, flags)
    explain_errors(lambda: job(config))


def explain_errors(run: Callable[[], None]) -> None:
    """Run something; what the user can put right ends the process with one line and status 2."""
    try:
        run()
    except InputError as error:
        sys.stderr.write(f"{' '.join(str(error).split())}\n")
        sys.exit(2)


def config_from_args(
    description: str | None,
    argv: Sequence[str] | None = None,
    flags: Mapping[str, str] | None = None,
) -> PipelineConfig:
    """Return the configuration the command line names; exit after `--print` or a wrong value."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser, flags)
    return read_config(parser, parser.parse_args(argv))


def add_config_arguments(
    parser: argparse.ArgumentParser, flags: Mapping[str, str] | None = None
) -> None:
    """Add what names a configuration; `flags` are as those of `run_job`."""
    parser.add_argument(
        "--config",
        default="tiny",
        metavar="NAME|PATH",
        help=f"a preset ({', '.join(preset_names())}) or a YAML file; default %(default)s",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=c",
        dest="overrides",
        help="replace one value; may be given again",
    )
    for flag, override in (flags or {}).items():
        parser.add_argument(
            flag,
            action="append_const",
            const=override,
            dest="overrides",
            help=f"short for --set {override}",
        )
    parser.add_argument("--print", action="store_true", help="print the whole tree and stop")


def read_config(parser: argparse.ArgumentParser, args: argparse.Namespace) -> PipelineConfig:
    """Return the configuration that parsed arguments name; exit after `--print` or a wrong value.

    Args:
        parser: what parsed them, with `add_config_arguments`.
        args: the arguments.
    """
    try:
        config = load(args.config, args.overrides)
        refuse_lost_output(config.root)
    except ConfigError as error:
        parser.exit(2, f"{error}\n")
    if args.print:
        sys.stdout.write(config.to_yaml())
        parser.exit()
    return config


def refuse_lost_output(root: str) -> None:
    """Raise where what is written under a root would be deleted with the job.

    Raises:
        ConfigError: for a relative root in a job's copy of its working directory.
    """
    # `ray job submit --working-dir` runs in a copy of the folder that Ray deletes afterwards.
    in_copy = "runtime_resources" in Path.cwd().parts
    if in_copy and "://" not in root and not os.path.isabs(root):
        raise ConfigError(
            f"root: {root!r} is relative, and this job's working directory is a copy that "
            "Ray deletes; give an absolute path or an s3:// address"
        )
