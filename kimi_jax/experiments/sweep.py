"""Turns a sweep file into training runs: their configs, names and directories, and how far each has come."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_jax.config.load import dump, validate
from kimi_jax.config.sweep import SEED_KEYS, GroupConfig, Point, SweepConfig, Until
from kimi_jax.config.train import RunConfig
from kimi_jax.config.yaml_files import read_config_file, read_mapping, with_value
from kimi_jax.errors import UserError
from kimi_jax.train.run_dir import RunDir, fixed_values, write_whole

LOGS = "sweep"  # folder beside the runs: each one's config and output
HASH_DIGITS = 8
MAX_NAME = 120  # characters; file systems end at 255, and checkpoint tools append to it


@dataclass(frozen=True)
class Run:
    """One training run of a sweep."""

    name: str
    """Arm, swept values, seed; the digits at its end say which config it is."""
    config: RunConfig
    arm: str | None
    swept: Mapping[str, Any]
    group: str | None = None
    """Name of the runs that it is trained together with."""

    @property
    def runs(self) -> tuple["Run"]:
        return (self,)

    def is_meant(self, text: str) -> bool:
        """Whether `text` is its name, or is in what stands there before the digits."""
        return text == self.name or text in self.name.rpartition("-")[0]

    def directory(self, runs_dir: Path) -> RunDir:
        return RunDir(runs_dir / self.name)

    def directories(self, runs_dir: Path) -> list[RunDir]:
        """Where its process writes."""
        return [self.directory(runs_dir)]

    def is_finished(self, runs_dir: Path) -> bool:
        """Whether the checkpoint of its last step, which is written last, or of a later one is there, or the run was
        ended early for good."""
        directory = self.directory(runs_dir)
        return directory.ended.exists() or any(step >= self.config.train.steps for step in directory.saved_steps)

    def prepare(self, runs_dir: Path, train: Sequence[str]) -> list[str]:
        """Writes its config; returns the command that trains it, `train` being that of scripts/train.py."""
        config = runs_dir / LOGS / f"{self.name}.yaml"
        write_whole(config, dump(self.config))
        return [*train, str(config), "--run-dir", str(self.directory(runs_dir).path)]


@dataclass(frozen=True)
class Group:
    """Runs of a sweep that one process trains together."""

    name: str
    runs: tuple[Run, ...]
    until: Until | None

    def directories(self, runs_dir: Path) -> list[RunDir]:
        return [run.directory(runs_dir) for run in self.runs]

    def unfinished(self, runs_dir: Path) -> list[Run]:
        return [run for run in self.runs if not run.is_finished(runs_dir)]

    def is_finished(self, runs_dir: Path) -> bool:
        return not self.unfinished(runs_dir)

    def prepare(self, runs_dir: Path, train: Sequence[str]) -> list[str]:
        """Writes the configs of its runs; returns the command that trains it, scripts/train_together.py."""
        *python, script = train
        config = runs_dir / LOGS / f"{self.name}.yaml"
        write_whole(config, dump(GroupConfig(until=self.until, runs={run.name: run.config for run in self.runs})))
        together = str(Path(script).with_name("train_together.py"))
        return [*python, together, str(config), "--runs-dir", str(runs_dir)]


def read_group(path: Path) -> Group:
    """Reads what `Group.prepare` wrote.

    Raises:
      UserError: it is something else, or a config in it is wrong.
    """
    written = validate(read_mapping(path), GroupConfig, source=str(path))
    runs = tuple(Run(name, config, arm=None, swept={}) for name, config in written.runs.items())
    return Group(path.stem, runs, written.until)


def load_sweep(path: Path) -> list[Run]:
    """Reads a sweep file and the training config under it; the order of the runs is that of the file.

    Raises:
      UserError: the file, the base or a run is wrong: one line per mistake, with the run it comes from; or two runs
        have the same config or the same name.
    """
    sweep = validate(read_mapping(path), SweepConfig, source=str(path))
    points, short = list(sweep.points()), _short_keys(sweep)
    names = [_name(point, short) for point in points]
    configs = _build_configs(read_config_file(path.parent / sweep.base), list(zip(names, points, strict=True)), path)
    runs = [
        Run(f"{name}-{digest(config)}", config, point.arm, point.swept, _group_name(sweep, point, short))
        for name, config, point in zip(names, configs, points, strict=True)
    ]
    _check_distinct(runs, path)
    return runs


def group_runs(path: Path, runs: Sequence[Run]) -> list[Run | Group]:
    """Puts those of the runs of a sweep file together that share a process, each group in the place of its first."""
    together = validate(read_mapping(path), SweepConfig, source=str(path)).together
    if together is None:
        return list(runs)
    members: dict[str, list[Run]] = {}
    for run in runs:
        members.setdefault(run.group, []).append(run)
    return [Group(name, tuple(found), together.until) for name, found in members.items()]


def make_runs_dir(runs_dir: Path) -> None:
    """Makes the folder of a sweep's runs.

    Raises:
      UserError: it cannot be made, or nothing can be written there.
    """
    folder = runs_dir / LOGS
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--runs-dir {runs_dir}: cannot be written: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--runs-dir {runs_dir}: cannot be written: {os.strerror(errno.EACCES)}")


def digest(config: RunConfig) -> str:
    """Hexadecimal digits that name what a run computes: equal for configs between which a run may go on."""
    text = json.dumps(fixed_values(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_DIGITS]


def _build_configs(base: Mapping[str, Any], points: Sequence[tuple[str, Point]], path: Path) -> list[RunConfig]:
    """Validates every run; a mistake that several of them share is reported once, with the first."""
    configs, problems = [], {}
    for name, point in points:
        data = base
        for key, value in point.values.items():
            data = with_value(data, key.split("."), value)
        try:
            configs.append(validate(data, RunConfig, source=str(path)))
        except UserError as error:
            for problem in error.problems:
                problems.setdefault(problem, name)
    if problems:
        raise UserError([f"{problem} (run {name})" for problem, name in problems.items()])
    return configs


def _check_distinct(runs: Sequence[Run], path: Path) -> None:
    by_config: dict[str, Run] = {}
    by_name: dict[str, Run] = {}
    problems = []
    for run in runs:
        other = by_config.setdefault(json.dumps(run.config.model_dump(mode="json"), sort_keys=True), run)
        if other is not run:
            problems.append(f"{path}: runs {other.name} and {run.name} have the same config")
        elif by_name.setdefault(run.name, run) is not run:  # they differ in what the digits leave out
            problems.append(f"{path}: two runs would have the name {run.name}; give their arms names that differ")
    if problems:
        raise UserError(problems)


# ------------------------------------------------------------------ names
def _short_keys(sweep: SweepConfig) -> dict[str, str]:
    """For each swept key the fewest of its last parts that no other swept key ends with, else all of it."""
    keys = [*sweep.grid, *sweep.zip]

    def short(key: str) -> str:
        parts = key.split(".")
        endings = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        return next((end for end in endings if sum(f".{k}".endswith(f".{end}") for k in keys) == 1), key)

    return {key: short(key) for key in keys}


def _name(point: Point, short: Mapping[str, str]) -> str:
    parts = [point.arm] if point.arm else []
    parts += [f"{short[key]}={_brief(value)}" for key, value in point.swept.items() if key in short]
    parts += [f"seed={point.swept[SEED_KEYS[0]]}"] if SEED_KEYS[0] in point.swept.keys() - short.keys() else []
    return re.sub(r"[^A-Za-z0-9._=+-]+", "_", "-".join(parts) or "run")[:MAX_NAME]


def _group_name(sweep: SweepConfig, point: Point, short: Mapping[str, str]) -> str | None:
    """The name of a run without what the runs of its group differ in."""
    if sweep.together is None:
        return None
    over = {*sweep.together.over, *(SEED_KEYS if "seeds" in sweep.together.over else ())}
    rest = {key: value for key, value in point.swept.items() if key not in over}
    return _name(Point(point.arm, rest, {}), short)


def _brief(value: Any) -> str:
    """A value as part of a name: a variant by its kind and what else is set, a number in few characters."""
    match value:
        case Mapping():
            rest = [f"{key}{_brief(child)}" for key, child in value.items() if key != "kind"]
            return "_".join([str(value["kind"])] * ("kind" in value) + rest)
        case list() | tuple():
            return "_".join(map(_brief, value))
        case float():
            return f"{value:g}"
        case _:
            return str(value)
