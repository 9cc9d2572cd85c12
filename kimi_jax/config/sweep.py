"""A sweep as data: which training runs a YAML file stands for."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from kimi_jax.config.base import Config, nearest
from kimi_jax.config.train import RunConfig

ARM = "runs"  # the name under which `exclude` speaks of a run's arm
SEED_KEYS = ("train.seed", "data.shuffle_seed")  # what a seed of a sweep sets

Column = Annotated[tuple[Any, ...], Field(min_length=1)]

type Values = Mapping[str, Any]
"""Dotted config keys and what they are set to."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep before its config is built."""

    arm: str | None
    swept: Values
    """The values that `grid`, `zip` and `seeds` give it."""
    values: Values
    """All values to lay on the base: those of the arm, then the swept ones."""


class Until(Config):
    """When a group of runs trained together may end early: one of its runs has learnt the task."""

    accuracy: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Validation accuracy that counts as learnt."""
    validations: Annotated[int, Field(gt=0)] = 3
    """In so many validations in a row."""


class Together(Config):
    """Runs that one process trains as one program: small models, which leave most of a GPU idle."""

    over: Annotated[tuple[Literal["optim.peak_lr", "seeds"], ...], Field(min_length=1)]
    """What the runs of a group differ in."""
    until: Until | None = None
    """Ends a group early; unset: never."""


class GroupConfig(Config):
    """Runs that are trained together, whole: what their process reads, whatever becomes of the sweep file."""

    until: Until | None = None
    runs: dict[str, RunConfig]
    """By name."""


class SweepConfig(Config):
    """`runs` x `grid` x `zip` x `seeds`, in this order, without what `exclude` names."""

    base: str
    """A complete training config, relative to this file."""
    runs: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Named arms; each maps dotted config keys to the values that replace what stands there."""
    grid: dict[str, Column] = Field(default_factory=dict)
    """Dotted config keys to lists of values: every combination."""
    zip: dict[str, Column] = Field(default_factory=dict)
    """Dotted config keys to lists of values that advance together."""
    exclude: tuple[dict[str, Any], ...] = ()
    """Combinations left out: each maps swept keys to a value, `runs` to the name of an arm; all must match."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = ()
    """Each sets train.seed and data.shuffle_seed."""
    together: Together | None = None
    """Which runs share a process; unset: none."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if len({len(column) for column in self.zip.values()}) > 1:
            lengths = ", ".join(f"{key} has {len(column)}" for key, column in self.zip.items())
            yield "zip", f"lists must have one length, but {lengths}"
        for key in self.zip.keys() & self.grid.keys():
            yield "zip", f"{key} stands in grid, too"
        for name, values in self.runs.items():
            for key in values.keys() & {*self.grid, *self.zip}:
                yield f"runs.{name}", f"{key} is swept by grid or zip, which would replace it"
        if self.seeds:
            for key in {*self.grid, *self.zip, *itertools.chain(*self.runs.values())} & {*SEED_KEYS}:
                yield "seeds", f"sets {key}, which another part of the sweep sets, too"
        if len(set(self.seeds)) < len(self.seeds):
            yield "seeds", f"{list(self.seeds)} names a seed twice"
        for name in self.together.over if self.together else ():
            if name not in {*self.grid, *self.zip, *(("seeds",) if self.seeds else ())}:
                yield "together.over", f"{name!r} is not swept"
        yield from self._exclude_problems()

    def _exclude_problems(self) -> Iterator[tuple[str, str]]:
        swept = (*((ARM,) if self.runs else ()), *self.grid, *self.zip, *(SEED_KEYS if self.seeds else ()))
        points = list(self._all_points())
        for i, rule in enumerate(self.exclude):
            unknown = [key for key in rule if key not in swept]
            for key in unknown:
                yield f"exclude.{i}", f"{key!r} is not swept; {nearest(key, swept)}"
            if not unknown and not any(_matches(rule, point) for point in points):
                yield f"exclude.{i}", f"{rule} matches no run of the sweep"
        if self.exclude and not any(True for _ in self.points()):
            yield "exclude", "leaves no run"

    @property
    def size(self) -> int:
        """Runs before `exclude`."""
        zipped = len(next(iter(self.zip.values()), (None,)))
        return max(len(self.runs), 1) * math.prod(map(len, self.grid.values())) * zipped * max(len(self.seeds), 1)

    def points(self) -> Iterator[Point]:
        """The runs in their order."""
        for point in self._all_points():
            if not any(_matches(rule, point) for rule in self.exclude):
                yield point

    def _all_points(self) -> Iterator[Point]:
        arms = list(self.runs.items()) or [(None, {})]
        combinations = [dict(zip(self.grid, row, strict=True)) for row in itertools.product(*self.grid.values())]
        rows = [dict(zip(self.zip, row, strict=True)) for row in zip(*self.zip.values(), strict=False)] or [{}]
        seeds = [dict.fromkeys(SEED_KEYS, seed) for seed in self.seeds] or [{}]
        for (arm, values), *parts in itertools.product(arms, combinations, rows, seeds):
            swept = {key: value for part in parts for key, value in part.items()}
            yield Point(arm, swept, {**values, **swept})


def _matches(rule: Values, point: Point) -> bool:
    coordinates = {ARM: point.arm, **point.swept}
    return all(key in coordinates and coordinates[key] == value for key, value in rule.items())
