"""Tables and figures of finished runs: python scripts/report.py RUNS_DIR ... [--output DIR]."""

import argparse
from pathlib import Path

from kimi_jax.errors import UserError, exit_on_user_error, plain_interrupts


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write tables, figures and index.html for every run in some folders.")
    parser.add_argument("runs_dirs", type=Path, nargs="+", metavar="RUNS_DIR")
    parser.add_argument("--output", type=Path, help="default: the first RUNS_DIR/report")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    with plain_interrupts():
        from kimi_jax.experiments.report import write_report  # after --help: this imports jax

    output = arguments.output or arguments.runs_dirs[0] / "report"
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: is a file")
    for path in write_report(arguments.runs_dirs, output):
        print(path)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
