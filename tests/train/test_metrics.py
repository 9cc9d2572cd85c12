"""metrics.jsonl: each step once, whatever happened; optional sinks; the plot."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.image import imread

from kimi_jax.config.train import Wandb
from kimi_jax.errors import UserError
from kimi_jax.train.display import Silence
from kimi_jax.train.loop import _Loop
from kimi_jax.train.metrics import JsonLines, WandbRun, open_sinks, read_metrics
from kimi_jax.train.plot import _smooth, plot_loss
from kimi_jax.train.run_dir import RunDir


def _write(path, steps, *, last_step):
    sink = JsonLines(path, last_step=last_step)
    for step in steps:
        sink.write({"step": step, "loss_nats": 1.0 / step})
    sink.close()


def test_lines_after_the_restored_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    _write(path, range(1, 8), last_step=0)
    with path.open("a") as file:
        file.write('{"step": 8, "loss')
    _write(path, range(5, 10), last_step=4)
    assert read_metrics(path) == [{"step": step, "loss_nats": 1.0 / step} for step in range(1, 10)]


def test_numbers_survive_exactly_and_not_finite_ones_become_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path, last_step=0)
    value = float(np.float32(0.1))
    sink.write({"step": 1, "loss_nats": value, "grad_norm": float("nan"), "lr": float("inf"), "tokens": 3})
    sink.close()
    assert read_metrics(path) == [{"step": 1, "loss_nats": value, "grad_norm": None, "lr": None, "tokens": 3}]


def test_damage_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for damaged in ('{"st', '{"step": "2"}'):
        path.write_text(f'{{"step": 1}}\n{damaged}\n{{"step": 3}}\n')
        with pytest.raises(UserError, match=r"metrics.jsonl: line 2 is no JSON object"):
            read_metrics(path)
    assert read_metrics(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(
    ("logging", "package"), [({"tensorboard": True}, "tensorboardX"), ({"wandb": {"project": "p"}}, "wandb")]
)
def test_missing_package_is_named_with_the_extra(hybrid, changed, tmp_path, monkeypatch, logging, package):
    monkeypatch.setitem(sys.modules, package, None)
    cfg = changed(hybrid, logging={"tensorboard": False, "wandb": None} | logging)
    with pytest.raises(UserError, match=rf"package {package} is not installed; pip install 'kimi_jax\[log\]'"):
        open_sinks(cfg, RunDir(tmp_path), last_step=0)


def test_wandb_continues_the_run_of_this_directory_alone(hybrid, tmp_path, monkeypatch):
    steps: dict[str, list[int]] = {}

    def init(*, id, resume, **settings):
        logged = steps.setdefault(id, [])
        step = logged[-1] + 1 if resume == "allow" and logged else 0
        return SimpleNamespace(step=step, log=lambda record, step: logged.append(step))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for folder, taken in (("a/run", (1, 2, 3)), ("a/run", (2, 3, 4)), ("b/run", (1,))):
        run = WandbRun(Wandb(project="p"), RunDir(tmp_path / folder), hybrid)
        for step in taken:
            run.write({"step": step, "loss_nats": 1.0})
    assert list(steps.values()) == [[1, 2, 3, 4], [1]], "steps that a killed run takes again are not logged again"


def test_smoothing_neither_lags_nor_moves_a_line():
    line = np.linspace(5.0, 1.0, 400)
    np.testing.assert_allclose(_smooth(line)[:380], line[:380], atol=1e-9)
    noise = np.random.default_rng(0).normal(size=400)
    assert _smooth(noise)[100:].std() < 0.4


def test_plot(tmp_path):
    path = tmp_path / "plots" / "loss.png"
    plot_loss([], path, title="empty")
    assert not path.exists(), "nothing to draw yet"
    plot_loss([{"step": 1, "loss_nats": 5.0}], path, title="one point")
    one = imread(path)
    records = [{"step": step, "loss_nats": 5.0 / step} for step in range(1, 50)]
    records[-1]["validation_loss_nats"] = 0.2
    plot_loss(records, path, title="$x^$ is no formula")
    assert imread(path).shape == one.shape and not np.array_equal(imread(path), one)
    assert [file.name for file in path.parent.iterdir()] == ["loss.png"]


def test_a_step_with_evaluations_alone_is_logged():
    """A run without validation data may still measure something else."""
    written = []
    sink = SimpleNamespace(write=written.append)
    loop = SimpleNamespace(cfg=SimpleNamespace(steps=10, log_every=100), sinks=[sink], display=Silence())
    loop.meter, loop._utilization = SimpleNamespace(lap=dict), lambda rate: {}
    for step, measured in ((3, {}), (4, {"more_loss_nats": 2.0})):
        _Loop._report(loop, {"step": step}, measured)
    assert written == [{"step": 4, "more_loss_nats": 2.0}]


def test_bytes_that_are_no_text_are_a_damaged_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe\n')
    with pytest.raises(UserError, match="line 2 is no JSON object with a step"):
        read_metrics(tmp_path / "metrics.jsonl")
