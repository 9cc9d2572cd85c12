"""What a folder of runs has brought: one result per run, and runs of one kind together."""

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_jax.config.evaluation import LmEval, LossEvaluation
from kimi_jax.config.sweep import SEED_KEYS
from kimi_jax.config.train import RunConfig
from kimi_jax.errors import UserError
from kimi_jax.experiments.sweep import HASH_DIGITS
from kimi_jax.models.counts import count_flops, count_parameters
from kimi_jax.train.metrics import read_metrics
from kimi_jax.train.run_dir import RunDir, config_values

PF_DAY = 1e15 * 86400  # FLOPs of a petaflop/s-day
VALIDATION = ("validation_loss_nats", "validation_bits_per_byte", "validation_accuracy")
POSITION = "_loss_nats_from_"  # between an evaluation's name and where a bin of positions begins
LENGTH_KEY = "data.seq_len"
MEASURED = "train.evaluations"  # what keys begin with that make no other model

SMALL_IS_GOOD = ("loss_nats", "bits_per_byte", "perplexity", "brier_score")  # all else is the larger the better

SWEPT_OVER = (LENGTH_KEY, "train.batch_size", "optim.peak_lr")  # what a family of runs is looked at across


def grows(metric: str) -> bool:
    """Whether a better model has more of it."""
    name = metric.partition(",")[0]  # behind a comma stands a filter of lm-evaluation-harness
    return not name.endswith(SMALL_IS_GOOD)


@dataclass(frozen=True)
class Result:
    """One run."""

    name: str
    config: RunConfig
    records: Sequence[Mapping[str, Any]]
    parameters: int
    active_parameters: int
    flops_per_token: float
    ended_early: bool = False
    """A run of its group had learnt the task before the last step."""

    @property
    def step(self) -> int:
        return self.records[-1]["step"] if self.records else 0

    @property
    def is_finished(self) -> bool:
        return self.ended_early or self.step >= self.config.train.steps

    @property
    def tokens(self) -> int:
        return self.step * self.config.train.batch_size * self.config.data.seq_len

    @property
    def flops(self) -> float:
        """Model FLOPs spent so far."""
        return self.flops_per_token * self.tokens

    @property
    def tokens_per_s(self) -> float | None:
        rates = [record["tokens_per_s"] for record in self.records if record.get("tokens_per_s")]
        return statistics.median(rates) if rates else None

    def series(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) wherever the metric was measured and is finite."""
        return [(record["step"], record[metric]) for record in self.records if record.get(metric) is not None]

    @property
    def evaluations(self) -> list[str]:
        """Metrics of `train.evaluations`, without those by position, as far as they were measured."""
        cfg = self.config.train
        names = [f"{name}_{what}" for name in cfg.evaluations_of(LossEvaluation) for what in ("loss_nats", "accuracy")]
        benchmarks = tuple(f"{name}_" for name in cfg.evaluations_of(LmEval))
        names += dict.fromkeys(key for record in self.records for key in record if key.startswith(benchmarks))
        return [name for name in names if self.series(name)]

    def by_position(self, evaluation: str) -> dict[int, float]:
        """The last loss of an evaluation by the first position of each bin; empty if it was not measured so."""
        start = f"{evaluation}{POSITION}"
        names = {key for record in self.records for key in record if key.startswith(start)}
        return {position: self.last(f"{start}{position}") for position in sorted(int(n[len(start) :]) for n in names)}

    def last(self, metric: str) -> float | None:
        values = self.series(metric)
        return values[-1][1] if values else None

    def best(self, metric: str) -> float | None:
        """The largest of what should be large, or the smallest of what should be small."""
        values = [value for _, value in self.series(metric)]
        choose = max if grows(metric) else min
        return choose(values) if values else None


@dataclass(frozen=True)
class Group:
    """Runs of one kind."""

    label: str
    runs: tuple[Result, ...]

    def values(self, metric: str, *, best: bool = False) -> list[float]:
        """The metric at the end, or at its best, of each run that has it."""
        found = (run.best(metric) if best else run.last(metric) for run in self.runs)
        return [value for value in found if value is not None]


def read_results(*runs_dirs: Path) -> list[Result]:
    """Reads every run directory under each folder, itself included, by name; those without a step are left out.

    Raises:
      UserError: a folder holds no run with metrics, or a file of one is damaged.
    """
    return [result for runs_dir in runs_dirs for result in _read_folder(runs_dir)]


def _read_folder(runs_dir: Path) -> list[Result]:
    if not runs_dir.is_dir():
        raise UserError(f"{runs_dir}: no such folder of runs")
    folders = sorted(
        {path.parent for path in runs_dir.rglob("metrics.jsonl") if (path.parent / "config.yaml").exists()}
    )
    results = [result for folder in folders if (result := _read(folder, runs_dir)).records]
    if not results:
        raise UserError(f"{runs_dir}: holds no run directory with metrics; scripts/train.py and sweep.py write them")
    return results


def _read(folder: Path, runs_dir: Path) -> Result:
    run_dir = RunDir(folder)
    config = run_dir.load_config()
    counts = count_parameters(config.model)
    return Result(
        name=folder.name if folder == runs_dir else str(folder.relative_to(runs_dir)),
        config=config,
        records=read_metrics(run_dir.metrics),
        parameters=counts.total,
        active_parameters=counts.active_without_embeddings,
        flops_per_token=count_flops(config.model, config.data.seq_len).total,
        ended_early=run_dir.ended.exists(),
    )


def group_runs(results: Sequence[Result], ignoring: Sequence[str] = ()) -> list[Group]:
    """Puts runs together whose configs differ in seeds, in what is measured beside and in the `ignoring` keys alone.

    A group is called what its runs' names have left when seeds, ignored values and the digits of the config are gone,
    or like its first run if another group would be called the same.
    """
    groups: dict[str, list[Result]] = {}
    for run in results:
        values = config_values(run.config)
        left_out = (*SEED_KEYS, *ignoring)
        kept = {key: value for key, value in values.items() if key not in left_out and not key.startswith(MEASURED)}
        groups.setdefault(json.dumps(kept, sort_keys=True), []).append(run)
    labels = [_label(runs[0].name, ignoring) for runs in groups.values()]
    return [
        Group(label if labels.count(label) == 1 else runs[0].name, tuple(runs))
        for label, runs in zip(labels, groups.values(), strict=True)
    ]


def _label(name: str, ignoring: Sequence[str]) -> str:
    keys = "|".join(["seed", *(key.rpartition(".")[2] for key in ignoring)])
    name = re.sub(rf"-[0-9a-f]{{{HASH_DIGITS}}}$", "", name)
    return re.sub(rf"(^|-)[\w.]*\b(?:{keys})=-?[\d.]+(?:e[+-]?\d+)?", "", name).lstrip("-") or "runs"
