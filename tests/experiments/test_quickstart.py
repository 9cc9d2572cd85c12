"""The quickstart ends with its table, an export and an honest exit code; a second call finds it finished."""

import pytest

from kimi_jax.config.load import dump, load
from kimi_jax.config.train import RunConfig
from kimi_jax.experiments import quickstart

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = [
    "model.num_layers=2",
    "model.first_k_dense=0",
    "model.mixers.kda.implementation=reference",
    "train.steps=2",
    "optim.schedule={kind: wsd}",
    "train.validation={every: 1, batches: 1}",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    cfg = load("experiments/sizes/debug.yaml", SMALL, RunConfig)
    (folder / "small.yaml").write_text(dump(cfg))
    return folder / "small.yaml", folder / "run", quickstart.run(folder / "small.yaml", folder / "run")


def test_two_steps_do_not_beat_bigrams(run):
    assert run[2] == 1, "the exit code says that the model needs more bits than it should"


def test_everything_the_table_names_is_there(run):
    _, run_dir, _ = run
    assert (run_dir / "plots" / "loss.png").stat().st_size > 1000
    assert {"model.safetensors", "config.json"} <= {file.name for file in (run_dir / "export-2").iterdir()}
    assert any((run_dir / "checkpoints").iterdir())


def test_a_second_call_says_that_it_is_finished(run, capsys):
    config, run_dir, _ = run
    before = (run_dir / "metrics.jsonl").read_text()
    assert quickstart.run(config, run_dir) == 1
    text = capsys.readouterr().out
    assert "finished, 2 steps taken" in text and "bits per byte" in text
    assert (run_dir / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(("model_bits", "beats"), [(2.79, True), (2.81, False), (3.6, False)])
def test_the_margin_is_a_fifth(model_bits, beats):
    outcome = quickstart.Outcome(None, model_bits, 3.5, 0.0, "", None)
    assert outcome.beats_bigrams is beats
