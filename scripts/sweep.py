"""Runs a sweep: python scripts/sweep.py SWEEP.yaml [--runs-dir DIR] [--dry-run] [--launcher local|slurm|print]."""

import argparse
import collections
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from kimi_jax.errors import UserError, exit_on_user_error, plain_interrupts, positive
from kimi_jax.experiments import resources

STYLES = {"finished": "green", "finished before": "dim", "failed": "red", "stopped": "yellow"}
WIDTH = 250  # where there is no terminal: no name is broken in two
STYLES |= {"submitted": "green", "submitted again": "yellow", "in the queue": "dim"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Start, or go on with, every training run that a sweep file names.")
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml")
    parser.add_argument("--runs-dir", type=Path, help="default: runs/<folder and name of the sweep file>")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the runs, their size and the time left; then stop"
    )
    parser.add_argument(
        "--launcher",
        choices=("local", "slurm", "print"),
        default="local",
        help="slurm: an array of jobs; print: an sbatch script",
    )
    parser.add_argument(
        "--at-once", type=positive, metavar="N", help="at a time (default: one per GPU, else 1; with slurm no limit)"
    )
    parser.add_argument("--only", metavar="TEXT", help="only runs with TEXT in their names, and their groups")
    resources.add_arguments(parser)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    with plain_interrupts():
        from kimi_jax.experiments import launch, plan_sweep  # after --help: these import jax
        from kimi_jax.experiments.slurm import Slurm
        from kimi_jax.experiments.sweep import group_runs, load_sweep, make_runs_dir
        from kimi_jax.parallel.processes import visible_gpus
        from kimi_jax.train.signals import catch_stop_signals

    runs_dir = arguments.runs_dir or Path("runs") / arguments.sweep.resolve().parent.name / arguments.sweep.stem
    units = group_runs(arguments.sweep, load_sweep(arguments.sweep))
    units = [unit for unit in units if not arguments.only or any(run.is_meant(arguments.only) for run in unit.runs)]
    runs = [run for unit in units for run in unit.runs]
    if not runs:
        raise UserError(f"--only={arguments.only!r}: no run of {arguments.sweep} has it in its name (digits aside)")
    asked = resources.from_arguments(arguments)
    if arguments.launcher == "slurm" and len(units) < len(runs) and (asked.nodes, asked.tasks) != (1, 1):
        each = f"{asked.tasks} processes on each of {asked.nodes} nodes"
        raise UserError(f"--launcher slurm asks for {each}, but runs trained together need one: --gpus-per-node 1")
    if not arguments.dry_run:
        make_runs_dir(runs_dir)
    train = (sys.executable, str(Path(__file__).resolve().with_name("train.py")))
    gpus = visible_gpus()
    at_once = arguments.at_once or len(gpus) or 1
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    if arguments.launcher == "print" and not arguments.dry_run:
        print(plan_sweep.batch_script(units, runs_dir, train, asked, arguments.at_once))
        return 0
    runs_at_once = at_once * len(runs) // len(units)  # a process trains a group
    console.print(plan_sweep.plan_table(plan_sweep.plan(runs, runs_dir), runs_dir, at_once=runs_at_once))
    if arguments.dry_run:
        return 0

    def report(outcome: launch.Outcome) -> None:
        style, seconds = STYLES[outcome.state], f" in {outcome.seconds:.0f} s" if outcome.seconds else ""
        last = f" (the last job: {outcome.cause})" if outcome.state == "submitted again" and outcome.cause else ""
        text = escape(f"{seconds}: {outcome.run.name}{last}")
        console.print(f"[{style}]{outcome.state}[/{style}]{text}", soft_wrap=True)

    if arguments.launcher == "slurm":
        limit = arguments.at_once or len(units)
        launcher = Slurm(runs_dir, train, asked, limit)
    else:
        launcher = launch.Local(runs_dir, train, at_once, gpus)
    with catch_stop_signals() as stop:
        outcomes = launcher.launch(units, stop, report)
    what = f"{len(units)} runs" if len(units) == len(runs) else f"{len(runs)} runs in {len(units)} groups"
    return summarize(outcomes, what, console, stop.exit_code)


def summarize(outcomes: list, what: str, console: Console, stop_code: int) -> int:
    """Prints how many ended how, and why the failed ones failed; returns the exit code."""
    counts = collections.Counter(outcome.state for outcome in outcomes)
    console.print(f"{what}: " + ", ".join(f"{n} {state}" for state, n in counts.items()))
    for outcome in outcomes:
        if outcome.state == "failed":
            console.print(f"[red]failed[/red] {escape(outcome.run.name)}: {escape(outcome.cause)}", soft_wrap=True)
    return stop_code or (1 if counts["failed"] else 0)


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main())
