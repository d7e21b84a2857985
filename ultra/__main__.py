"""Commands that need no cluster.

python -m ultra plan --config llava-ultra-13b --workers 4 --gpu-memory 48
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields

from ultra import tracking
from ultra.cli import add_config_arguments, explain_errors, read_config
from ultra.config import ConfigError, PipelineConfig
from ultra.train.plan import Assumptions, make_plan
from ultra.train.plan_text import describe

HELP = {
    "exams": "exams of the training split",
    "frames": "frames of a mean exam",
    "text_tokens": "tokens of a mean conversation",
    "conversations": "conversations of a mean exam, for stages that train on all of them",
    "gpu_memory": "GiB of a GPU",
    "utilisation": "share of a GPU's peak that training reaches",
    "tflops": "peak of a GPU, in 10^12 operations a second",
}
"""Field of `Assumptions` -> what `--help` says."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the command line names."""
    config, args = _parse(argv)
    explain_errors(lambda: plan(config, args))


def plan(config: PipelineConfig, args: argparse.Namespace) -> None:
    """Print what training would take.

    Raises:
        ConfigError: for an assumption that cannot be, or a model of which nothing is known.
    """
    values = {name: getattr(args, name) for name in HELP}
    for name, value in values.items():
        if value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0, got {value}")
    made = make_plan(config, Assumptions(**values))
    history = tracking.find_history(config, "train")
    shown = json.dumps(made.to_json(history), indent=1) if args.json else describe(made, history)
    sys.stdout.write(f"{shown}\n")


def _parse(argv: Sequence[str] | None) -> tuple[PipelineConfig, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="python -m ultra", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("plan", help="what training would take, before it does")
    add_config_arguments(command)
    command.add_argument("--workers", type=int, metavar="N", help="short for train.num_workers")
    for field in fields(Assumptions):
        command.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            metavar="N",
            help=f"{HELP[field.name]}; default %(default)s",
        )
    command.add_argument("--json", action="store_true", help="print it as JSON")
    args = parser.parse_args(argv)
    if args.workers:
        args.overrides.append(f"train.num_workers={args.workers}")
    return read_config(command, args), args


if __name__ == "__main__":
    main()
