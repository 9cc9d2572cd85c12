"""Learning rates at the steps that matter."""

import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import TypeAdapter

from kimi_jax.config.optim import AdamW
from kimi_jax.train.schedule import learning_rate

STEPS = 100
PEAK = 2e-3
CASES = {  # schedule -> {step: fraction of the peak}
    "wsd": (
        {"kind": "wsd", "warmup_steps": 10, "decay_steps": 20, "final_fraction": 0.1},
        {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 80: 1.0, 81: 0.955, 90: 0.55, 99: 0.145, 100: 0.1, 500: 0.1},
    ),
    "wsd_without_decay": ({"kind": "wsd", "warmup_steps": 0}, {0: 1.0, 99: 1.0, 100: 1.0}),
    "wsd_to_zero": ({"kind": "wsd", "decay_steps": 100}, {0: 1.0, 50: 0.5, 99: 0.01}),
    "cosine": (
        {"kind": "cosine", "warmup_steps": 20, "final_fraction": 0.1},
        {0: 0.05, 19: 1.0, 20: 1.0, 60: 0.55, 40: 0.1 + 0.9 * (1 + np.sqrt(0.5)) / 2, 100: 0.1},
    ),
    "constant": ({"kind": "constant", "warmup_steps": 4}, {0: 0.25, 3: 1.0, 99: 1.0}),
}


@pytest.mark.parametrize(("schedule", "expected"), CASES.values(), ids=CASES)
def test_values(schedule, expected):
    cfg = TypeAdapter(AdamW).validate_python({"peak_lr": PEAK, "schedule": schedule})
    rate = learning_rate(cfg, STEPS)
    got = {step: float(rate(jnp.int32(step))) / PEAK for step in expected}
    assert got == pytest.approx(expected, rel=2e-6)
    assert rate(jnp.int32(0)).dtype == jnp.float32


@pytest.mark.parametrize("schedule", [schedule for schedule, _ in CASES.values()], ids=CASES)
def test_no_step_is_wasted(schedule):
    rate = learning_rate(AdamW(peak_lr=PEAK, schedule=schedule), STEPS)
    rates = np.array([float(rate(jnp.int32(step))) for step in range(STEPS)])
    assert np.all(rates > 0)
    assert rates.max() == pytest.approx(PEAK)
