"""Writes what a folder of runs has brought: tables, figures, and a page that shows them without a server."""

import csv
import html
import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from kimi_jax.experiments.figures import draw_all, fit_families, scaling_points
from kimi_jax.experiments.results import VALIDATION, Result, group_runs, read_results
from kimi_jax.experiments.scaling import PowerLaw, compute_ratio
from kimi_jax.train.run_dir import write_whole

type Table = Sequence[Mapping[str, str]]
"""Rows of column name to text."""

STYLE = """body { font: 15px/1.5 system-ui, sans-serif; color: #1f2430; max-width: 1100px; margin: 2em auto }
table { border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto; font-variant-numeric: tabular-nums }
th, td { padding: 3px 12px 3px 0; text-align: left; border-bottom: 1px solid #e3e6ec; white-space: nowrap }
img { max-width: 100%; margin: 1em 0 }"""


def write_report(runs_dirs: Sequence[Path], output: Path) -> list[Path]:
    """Reads every run under `runs_dirs` and writes tables (Markdown, CSV), figures (PNG) and index.html to `output`.

    Returns:
      The files written, index.html last.

    Raises:
      UserError: there is no run to report on, or a file of one is damaged.
    """
    results = read_results(*runs_dirs)
    tables = {"runs": run_table(results), "groups": group_table(results), "scaling": scaling_table(results)}
    tables = {name: table for name, table in tables.items() if table}
    figures = draw_all(results, output)
    for name, table in tables.items():
        write_whole(output / f"{name}.csv", _to_csv(table))
    write_whole(output / "report.md", _to_markdown(tables, figures, output))
    write_whole(output / "index.html", _to_html(runs_dirs, tables, figures))
    texts = [*(f"{name}.csv" for name in tables), "report.md", "index.html"]
    return [*figures, *(output / text for text in texts)]


def run_table(results: Sequence[Result]) -> Table:
    """One row per run."""
    return _without_empty_columns([_run_row(run, _evaluations(results)) for run in results])


def _evaluations(results: Sequence[Result]) -> list[str]:
    """Metrics of further evaluations that any run has."""
    return list(dict.fromkeys(metric for run in results for metric in run.evaluations))


def _state(run: Result) -> str:
    ended = f"ended early at {run.step}" if run.ended_early else "finished"
    return ended if run.is_finished else f"step {run.step} of {run.config.train.steps}"


def _run_row(run: Result, evaluations: Sequence[str]) -> dict[str, str]:
    return {
        "run": run.name,
        "state": _state(run),
        "parameters": f"{run.parameters:,}",
        "tokens": f"{run.tokens:,}",
        "PFLOP": f"{run.flops / 1e15:.3g}",
        "loss_nats": _number(run.last("loss_nats")),
        **{metric: _number(run.last(metric)) for metric in (*VALIDATION, *evaluations)},
        "best_validation_accuracy": _number(run.best("validation_accuracy")),
        "tokens_per_s": "" if run.tokens_per_s is None else f"{run.tokens_per_s:,.0f}",
    }


def group_table(results: Sequence[Result]) -> Table:
    """One row per group of runs that differ in their seed alone: mean and, of several, the standard deviation."""
    groups = group_runs(results)
    if len(groups) == len(results):
        return []
    metrics = ("loss_nats", *VALIDATION, *_evaluations(results))
    rows = [
        {
            "group": group.label,
            "seeds": str(len(group.runs)),
            **{metric: _mean(group.values(metric)) for metric in metrics},
            "best_validation_accuracy": _mean(group.values("validation_accuracy", best=True)),
        }
        for group in groups
    ]
    return _without_empty_columns(rows)


def scaling_table(results: Sequence[Result]) -> Table:
    """The fitted scaling law of each family of sizes, and the compute of each other one at equal loss, in the middle of
    all compute that was spent; empty without three sizes of any."""
    points, laws = scaling_points(results), fit_families(results)
    middle = np.exp(np.mean(np.log(np.concatenate([compute for compute, _ in points.values()])))) if points else 1.0
    return [_law_row(name, laws, float(middle)) for name in laws]


def _law_row(name: str, laws: Mapping[str, PowerLaw], middle: float) -> dict[str, str]:
    law = laws[name]
    return {
        "family": name,
        "a": f"{law.a:.4f}",
        "a, 95 %": f"{law.a_interval[0]:.4f} to {law.a_interval[1]:.4f}",
        "b": f"{law.b:.4f}",
        "b, 95 %": f"{law.b_interval[0]:.4f} to {law.b_interval[1]:.4f}",
        **{f"{other} needs": _needs(law, laws[other], middle) for other in laws if len(laws) > 1},
    }


def _needs(law: PowerLaw, other: PowerLaw, compute: float) -> str:
    ratio, low, high = compute_ratio(law, other, compute)
    return "1" if law is other else f"{ratio:.2f} ({low:.2f} to {high:.2f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _mean(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}" if values else ""


def _without_empty_columns(rows: Table) -> Table:
    used = [column for column in rows[0] if any(row[column] for row in rows)] if rows else []
    return [{column: row[column] for column in used} for row in rows]


# ------------------------------------------------------------------ files
def _to_csv(table: Table) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: cell.replace(",", "") for name, cell in row.items()} for row in table)
    return text.getvalue()


def _to_markdown(tables: Mapping[str, Table], figures: Sequence[Path], folder: Path) -> str:
    parts = []
    for name, table in tables.items():
        rows = [list(table[0]), ["---"] * len(table[0]), *(list(row.values()) for row in table)]
        parts += [f"## {name.capitalize()}", "\n".join(f"| {' | '.join(row)} |" for row in rows)]
    parts += [f"![{figure.stem}]({figure.relative_to(folder)})" for figure in figures]
    return "\n\n".join(parts) + "\n"


def _to_html(runs_dirs: Sequence[Path], tables: Mapping[str, Table], figures: Sequence[Path]) -> str:
    title = html.escape(", ".join(map(str, runs_dirs)))
    parts = [f"<!doctype html><meta charset='utf-8'><title>{title}</title><style>{STYLE}</style><h1>{title}</h1>"]
    parts += [f"<img src='{html.escape(figure.name)}' alt='{html.escape(figure.stem)}'>" for figure in figures]
    for name, table in tables.items():
        head = "".join(f"<th>{html.escape(column)}</th>" for column in table[0])
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row.values())}</tr>" for row in table)
        parts.append(f"<h2>{name.capitalize()}</h2><table><tr>{head}</tr>{body}</table>")
    return "\n".join(parts) + "\n"
