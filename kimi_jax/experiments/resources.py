"""What a job on a cluster asks for, and the command-line arguments that say it."""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from kimi_jax.errors import positive


@dataclass(frozen=True)
class Resources:
    """What a job asks for."""

    minutes: int
    nodes: int = 1
    gpus_per_node: int = 0
    tasks_per_node: int | None = None
    """Processes on each node; None: one per GPU, at least one."""
    save_s: int = 180
    """Seconds before the time limit at which a job is told to save."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Further options of sbatch by name: partition, account, qos, ..."""

    @property
    def tasks(self) -> int:
        return self.tasks_per_node or max(self.gpus_per_node, 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `from_arguments` reads."""
    group = parser.add_argument_group("Slurm", "what each job asks for")
    group.add_argument("--nodes", type=positive, default=1, metavar="N", help="default: %(default)s")
    group.add_argument("--gpus-per-node", type=_whole, default=8, metavar="N", help="default: %(default)s")
    group.add_argument("--tasks-per-node", type=positive, metavar="N", help="processes (default: one per GPU)")
    group.add_argument("--time", type=_minutes, default="1-00:00:00", help="[D-]HH:MM:SS or minutes (default: a day)")
    group.add_argument("--save-seconds", type=positive, default=180, metavar="S", help="before the end (default: 180)")
    group.add_argument(
        "--slurm", type=_option, action="append", default=[], metavar="NAME=VALUE", help="another option of sbatch"
    )


def from_arguments(arguments: argparse.Namespace) -> Resources:
    """What the parsed arguments ask for."""
    return Resources(
        minutes=arguments.time,
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
        tasks_per_node=arguments.tasks_per_node,
        save_s=arguments.save_seconds,
        options=dict(arguments.slurm),
    )


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}, must be a whole number from 0 on")
    return int(text)


def _minutes(text: str) -> int:
    if text.isdecimal() and int(text):
        return int(text)
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"got {text!r}, must be minutes, HH:MM:SS or D-HH:MM:SS")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return max(days * 1440 + hours * 60 + minutes + -(-seconds // 60), 1)


def _option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"got {text!r}, must be NAME=VALUE, for instance partition=gpu")
    return name.lstrip("-"), value
