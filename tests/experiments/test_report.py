"""Reports: what the runs hold is what the tables say, groups are seeds, the fit finds the law that made the points."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.image import imread

from kimi_jax.config.load import dump
from kimi_jax.errors import UserError
from kimi_jax.experiments.figures import _near, fit_families, scaling_points
from kimi_jax.experiments.report import write_report
from kimi_jax.experiments.results import SWEPT_OVER, Result, _label, group_runs, grows, read_results
from kimi_jax.experiments.scaling import compute_ratio, fit_power_law
from kimi_jax.experiments.sweep import load_sweep
from kimi_jax.train.run_dir import RunDir

DEBUG = Path(__file__).parents[2] / "experiments" / "sizes" / "debug.yaml"


def make_runs(folder: Path, value, **sweep) -> Path:
    """Writes the run directories that a sweep would leave; value(run, fraction) gives the last metrics of a record."""
    folder.mkdir(exist_ok=True)
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"base": str(DEBUG), **sweep}, sort_keys=False))
    for run in load_sweep(folder / "sweep.yaml"):
        run_dir = run.directory(folder / "runs")
        run_dir.path.mkdir(parents=True)
        run_dir.config.write_text(dump(run.config))
        steps = run.config.train.steps
        records = [{"step": step, "loss_nats": 3.0, **value(run, step / steps)} for step in (1, steps // 2, steps)]
        run_dir.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / "runs"


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def is_picture(path: Path) -> bool:
    pixels = imread(path)
    return min(pixels.shape[:2]) > 300 and pixels.std() > 0.02


def test_seeds_are_put_together(tmp_path):
    def value(run, fraction):
        return {"validation_loss_nats": 4 - fraction + run.config.train.seed + (run.arm == "b"), "tokens_per_s": 100.0}

    arms = {"a": {}, "b": {"model.mixers.kda.decay": {"kind": "head"}}}
    runs_dir = make_runs(tmp_path, value, runs=arms, grid={"optim.peak_lr": [5e-05, 1e-3]}, seeds=[0, 1, 2])
    written = write_report([runs_dir], runs_dir / "report")
    groups = read_csv(runs_dir / "report" / "groups.csv")
    assert {row["group"]: row["validation_loss_nats"] for row in groups} == {
        "a-peak_lr=5e-05": "4.0000 ± 1.0000",
        "a-peak_lr=0.001": "4.0000 ± 1.0000",
        "b-peak_lr=5e-05": "5.0000 ± 1.0000",
        "b-peak_lr=0.001": "5.0000 ± 1.0000",
    }
    rows = read_csv(runs_dir / "report" / "runs.csv")
    assert len(rows) == 12 and {row["state"] for row in rows} == {"finished"}
    assert all(int(row["parameters"]) > 10_000 for row in rows), "numbers, without commas"
    assert "validation_accuracy" not in rows[0], "no run has it"
    figures = [path for path in written if path.suffix == ".png"]
    assert {path.name for path in figures} == {
        "loss_nats.png",
        "validation_loss_nats.png",
        "validation_loss_nats_bars.png",
        "validation_loss_nats_by_rate.png",
    }
    assert all(map(is_picture, figures))
    page = written[-1].read_text()
    assert all(path.name in page for path in figures) and "a-peak_lr=5e-05-seed=2" in page


def test_further_evaluations_and_positions_are_shown(tmp_path):
    def value(run, fraction):
        worse = run.arm == "rope"
        positions = {f"long_loss_nats_from_{start}": 3.0 + worse - 0.1 * i for i, start in enumerate((0, 64, 128))}
        bench = {"bench_arc_easy_acc": 0.25 + worse / 4}
        return {"long_loss_nats": 3.0 + worse, "recall_accuracy": 0.5 - 0.25 * worse, **positions, **bench}

    evaluations = {"long": {"by_position": True}, "recall": {"data": {"kind": "mqar", "seq_len": 64}}}
    evaluations["bench"] = {"kind": "lm_eval", "tasks": ["arc_easy"]}
    arms = {"nope": {}, "rope": {"model.mixers.mla.position": {"kind": "rope"}}}
    arms = {name: {**keys, "train.evaluations": evaluations} for name, keys in arms.items()}
    runs_dir = make_runs(tmp_path, value, runs=arms, seeds=[0, 1])
    RunDir(next(runs_dir.iterdir())).mark_ended(20)
    written = write_report([runs_dir], runs_dir / "report")
    groups = {row["group"]: row for row in read_csv(runs_dir / "report" / "groups.csv")}
    assert groups["rope"]["long_loss_nats"] == "4.0000 ± 0.0000"
    assert groups["nope"]["recall_accuracy"] == "0.5000 ± 0.0000"
    assert groups["rope"]["bench_arc_easy_acc"] == "0.5000 ± 0.0000"
    states = [row["state"] for row in read_csv(runs_dir / "report" / "runs.csv")]
    assert sorted(states) == ["ended early at 20", "finished", "finished", "finished"]
    figures = {path.name for path in written if path.suffix == ".png"}
    assert figures >= {"long_loss_nats_bars.png", "recall_accuracy_bars.png", "long_by_position.png"}
    assert all(is_picture(path) for path in written if path.suffix == ".png")
    assert read_results(runs_dir)[-1].by_position("long") == {0: 4.0, 64: 3.9, 128: 3.8}


def test_of_accuracies_more_is_better_and_of_losses_less():
    more = ("validation_accuracy", "lossy_arc_easy_acc", "bench_gsm8k_exact_match,strict-match")
    less = (
        "validation_loss_nats",
        "a_bits_per_byte",
        "bench_wikitext_word_perplexity",
        "x_perplexity,none",
        "y_brier_score,none",
    )
    assert all(map(grows, more)) and not any(map(grows, less))


def test_seeds_measured_at_other_steps_and_lines_without_height_can_be_drawn(tmp_path):
    def value(run, fraction):
        here = (fraction < 1) == (run.config.train.seed == 0)
        return {"validation_loss_nats": 3.0 if here else None, "long_loss_nats": 3.0, "long_loss_nats_from_0": 3.0}

    runs_dir = make_runs(
        tmp_path, value, runs={"a": {"train.evaluations": {"long": {"by_position": True}}}}, seeds=[0, 1]
    )
    written = {path.name for path in write_report([runs_dir], runs_dir / "report")}
    assert written >= {"loss_nats.png", "validation_loss_nats.png", "long_by_position.png"}


def test_what_lies_far_from_the_best_is_cut_off():
    assert _near([0.5, 0.51, 0.52, 3.0]) == [True, True, True, False]
    assert _near([0.9, 0.8, 0.7, 0.01]) == [True, True, True, True]  # accuracies fall; nothing is far
    assert _near([1.0, 1.0]) == [True, True]


def test_only_seeds_are_put_together(tmp_path):
    """Runs of different lengths, or with different microbatches, are no seeds of each other."""

    def value(run, fraction):
        return {"validation_loss_nats": float(run.config.train.steps)}

    runs_dir = make_runs(tmp_path, value, grid={"train.steps": [20, 30], "train.grad_accum": [1, 2]}, seeds=[0, 1])
    groups = group_runs(read_results(runs_dir))
    assert [len(group.runs) for group in groups] == [2] * 4


def test_groups_of_one_name_keep_their_digits(tmp_path):
    for size in (8, 4):  # the same arm before and after the base has changed
        make_runs(tmp_path, lambda run, fraction: {}, runs={"a": {"train.batch_size": size}}, seeds=[0])
    results = read_results(tmp_path / "runs")
    assert [group.label for group in group_runs(results)] == [run.name for run in results]
    assert [group.label for group in group_runs(results, SWEPT_OVER)] == ["a"]


def test_folders_of_one_family_are_read_together(tmp_path):
    """What is measured beside makes no other family."""
    folders = []
    for length, beside in ((16, {}), (32, {"twice": {"seq_len": 64}})):
        runs = {"kda": {"train.evaluations": beside, "data": {"kind": "stack", "seq_len": length}}}
        value = lambda run, fraction: {"validation_accuracy": fraction}
        folders.append(make_runs(tmp_path / str(length), value, runs=runs, grid={"optim.peak_lr": [1e-4, 1e-3]}))
    written = write_report(folders, tmp_path / "report")
    assert "accuracy_by_length.png" in {path.name for path in written}
    (family,) = group_runs(read_results(*folders), SWEPT_OVER)
    assert (family.label, len(family.runs)) == ("kda", 4)


def test_groups_are_called_what_names_have_left():
    for name in ("kda-peak_lr=5e-05-seed=1-0123abcd", "kda-peak_lr=0.001-seq_len=64-seed=0", "kda"):
        assert _label(name, SWEPT_OVER) == "kda"
    assert _label("kda-b2=0.9-peak_lr=1e-05", SWEPT_OVER) == "kda-b2=0.9"


def test_the_best_accuracy_by_length(tmp_path):
    def value(run, fraction):
        return {"validation_accuracy": fraction * (0.5 if run.config.optim.peak_lr < 5e-4 else 0.9)}

    runs_dir = make_runs(
        tmp_path,
        value,
        runs={"kda": {}, "mla": {"model.pattern": ["mla"]}},
        grid={
            "data": [{"kind": kind, "seq_len": length} for kind in ("palindrome", "stack") for length in (16, 32)],
            "optim.peak_lr": [1e-4, 1e-3],
        },
    )
    written = write_report([runs_dir], tmp_path / "report")
    pictures = [path for path in written if path.name in ("accuracy_by_length.png", "accuracy_by_step.png")]
    assert len(pictures) == 2 and all(map(is_picture, pictures))
    families = group_runs(read_results(runs_dir), SWEPT_OVER)
    assert [len(family.runs) for family in families] == [4, 4, 4, 4]
    assert {max(family.values("validation_accuracy", best=True)) for family in families} == {0.9}


def test_the_fit_finds_the_law():
    compute = np.geomspace(0.1, 10, 8)
    law = fit_power_law(compute, 2.2879 * compute**-0.0527)
    assert law.a == pytest.approx(2.2879) and law.b == pytest.approx(0.0527)
    assert law.b_interval == pytest.approx((0.0527, 0.0527), abs=1e-6)


def test_the_intervals_hold_as_often_as_they_say():
    random, inside = np.random.default_rng(0), []
    compute = np.geomspace(0.1, 10, 5)
    for _ in range(400):
        noisy = 2.3 * compute**-0.05 * np.exp(0.01 * random.normal(size=5))
        low, high = fit_power_law(compute, noisy).b_interval
        inside.append(low <= 0.05 <= high)
    assert 0.92 < np.mean(inside) < 0.98
    assert np.isnan(fit_power_law(compute[:2], compute[:2]).b_interval).all()


def test_compute_at_equal_loss():
    compute = np.geomspace(0.1, 10, 8)
    one, other = fit_power_law(compute, 2.2 * compute**-0.05), fit_power_law(compute, 2.3 * compute**-0.06)
    ratio, low, high = compute_ratio(one, other, 3.0)
    assert other(3.0 * ratio) == pytest.approx(one(3.0)) and low == pytest.approx(high)
    random, inside = np.random.default_rng(0), []
    for _ in range(400):
        noisy = [law(compute) * np.exp(0.002 * random.normal(size=8)) for law in (one, other)]
        _, low, high = compute_ratio(*(fit_power_law(compute, loss) for loss in noisy), 3.0)
        inside.append(low <= ratio <= high)
    assert 0.92 < np.mean(inside) < 0.98


def test_sizes_of_one_pattern_make_a_scaling_law(tmp_path, monkeypatch):
    def value(run, fraction):
        return {"validation_loss_nats": 3.0 * (run.config.model.model_dim / 32) ** -0.1}

    dims = {"model.model_dim": [32, 64, 96], "train.steps": [10, 20, 30]}
    runs_dir = make_runs(tmp_path, value, runs={"hybrid": {}, "mla": {"model.pattern": ["mla"]}}, zip=dims)
    laws = fit_families(read_results(runs_dir))
    assert set(laws) == {"1kda-1mla", "1mla"} and all(law.b > 0 for law in laws.values())
    written = write_report([runs_dir], tmp_path / "report")
    assert {"scaling.png", "scaling.csv"} <= {path.name for path in written}
    ranks = [{"kind": "channel", "rank": rank} for rank in (2, 3, 4)]
    arms = {str(i): {"model.mixers.kda.decay": decay} for i, decay in enumerate(ranks)}
    (tmp_path / "arms").mkdir()
    assert not fit_families(read_results(make_runs(tmp_path / "arms", value, runs=arms))), "no sizes, but arms"
    table = {row["family"]: row for row in read_csv(tmp_path / "report" / "scaling.csv")}
    assert table["1mla"]["1mla needs"] == "1" and table["1mla"]["1kda-1mla needs"].endswith(")")
    monkeypatch.setattr(Result, "flops", 1e15)
    assert not fit_families(read_results(runs_dir)), "all of one compute"


def test_of_several_learning_rates_the_best_counts(tmp_path):
    def value(run, fraction):
        worse = abs(np.log(run.config.optim.peak_lr / 2e-3))
        return {"validation_loss_nats": 3.0 * (run.config.model.model_dim / 32) ** -0.1 + worse}

    dims = {"model.model_dim": [32, 64, 96], "train.steps": [10, 20, 30]}
    runs_dir = make_runs(tmp_path, value, zip=dims, grid={"optim.peak_lr": [1e-3, 2e-3, 4e-3]}, seeds=[0, 1])
    (points,) = scaling_points(read_results(runs_dir)).values()
    np.testing.assert_allclose(points[1], np.repeat([3.0 * 3**-0.1, 3.0 * 2**-0.1, 3.0], 2)[::-1])
    written = write_report([runs_dir], tmp_path / "report")
    assert is_picture(next(path for path in written if path.name == "validation_loss_nats_by_rate.png"))


def test_folders_without_runs_are_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        read_results(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no run directory"):
        read_results(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("nonsense\n{}\n")
    (tmp_path / "run" / "config.yaml").write_text(DEBUG.read_text())
    with pytest.raises(UserError, match="line 1 is no JSON object"):
        read_results(tmp_path)
