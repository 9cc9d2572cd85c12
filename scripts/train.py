"""Trains one model: python scripts/train.py CONFIG.yaml [a.b=c ...]."""

import argparse
import json
import sys
from pathlib import Path

from kimi_jax.config.load import dump, json_schema, load
from kimi_jax.config.train import RunConfig
from kimi_jax.errors import exit_on_user_error, plain_interrupts, positive
from kimi_jax.experiments import resources


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train one model from a config file.")
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="replaces one value of the config")
    parser.add_argument("--run-dir", type=Path, help="default: runs/<name of the config file>")
    parser.add_argument("--resume", choices=("auto", "never", "must"), default="auto", help="default: auto")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    parser.add_argument("--json-schema", action="store_true", help="print the schema of config files and stop")
    several = parser.add_argument_group("several processes", "found by themselves under Slurm and Open MPI")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    several.add_argument("--num-processes", type=positive, metavar="N")
    several.add_argument("--process-id", type=int, metavar="I", help="from 0 to N - 1")
    parser.add_argument("--launch", choices=("slurm",), help="put the run into the queue instead of starting it here")
    resources.add_arguments(parser)
    arguments = parser.parse_intermixed_args()
    if not arguments.config and not arguments.json_schema:
        parser.error("name a config file")
    if arguments.launch and arguments.resume != "auto":
        parser.error("--launch: a job that comes back goes on, so --resume must be auto")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    if arguments.json_schema:
        print(json.dumps(json_schema(RunConfig), indent=2))
        return 0
    cfg = load(arguments.config, arguments.overrides, RunConfig)
    if arguments.print_config:
        print(dump(cfg), end="")
        return 0
    run_dir = arguments.run_dir or Path("runs") / arguments.config.stem
    if arguments.launch:
        return put_into_queue(cfg, run_dir, arguments)
    from kimi_jax.train import xla_flags

    xla_flags.apply(cfg.train.flags)
    with plain_interrupts():
        from kimi_jax.generate.benchmark import Benchmark  # after the config is known to be right: these import jax
        from kimi_jax.parallel import processes
        from kimi_jax.train.loop import train
        from kimi_jax.train.programs import keep_programs

    place = processes.find_place(arguments.coordinator, arguments.num_processes, arguments.process_id)
    with processes.joined(place, heartbeat_s=cfg.train.watchdog.heartbeat_s):
        keep_programs()
        return train(cfg, run_dir, arguments.resume, open_benchmark=Benchmark).exit_code


def put_into_queue(cfg: RunConfig, run_dir: Path, arguments: argparse.Namespace) -> int:
    """Submits the run as it is configured now; the job goes on by itself after its time limit and after preemption."""
    with plain_interrupts():
        from kimi_jax.experiments.slurm import submit
        from kimi_jax.train.run_dir import check_usable, write_whole

    check_usable(run_dir, cfg, arguments.resume)  # not after hours in the queue
    folder = run_dir.absolute() / "slurm"
    write_whole(folder / "config.yaml", dump(cfg))
    command = [sys.executable, str(Path(__file__).resolve()), str(folder / "config.yaml")]
    command += ["--run-dir", str(run_dir.absolute())]
    (job,) = submit([command], folder, resources.from_arguments(arguments), name=run_dir.name)
    print(f"job {job.job_id}: {run_dir}; its output: {folder}/{job.job_id}_0_log.out")
    return 0


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main())
