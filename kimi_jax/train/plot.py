"""plots/loss.png: the loss curves of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kimi_jax.train.run_dir import whole_file

INK, TRAIN, VALIDATION, GRID = "#1f2430", "#3b6fb6", "#d1495b", "#e3e6ec"
SMOOTH_FRACTION = 0.02  # half the window of the moving average, as a fraction of all points ...
SMOOTH_POINTS = 6  # ... but no fewer points than this ...
GROWTH = 0.1  # ... and at most this fraction of the points before: a short window where the loss falls fast


def plot_loss(records: Sequence[dict[str, Any]], path: Path, *, title: str) -> None:
    """Draws training loss (thin, and smoothed) and validation loss over steps.

    Args:
      records: of metrics.jsonl, steps ascending.
      path: a PNG file, replaced as a whole.
      title: above the plot.
    """
    # Imported here: a second of start-up time that a run without plots does not spend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train, validation = (_series(records, name) for name in ("loss_nats", "validation_loss_nats"))
    if not len(train[0]):
        return
    figure = Figure(figsize=(8, 4.8), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    smooth = _smooth(train[1])
    axes.plot(*train, color=TRAIN, linewidth=0.7, alpha=0.3)
    axes.plot(train[0], smooth, color=TRAIN, linewidth=1.8, label="training, smoothed")
    if len(validation[0]):
        marker = "o" if len(validation[0]) <= 60 else ""
        style = {"color": VALIDATION, "markersize": 4.5, "markeredgecolor": "white", "markeredgewidth": 0.7}
        axes.plot(*validation, marker=marker, linewidth=1.2, label="validation", zorder=3, **style)
        axes.set_title(_last_validation(records), loc="right", color=VALIDATION, fontsize=10, pad=10)
    _style(axes, title)
    axes.set_ylim(*_limits(train[1], smooth, validation[1]))
    axes.set_xlim(0, train[0][-1] * 1.02)
    with whole_file(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))


def _series(records: Sequence[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return tuple(np.array(points, float).reshape(-1, 2).T)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average whose window grows with the step: it neither lags behind the steep start nor hides it."""
    count = len(values)
    at = np.arange(count)
    half = np.minimum(GROWTH * at, max(SMOOTH_FRACTION * count, SMOOTH_POINTS)).astype(int)
    first, end = at - half, np.minimum(at + half + 1, count)
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[end] - total[first]) / (end - first)


def _limits(train: np.ndarray, smooth: np.ndarray, validation: np.ndarray) -> tuple[float, float]:
    """Shows every smoothed and validation point; a lone spike of the thin line may leave the frame."""
    low = min(np.percentile(train, 0.5), smooth.min(), *validation)
    high = max(np.percentile(train, 99.5), smooth.max(), *validation)
    margin = 0.05 * max(high - low, 1e-3)
    return low - margin, high + margin


def _last_validation(records: Sequence[dict[str, Any]]) -> str:
    last = [record for record in records if record.get("validation_loss_nats") is not None][-1]
    bits = last.get("validation_bits_per_byte")
    per_byte = "" if bits is None else f", {bits:.3f} bits per byte"
    return f"{last['validation_loss_nats']:.3f} nats per token{per_byte}"


def _style(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=12, fontweight="bold", pad=10, parse_math=False)
    axes.set_xlabel("optimizer step", color=INK)
    axes.set_ylabel("cross-entropy (nats per token)", color=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)
    axes.legend(frameon=False, loc="upper right", labelcolor=INK)
