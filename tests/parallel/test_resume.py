"""A run that goes on over other devices: a checkpoint of eight is read by four and by one; examples and losses stay."""

import hashlib

import jax
import pytest

from kimi_jax.config import mesh as config
from kimi_jax.config.load import load
from kimi_jax.config.train import RunConfig
from kimi_jax.data.pipeline import TrainIterator
from kimi_jax.parallel.mesh import build_mesh
from kimi_jax.train import loop
from kimi_jax.train.metrics import read_metrics

pytestmark = pytest.mark.multi_device
TOLERANCE = 1e-5  # relative; measured 4.5e-7
OVERRIDES = [
    "model.num_layers=2",
    "model.pattern=[kda,mla]",
    "optim={kind: adamw, peak_lr: 1.0e-3, schedule: {kind: constant}}",
    "data.seq_len=64",
    "train.batch_size=8",
    "train.log_every=1",
    "train.checkpoints.every=2",
]
PARTS = [(2, 8, {"fsdp": 4, "tensor": 2}), (4, 4, {"data": 2, "fsdp": 2}), (6, 1, {})]  # until step, devices, mesh


@pytest.fixture
def examples(monkeypatch) -> list[str]:
    """A digest of every batch that a run takes."""
    seen: list[str] = []
    take = TrainIterator.__next__

    def note(self):
        batch = take(self)
        seen.append(hashlib.sha256(batch["inputs"].tobytes()).hexdigest())
        return batch

    monkeypatch.setattr(TrainIterator, "__next__", note)
    return seen


def test_eight_then_four_then_one(tmp_path, monkeypatch, examples):
    def run(folder: str, steps: int, devices: int, mesh: dict) -> list[float]:
        cfg = load("experiments/sizes/debug.yaml", [*OVERRIDES, f"train.steps={steps}"], RunConfig)
        cfg = cfg.model_copy(update={"mesh": config.Mesh(**mesh)})
        monkeypatch.setattr(loop, "build_mesh", lambda sizes: build_mesh(sizes, jax.devices()[:devices]))
        loop.train(cfg, tmp_path / folder)
        return [record["loss_nats"] for record in read_metrics(tmp_path / folder / "metrics.jsonl")]

    whole = run("whole", 6, 8, {})
    order = examples.copy()
    examples.clear()
    for steps, devices, mesh in PARTS:
        losses = run("parts", steps, devices, mesh)
    assert len(order) == 6 and examples == order, "the same examples in the same order"
    worst = max(abs(a / b - 1) for a, b in zip(losses, whole, strict=True))
    print(f"{worst:.1e}")
    assert worst < TOLERANCE
