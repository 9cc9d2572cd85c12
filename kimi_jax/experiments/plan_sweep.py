"""What a sweep will cost before it runs: parameters, FLOPs, and time at the speed of its finished runs."""

import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from kimi_jax.experiments.launch import Unit
from kimi_jax.experiments.resources import Resources
from kimi_jax.experiments.sweep import Run
from kimi_jax.models.counts import count_flops, count_parameters
from kimi_jax.train.metrics import read_metrics


@dataclass(frozen=True)
class Plan:
    """One run of a sweep before it starts."""

    run: Run
    parameters: int
    step: int
    """Steps whose metrics are there."""
    flops_per_token: float
    flops_per_s: float | None
    """Model FLOP/s that the run's own steps reached; None: none is logged."""

    @property
    def flops(self) -> float:
        return self.flops_per_token * _tokens(self.run, self.run.config.train.steps)

    @property
    def flops_left(self) -> float:
        return self.flops_per_token * _tokens(self.run, self.run.config.train.steps - self.step)


def plan(runs: Sequence[Run], runs_dir: Path) -> list[Plan]:
    """Counts every run; nothing is written."""
    return [_plan(run, runs_dir) for run in runs]


def _plan(run: Run, runs_dir: Path) -> Plan:
    per_token = count_flops(run.config.model, run.config.data.seq_len).total
    records = read_metrics(run.directory(runs_dir).metrics)
    rates = [record["tokens_per_s"] for record in records if record.get("tokens_per_s")]
    return Plan(
        run=run,
        parameters=count_parameters(run.config.model).total,
        step=max((record["step"] for record in records), default=0),
        flops_per_token=per_token,
        flops_per_s=per_token * statistics.median(rates) if rates else None,
    )


def _tokens(run: Run, steps: int) -> int:
    return steps * run.config.train.batch_size * run.config.data.seq_len


def plan_table(plans: Sequence[Plan], runs_dir: Path, *, at_once: int) -> Table:
    """The runs as a table; times use the median speed of the runs that have logged one, and stay open without any."""
    speeds = [p.flops_per_s for p in plans if p.flops_per_s]
    speed = statistics.median(speeds) if speeds else None
    table = Table(title=escape(f"{len(plans)} runs in {runs_dir}"), title_justify="left")
    for heading in ("run", "parameters", "tokens", "PFLOP", "state", "time left"):
        table.add_column(heading, justify="left" if heading in ("run", "state") else "right", overflow="fold")
    for p in plans:
        steps = p.run.config.train.steps
        state = "finished" if p.run.is_finished(runs_dir) else f"step {p.step} of {steps}" if p.step else "new"
        left = 0.0 if state == "finished" else p.flops_left
        cells = (f"{p.parameters:,}", f"{_tokens(p.run, steps):,}", f"{p.flops / 1e15:,.3g}")
        table.add_row(p.run.name, *cells, state, _duration(left / speed) if speed else "?")
    total = sum(p.flops_left for p in plans if not p.run.is_finished(runs_dir))
    time_left = _duration(total / speed / at_once) if speed else "? (no run has logged its speed yet)"
    table.caption = f"{total / 1e15:,.3g} PFLOP left; {at_once} at a time: {time_left}"
    return table


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes:.0f} min" if minutes < 100 else f"{hours:.1f} h"


def batch_script(
    runs: Sequence[Unit], runs_dir: Path, train: Sequence[str], resources: Resources, at_once: int | None = None
) -> str:
    """Writes the configs of unfinished runs; returns an sbatch script with one array task for each, or each group.

    A task is one process with one GPU; one that is started again goes on from its checkpoint. `B:` has the signal sent
    to the batch process itself, which `exec` makes the training; without it Slurm signals the steps that srun starts,
    and there are none.

    Args:
      runs: the members of the sweep, alone or in groups.
      runs_dir: where they are, on a disk that the nodes share.
      train: command that trains, before the arguments of scripts/train.py.
      resources: of each task: time, seconds to save in, further options.
      at_once: tasks that may run at the same time; None: no limit.
    """
    commands = [shlex.join(run.prepare(runs_dir, train)) for run in runs if not run.is_finished(runs_dir)]
    limit = f"%{at_once}" if at_once else ""
    lines = [
        "#!/bin/bash",
        f"#SBATCH --array=0-{len(commands) - 1}{limit}",
        f"#SBATCH --time={resources.minutes} --gpus=1 --requeue --open-mode=append",
        f"#SBATCH --signal=B:TERM@{resources.save_s}",
        *(f"#SBATCH --{name}={value}" for name, value in resources.options.items()),
        "commands=(",
        *(f"  {shlex.quote(command)}" for command in commands),
        ")",
        'eval "exec ${commands[$SLURM_ARRAY_TASK_ID]}"',
    ]
    return "\n".join(lines) if commands else "# every run is finished"
