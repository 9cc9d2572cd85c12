"""Where the measured numbers of a run go: metrics.jsonl always, TensorBoard and Weights & Biases on request."""

import json
import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from kimi_jax.config.train import Logging, RunConfig, Wandb
from kimi_jax.errors import UserError
from kimi_jax.train.run_dir import RunDir, naming, write_whole

type Record = Mapping[str, float | int | None]
"""One step: `step` and names with units; None for a value that is not finite."""


class Sink(Protocol):
    """Something that takes records."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads metrics.jsonl; a last line that was cut off while it was written is left out.

    Raises:
      UserError: another line is no JSON object with a step.
    """
    if not path.exists():
        return []
    *lines, rest = path.read_text(encoding="utf-8", errors="replace").split("\n")
    if rest:
        lines += [rest] if _parse(rest) else []
    records = [_parse(line) for line in lines]
    for number, record in enumerate(records, start=1):
        if record is None:
            raise UserError(f"{path}: line {number} is no JSON object with a step")
    return records


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


class JsonLines:
    """metrics.jsonl: one object per line, steps ascending, each step once.

    Args:
      path: the file.
      last_step: where the run goes on; lines of later steps, which it will write again, are dropped.
    """

    def __init__(self, path: Path, *, last_step: int):
        kept = [record for record in read_metrics(path) if record["step"] <= last_step]
        write_whole(path, "".join(_to_line(record) for record in kept))
        self._path, self._file = path, path.open("a")

    def write(self, record: Record) -> None:
        with naming(self._path):
            self._file.write(_to_line(record))
            self._file.flush()  # what was written survives a killed process

    def close(self) -> None:
        with naming(self._path):
            self._file.close()


def _to_line(record: Record) -> str:
    return json.dumps({name: _finite(value) for name, value in record.items()}, allow_nan=False) + "\n"


def _finite(value: float | int | None) -> float | int | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class TensorBoard:
    """Event files under <run>/tensorboard."""

    def __init__(self, folder: Path, *, last_step: int):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise UserError(_missing("logging.tensorboard", "tensorboardX")) from error
        self._writer = SummaryWriter(str(folder), purge_step=last_step + 1)

    def write(self, record: Record) -> None:
        for name, value in _scalars(record):
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class WandbRun:
    """A Weights & Biases run named like the run directory, continued when the run is.

    Its id is drawn once and kept in the run directory: directories of one name elsewhere are other runs.
    """

    def __init__(self, cfg: Wandb, run_dir: RunDir, config: RunConfig):
        try:
            import wandb
        except ImportError as error:
            raise UserError(_missing("logging.wandb", "wandb")) from error
        id_file = run_dir.path / "wandb_id.txt"
        if not id_file.exists():
            write_whole(id_file, uuid.uuid4().hex)
        self._run = wandb.init(
            project=cfg.project,
            mode=cfg.mode,
            dir=str(run_dir.path),
            name=run_dir.path.absolute().name,
            id=id_file.read_text(),
            resume="allow",
            config=config.model_dump(mode="json"),
        )
        self._next_step = self._run.step  # of a continued run: after what the last process logged

    def write(self, record: Record) -> None:
        # A killed run takes some steps again, with the same numbers; W&B takes no step twice and warns of each.
        if record["step"] >= self._next_step:
            self._run.log(dict(_scalars(record)), step=record["step"])

    def close(self) -> None:
        self._run.finish()


def _scalars(record: Record) -> Iterable[tuple[str, float]]:
    return ((name, value) for name, value in record.items() if name != "step" and value is not None)


def _missing(key: str, package: str) -> str:
    return f"{key}: the package {package} is not installed; pip install 'kimi_jax[log]' or unset {key}"


def open_sinks(cfg: RunConfig, run_dir: RunDir, *, last_step: int) -> Sequence[Sink]:
    """Opens every sink the config asks for; metrics.jsonl is the first.

    Raises:
      UserError: a sink's package is missing, or metrics.jsonl is damaged.
    """
    logging: Logging = cfg.logging
    sinks: list[Sink] = []
    if logging.tensorboard:
        sinks.append(TensorBoard(run_dir.path / "tensorboard", last_step=last_step))
    if logging.wandb:
        sinks.append(WandbRun(logging.wandb, run_dir, cfg))
    return [JsonLines(run_dir.metrics, last_step=last_step), *sinks]
