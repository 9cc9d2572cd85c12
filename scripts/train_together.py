"""Trains a group of a sweep as one program: scripts/train_together.py GROUP.yaml --runs-dir DIR."""

import argparse
import sys
from pathlib import Path

from kimi_jax.errors import exit_on_user_error


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the unfinished runs of a group; scripts/sweep.py calls this.")
    parser.add_argument("group", type=Path, metavar="GROUP.yaml", help="RUNS_DIR/sweep/GROUP.yaml of scripts/sweep.py")
    parser.add_argument("--runs-dir", type=Path, required=True)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    from kimi_jax.experiments.sweep import read_group  # after --help: this imports jax
    from kimi_jax.train import xla_flags
    from kimi_jax.train.programs import keep_programs
    from kimi_jax.train.together import train_together

    group = read_group(arguments.group)
    runs = group.unfinished(arguments.runs_dir)
    if not runs:
        print(f"{group.name}: finished; nothing to do")
        return 0
    xla_flags.apply(runs[0].config.train.flags)  # read when the first array is made
    keep_programs()
    directories = [run.directory(arguments.runs_dir).path for run in runs]
    return train_together([run.config for run in runs], directories, group.until).exit_code


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main())
