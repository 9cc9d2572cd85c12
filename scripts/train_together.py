"""Trains a group of a sweep as one program: scripts/train_together.py SWEEP.yaml --runs-dir DIR --group NAME."""

import argparse
import sys
from pathlib import Path

from kimi_jax.config.base import nearest
from kimi_jax.errors import UserError, exit_on_user_error


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the unfinished runs of a group; scripts/sweep.py calls this.")
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml")
    parser.add_argument("--runs-dir", type=Path, required=True)
    parser.add_argument("--group", required=True, help="a run's name without what the runs of its group differ in")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    from kimi_jax.experiments.sweep import Group, group_runs, load_sweep  # after --help: these import jax
    from kimi_jax.train import xla_flags
    from kimi_jax.train.together import train_together

    units = group_runs(arguments.sweep, load_sweep(arguments.sweep))
    groups = {unit.name: unit for unit in units if isinstance(unit, Group)}
    if arguments.group not in groups:
        raise UserError(f"--group {arguments.group!r}: {nearest(arguments.group, groups)}")
    group = groups[arguments.group]
    runs = group.unfinished(arguments.runs_dir)
    if not runs:
        print(f"{group.name}: finished; nothing to do")
        return 0
    xla_flags.apply(runs[0].config.train.flags)  # read when the first array is made
    directories = [run.directory(arguments.runs_dir).path for run in runs]
    return train_together([run.config for run in runs], directories, group.until).exit_code


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main())
