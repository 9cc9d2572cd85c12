"""Figures over many runs: curves by step, accuracy by length, bars with seeds, loss by compute."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kimi_jax.experiments.results import PF_DAY, SWEPT_OVER, Group, Result, group_runs, grows
from kimi_jax.experiments.scaling import PowerLaw, fit_power_law
from kimi_jax.train.run_dir import whole_file

INK, GRID = "#1f2430", "#e3e6ec"
COLORS = ("#3b6fb6", "#d1495b", "#2e8b57", "#e09f3e", "#7b5ea7", "#3aa6a6", "#8c564b", "#b5487f", "#6b7280", "#9aa63a")
MARKERS = "osD^vP"
LOSS, RATE_KEY = "validation_loss_nats", "optim.peak_lr"
FAR = 8.0  # times the distance from the best to the median: what lies beyond is cut off
ACCURACIES = (0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 1)  # marks of an axis on which what is nearly learnt stands apart
BEYOND = 1.005  # accuracy that stands at infinity there
MANY = 24  # lines in one figure beyond which nothing can be told apart
METRIC_NAMES = {
    "loss_nats": "training loss (nats per token)",
    "validation_loss_nats": "validation loss (nats per token)",
    "validation_bits_per_byte": "validation loss (bits per byte)",
    "validation_accuracy": "accuracy on new examples",
}


def draw_all(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draws every figure for which the runs hold something; returns the PNG files."""
    groups = group_runs(results)
    paths = [_draw_curves(groups, metric, folder / f"{metric}.png") for metric in METRIC_NAMES]
    paths += [_draw_bars(groups, metric, folder / f"{metric}_bars.png") for metric in METRIC_NAMES]
    for metric in dict.fromkeys(name for run in results for name in run.evaluations):
        paths.append(_draw_bars(groups, metric, folder / f"{metric}_bars.png"))
    for evaluation in dict.fromkeys(name for run in results for name in run.config.train.evaluations):
        paths.append(_draw_by_position(groups, evaluation, folder / f"{evaluation}_by_position.png"))
    paths += [_draw_by_length(results, folder / "accuracy_by_length.png")]
    paths += [_draw_by_step(results, folder / "accuracy_by_step.png")]
    paths += [_draw_by_rate(results, folder / f"{LOSS}_by_rate.png")]
    paths += [_draw_scaling(results, folder / "scaling.png")]
    return [path for path in paths if path]


def _draw_curves(groups: Sequence[Group], metric: str, path: Path) -> Path | None:
    """One line per group, the mean of its seeds, with the range between them."""
    shown = [group for group in groups if any(len(run.series(metric)) > 1 for run in group.runs)]
    if not shown or len(shown) > MANY:
        return None

    def draw(axes: Any) -> None:
        tops: list[float] = []
        for i, group in enumerate(shown):
            steps, low, mean, high = _across_seeds(group, metric)
            style = {"color": COLORS[i % len(COLORS)], "linestyle": "-" if i < len(COLORS) else "--"}
            axes.plot(steps, mean, label=group.label, linewidth=1.5, **style)
            axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
            tops.extend(high[len(high) // 20 :])
        if tops and not grows(metric):
            axes.set_ylim(top=1.03 * max(tops))  # the first steps fall from the logarithm of the vocabulary
        axes.set_xlabel("optimizer step", color=INK)

    return _save(draw, path, METRIC_NAMES[metric])


def _across_seeds(group: Group, metric: str) -> tuple[np.ndarray, ...]:
    """Steps that every seed has measured, and the least, mean and largest value there."""
    series = [dict(run.series(metric)) for run in group.runs if run.series(metric)]
    steps = sorted(set.intersection(*map(set, series)))
    values = np.array([[one[step] for step in steps] for one in series]).reshape(len(series), -1)
    return np.array(steps), values.min(axis=0), values.mean(axis=0), values.max(axis=0)


def _draw_bars(groups: Sequence[Group], metric: str, path: Path) -> Path | None:
    """The last value of each group as a bar, best first, its seeds as points."""
    shown = [(group.label, group.values(metric)) for group in groups if group.values(metric)]
    shown.sort(key=lambda item: np.mean(item[1]), reverse=grows(metric))
    if len(shown) < 2 or len(shown) > MANY or metric == "loss_nats":
        return None

    def draw(axes: Any) -> None:
        near = _near([np.mean(values) for _, values in shown])
        every = [value for (_, values), inside in zip(shown, near, strict=True) for value in values if inside]
        margin = 0.15 * max(max(every) - min(every), 1e-3)
        start, end = max(min(every) - 3 * margin, 0), max(every) + 2 * margin
        at = np.arange(len(shown))[::-1]
        for y, (_, values), inside in zip(at, shown, near, strict=True):
            axes.barh(y, np.mean(values), color=COLORS[0], alpha=0.55 if inside else 0.2, height=0.62)
            axes.plot(values, np.full(len(values), y), "o", color=INK, markersize=4)
            mean = np.mean(values)
            text = f"{mean:.3f} \u2192" if mean > end else f"\u2190 {mean:.3f}" if mean < start else f"{mean:.3f}"
            axes.text(np.clip(max(values), start, end), y, f"  {text}", va="center", color=INK, fontsize=9)
        axes.set_yticks(at, [label for label, _ in shown])
        axes.set_xlim(start, end)
        axes.set_xlabel(f"{_metric_name(metric)}; the axis starts at {start:.3g}", color=INK)
        axes.grid(visible=False, axis="y")

    return _save(draw, path, "", height=1.5 + 0.34 * len(shown), legend=False)


def _near(means: Sequence[float]) -> list[bool]:
    """Which values lie so near the best that an axis may hold them all; the first is the best.

    One that has not learnt would otherwise press all others together.
    """
    reach = FAR * abs(np.median(means) - means[0])
    return [reach == 0 or abs(mean - means[0]) <= reach for mean in means]


def _metric_name(metric: str) -> str:
    """What stands at an axis; of a further evaluation its name and what it measures."""
    name, _, what = metric.rpartition("_loss_nats")
    other = f"{name}: loss (nats per token)" if name and not what else metric.replace("_accuracy", ": accuracy")
    return METRIC_NAMES.get(metric, other)


def _draw_by_position(groups: Sequence[Group], evaluation: str, path: Path) -> Path | None:
    """The loss by position in the document, each bin at its middle: the mean over the seeds of each group."""
    shown = [group for group in groups if any(run.by_position(evaluation) for run in group.runs)]
    if not shown or len(shown) > MANY:
        return None

    def draw(axes: Any) -> None:
        lines = {group.label: _mean_by_position(group, evaluation) for group in shown}
        last = {label: list(line.values())[-1] for label, line in lines.items()}
        best_first = sorted(last, key=lambda label: last[label])
        near = dict(zip(best_first, _near([last[label] for label in best_first]), strict=True))
        values = [value for label, line in lines.items() if near[label] for value in line.values()]
        margin = 0.08 * max(max(values) - min(values), 1e-3)
        bottom, top = min(values) - margin, max(values) + margin
        for i, (label, line) in enumerate(lines.items()):
            middles = [1.5 * position or 32 for position in line]
            style = {"color": COLORS[i % len(COLORS)], "linestyle": "-" if i < len(COLORS) else "--"}
            style |= {"linewidth": 1.3, "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
            axes.plot(
                middles, list(line.values()), label=label if min(line.values()) < top else f"{label} (above)", **style
            )
        axes.set_ylim(bottom, top)
        axes.set_xscale("log", base=2)
        axes.get_xaxis().set_major_formatter(lambda x, _: f"{x:.0f}")
        axes.set_xlabel("position in the document (tokens)", color=INK)

    return _save(draw, path, f"{evaluation}: loss (nats per token)")


def _mean_by_position(group: Group, evaluation: str) -> Mapping[int, float]:
    rows = [run.by_position(evaluation) for run in group.runs if run.by_position(evaluation)]
    return {
        position: np.mean([row[position] for row in rows]) for position in sorted(set.intersection(*map(set, rows)))
    }


def _draw_by_length(results: Sequence[Result], path: Path) -> Path | None:
    """The best accuracy at each training length, over learning rates and seeds; one panel per task."""
    lengths = sorted({run.config.data.seq_len for run in results if run.best("validation_accuracy") is not None})
    if len(lengths) < 2:
        return None

    def line(runs: Sequence[Result]) -> Mapping[int, float]:
        return _best_by(runs, lambda run: run.config.data.seq_len)

    def finish(axes: Any) -> None:
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths)
        axes.get_xaxis().set_major_formatter(lambda x, _: f"{x:.0f}")
        axes.set_xlabel("training length (tokens)", color=INK)

    return _draw_by_task(results, SWEPT_OVER, line, finish, path)


def _draw_by_step(results: Sequence[Result], path: Path) -> Path | None:
    """The accuracy curve of the best learning rate and seed; one panel per task. Nothing without several rates."""
    if len({run.config.optim.peak_lr for run in results if len(run.series("validation_accuracy")) > 1}) < 2:
        return None

    def line(runs: Sequence[Result]) -> Mapping[int, float]:
        return dict(max(runs, key=lambda run: run.best("validation_accuracy") or 0.0).series("validation_accuracy"))

    def finish(axes: Any) -> None:
        axes.locator_params(axis="x", nbins=5)  # labels of five digits have to fit beside each other
        axes.set_xlabel("optimizer step", color=INK)

    return _draw_by_task(results, (RATE_KEY,), line, finish, path)


def _draw_by_rate(results: Sequence[Result], path: Path) -> Path | None:
    """The last validation loss by learning rate, a line per group with several: the mean of its seeds, each a point."""
    shown = [(group.label, _by_rate(group)) for group in group_runs(results, (RATE_KEY,))]
    shown = [(label, losses) for label, losses in shown if len(losses) > 1]
    if not shown or len(shown) > MANY:
        return None

    def draw(axes: Any) -> None:
        for i, (label, losses) in enumerate(shown):
            style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
            axes.plot(list(losses), [np.mean(values) for values in losses.values()], label=label, **style)
            for rate, values in losses.items():
                axes.plot([rate] * len(values), values, ".", color=style["color"], markersize=3)
        axes.set_xscale("log")
        rates = sorted({rate for _, losses in shown for rate in losses})
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.minorticks_off()
        axes.set_xlabel("peak learning rate", color=INK)

    return _save(draw, path, METRIC_NAMES[LOSS])


def _draw_by_task(
    results: Sequence[Result],
    ignoring: Sequence[str],
    line: Callable[[Sequence[Result]], Mapping[int, float]],
    finish: Callable[[Any], None],
    path: Path,
) -> Path | None:
    """One panel per task, in it one line per family of runs that differ in seeds and `ignoring` alone."""
    solved = [run for run in results if run.best("validation_accuracy") is not None]
    families: dict[str, dict[str, Mapping[int, float]]] = {}
    for task in sorted({run.config.data.kind for run in solved}):
        groups = group_runs([run for run in solved if run.config.data.kind == task], ignoring)
        families[task] = {_without_task(group.label, task): line(group.runs) for group in groups}
    labels = list(dict.fromkeys(label for lines in families.values() for label in lines))
    if len(labels) > MANY:
        return None

    def draw(panels: Any) -> None:
        for axes, (task, lines) in zip(np.ravel(panels), families.items(), strict=True):
            for i, label in enumerate(labels):  # all of them in each panel: one legend serves all
                style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
                points = lines.get(label, {})
                sparse = max(1, len(points) // 12)
                axes.plot(list(points), list(points.values()), label=label, linewidth=1.5, markevery=sparse, **style)
            finish(axes)
            axes.set_yscale("function", functions=(lambda y: -np.log(BEYOND - y), lambda z: BEYOND - np.exp(-z)))
            axes.set_ylim(-0.03, 1.001)
            axes.set_yticks(ACCURACIES, [f"{accuracy:g}" for accuracy in ACCURACIES])
            axes.set_title(task, color=INK, fontsize=11)

    return _save(draw, path, METRIC_NAMES["validation_accuracy"], panels=len(families))


def _without_task(label: str, task: str) -> str:
    return label.replace(f"kind={task}", "").replace("--", "-").strip("-") or label


def _best_by(runs: Sequence[Result], key: Callable[[Result], int]) -> Mapping[int, float]:
    best: dict[int, float] = {}
    for run in sorted(runs, key=key):
        best[key(run)] = max(best.get(key(run), 0.0), run.best("validation_accuracy") or 0.0)
    return best


def scaling_points(results: Sequence[Result]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each family of model sizes: compute in PFLOP/s-days and validation loss of its finished runs, of several
    learning rates those of the best.

    A family has one pattern of mixers, one kind of data and at least three sizes, the largest twice the smallest; so
    with their compute, of which no law can be fitted where all sizes had the same.
    """
    finished = [run for run in results if run.is_finished and run.last(LOSS) is not None]
    families: dict[str, list[tuple[float, float]]] = {}
    sizes: dict[str, set[int]] = {}
    for group in group_runs(finished, (RATE_KEY,)):
        best = min(_by_rate(group).values(), key=np.mean)
        family = _family(group.runs[0])
        families.setdefault(family, []).extend((group.runs[0].flops / PF_DAY, loss) for loss in best)
        sizes.setdefault(family, set()).add(group.runs[0].active_parameters)
    points = {name: tuple(np.array(sorted(found)).T) for name, found in families.items()}
    return {name: found for name, found in points.items() if _differ(sizes[name]) and _differ(set(found[0]))}


def _differ(values: Collection[float]) -> bool:
    return len(values) > 2 and max(values) >= 2 * min(values)


def _by_rate(group: Group) -> Mapping[float, Sequence[float]]:
    """The last validation losses of a group by learning rate, in its order."""
    found: dict[float, list[float]] = {}
    for run in sorted(group.runs, key=lambda run: run.config.optim.peak_lr):
        if (loss := run.last(LOSS)) is not None:
            found.setdefault(run.config.optim.peak_lr, []).append(loss)
    return found


def _family(run: Result) -> str:
    mixers = [run.config.model.mixers[name].kind for name in run.config.model.pattern]
    pattern = "-".join(f"{mixers.count(kind)}{kind}" for kind in dict.fromkeys(mixers))
    return pattern if run.config.data.kind in ("stdlib", "records") else f"{pattern} {run.config.data.kind}"


def fit_families(results: Sequence[Result]) -> dict[str, PowerLaw]:
    """The scaling law of each family."""
    return {name: fit_power_law(*points) for name, points in scaling_points(results).items()}


def _draw_scaling(results: Sequence[Result], path: Path) -> Path | None:
    points = scaling_points(results)
    if not points:
        return None

    def draw(axes: Any) -> None:
        for i, (name, (compute, loss)) in enumerate(points.items()):
            law, color = fit_power_law(compute, loss), COLORS[i % len(COLORS)]
            span = np.geomspace(compute.min() / 1.3, compute.max() * 1.3, 50)
            axes.plot(compute, loss, MARKERS[i % len(MARKERS)], color=color)
            axes.plot(span, law(span), color=color, linewidth=1.2, label=f"{name}: {law.a:.4g} C^-{law.b:.4g}")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axes.yaxis.set_minor_formatter(lambda y, _: f"{y:g}")
        axes.set_xlabel("compute (PFLOP/s-days)", color=INK)

    return _save(draw, path, METRIC_NAMES[LOSS])


def _save(
    draw: Callable[[Any], None], path: Path, ylabel: str, *, height: float = 4.8, panels: int = 1, legend: bool = True
) -> Path:
    # Imported here: a second of start-up time.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8 if panels == 1 else 4.2 * panels, height), dpi=160, layout="constrained")
    axes = figure.subplots(1, panels, sharey=True)
    draw(axes)
    for one in np.ravel(axes):
        one.grid(color=GRID, linewidth=0.8, axis="both" if legend else "x")
        one.set_axisbelow(True)
        one.tick_params(colors=INK, length=0)
        for side, spine in one.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(GRID)
    first = np.ravel(axes)[0]
    first.set_ylabel(ylabel, color=INK)
    if legend:
        first.legend(frameon=False, labelcolor=INK, fontsize=8)
    with whole_file(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))
    return path
