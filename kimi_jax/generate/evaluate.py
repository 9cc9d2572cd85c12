"""What an evaluation is: tasks of lm-evaluation-harness on a checkpoint, with its results as a file and as rows."""

import dataclasses
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kimi_jax.config.model import ModelConfig
from kimi_jax.data.tokenizers import Tokenizer
from kimi_jax.errors import UserError
from kimi_jax.generate.score import BATCH_SIZE
from kimi_jax.interop.saved_model import find_model
from kimi_jax.train.run_dir import write_whole

if TYPE_CHECKING:  # the extra `eval`
    from kimi_jax.generate.lm_eval_adapter import Requests, Tasks

RESULTS = "results.json"


class Figure(NamedTuple):
    """One number of an evaluation."""

    task: str
    metric: str
    """With the harness's filter behind a comma, if there is one."""
    value: float
    stderr: float | None


class Evaluation(NamedTuple):
    """What came out."""

    figures: tuple[Figure, ...]
    num_requested: int
    """Tokens of all log-likelihood requests, as if each were run alone."""
    num_run: int
    """Tokens that did run: shared beginnings once."""


def evaluate(
    checkpoint: str | Path,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include: Path | None = None,
    output: Path | None = None,
    step: int | None = None,
    dtype: str | None = None,
    batch_size: int = BATCH_SIZE,
) -> Evaluation:
    """Runs tasks on a checkpoint.

    Args:
      checkpoint: a run directory or a public checkpoint, with a tokenizer.
      tasks: names that lm-evaluation-harness knows, or that `include` defines.
      limit: documents per task; None: all.
      num_fewshot: examples before each question; None: as the task says.
      include: a directory with task files of one's own.
      output: a directory, made if needed, for results.json; None: not written.
      step: of a run's checkpoint; None: the newest.
      dtype: compute dtype instead of the model's.
      batch_size: rows that run together at most.

    Raises:
      UserError: no harness, an unknown task, one whose documents cannot be had, a checkpoint that is missing,
        damaged or without a tokenizer, or an output that cannot be written.
    """
    check_harness()
    if num_fewshot is not None and num_fewshot < 0:
        raise UserError(f"num_fewshot={num_fewshot}: must be at least 0")
    if output is not None:
        _make_folder(output)  # first: hours later would be late for what the disk refuses
    load = find_model(checkpoint, step=step, dtype="stored")
    known, names = find_tasks(tasks, include)  # the harness reads all of its task files, for seconds
    model = load()
    if dtype is not None:
        model = dataclasses.replace(model, cfg=model.cfg.model_copy(update={"dtype": dtype}))
    if model.tokenizer is None:
        raise UserError(f"checkpoint {checkpoint}: has no tokenizer, and tasks are text")
    settings = {"limit": limit, "num_fewshot": num_fewshot}
    rehearse(known, names, model.cfg, model.tokenizer, **settings)
    from kimi_jax.generate.lm_eval_adapter import HarnessModel

    answering = HarnessModel(model, batch_size=batch_size)
    results = run_tasks(answering, known, names, **settings)
    evaluation = Evaluation(tuple(read_figures(results)), answering.num_requested, answering.num_run)
    if output is not None:
        kept = {key: results[key] for key in ("results", "groups", "versions", "n-shot", "n-samples") if key in results}
        tokens = {"requested": evaluation.num_requested, "run": evaluation.num_run}
        whole = {"checkpoint": str(checkpoint), "tokens": tokens, **kept}
        write_whole(output / RESULTS, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
    return evaluation


def check_harness() -> None:
    """Raises `UserError` where lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm_eval is not installed; pip install 'kimi_jax[eval]'")


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output {output}: cannot be made a directory: {error.strerror}") from None
    if not os.access(output, os.W_OK):
        raise UserError(f"output {output}: may not be written")


def find_tasks(tasks: Sequence[str], include: Path | None) -> tuple["Tasks", list[str]]:
    """Returns the harness's index of tasks, and the names in it that are meant, `*` standing for any letters.

    Raises:
      UserError: a task that it does not have, or `include` is no directory.
    """
    from kimi_jax.generate.lm_eval_adapter import Tasks

    if include is not None and not include.is_dir():
        raise UserError(f"include {include}: is no directory")
    known = Tasks(include)
    unknown = [task for task in tasks if not known.match_tasks([task])]
    if unknown:
        raise UserError([f"task {task!r}: lm_eval has none of this name; see `lm_eval ls tasks`" for task in unknown])
    return known, known.match_tasks(list(tasks))


def rehearse(known: "Tasks", names: list[str], cfg: ModelConfig, tokenizer: Tokenizer, **settings: Any) -> None:
    """Reads the documents, makes all requests and runs none; arguments as in `run_tasks`.

    Raises:
      UserError: the documents of a task cannot be had, or it asks for what cannot be done here.
    """
    from kimi_jax.generate.lm_eval_adapter import Rehearsal

    try:
        run_tasks(Rehearsal(cfg, tokenizer), known, names, bootstrap_iters=0, **settings)
    except UserError:
        raise
    except Exception as error:  # no file, no network, a package that a task needs, its code: errors of many types
        raise UserError(f"tasks {', '.join(names)}: {type(error).__name__}: {' '.join(str(error).split())}") from error


def run_tasks(answering: "Requests", known: "Tasks", names: list[str], **settings: Any) -> dict[str, Any]:
    """Lets the harness ask, and returns its results; `known` and `names` as `find_tasks` returns them."""
    import lm_eval

    return lm_eval.simple_evaluate(answering, tasks=names, task_manager=known, log_samples=False, **settings)


def read_figures(results: dict[str, Any]) -> Iterator[Figure]:
    """Yields the numbers of the harness's table: "acc,none" beside "acc_stderr,none"."""
    for task, entries in results["results"].items():
        for key, value in entries.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = entries.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else f"{metric},{kind}"
            yield Figure(task, name, float(value), stderr if isinstance(stderr, float) else None)
