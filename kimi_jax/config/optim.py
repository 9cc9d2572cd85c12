"""Optimizers and learning-rate schedules as data."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from kimi_jax.config.base import Config
from kimi_jax.config.mixer import Epsilon

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]  # at 1 a moving average never moves
Steps = Annotated[int, Field(ge=0)]


class WarmupStableDecay(Config):
    """Linear warmup to the peak, constant, then linear decay to `final_fraction` of it over the last `decay_steps`."""

    kind: Literal["wsd"] = "wsd"
    warmup_steps: Steps = 0
    decay_steps: Steps = 0
    final_fraction: Fraction = 0.0


class WarmupCosine(Config):
    """Linear warmup to the peak, then cosine decay over the rest to `final_fraction` of the peak."""

    kind: Literal["cosine"] = "cosine"
    warmup_steps: Steps = 0
    final_fraction: Fraction = 0.1


class Constant(Config):
    """Linear warmup to the peak, then constant."""

    kind: Literal["constant"] = "constant"
    warmup_steps: Steps = 0


Schedule = Annotated[WarmupStableDecay | WarmupCosine | Constant, Field(discriminator="kind")]


class Optim(Config):
    """What the optimizers share."""

    peak_lr: Annotated[float, Field(gt=0)]
    schedule: Schedule = WarmupStableDecay()
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled, scaled by the learning rate; not for norms, gate parameters (a_log, dt_bias) and convolutions."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest global gradient norm; none: unclipped."""
    b1: Momentum = 0.9
    b2: Momentum = 0.95
    eps: Epsilon = 1e-8


class AdamW(Optim):
    """AdamW on every parameter."""

    kind: Literal["adamw"] = "adamw"


class Quintic(Config):
    """One polynomial in all Newton-Schulz steps: steep at 0, it leaves singular values between 0.68 and 1.2."""

    kind: Literal["quintic"] = "quintic"


class Minimax(Config):
    """Polar Express (arXiv 2505.16932): of each step the polynomial closest to 1 where the step before left them."""

    kind: Literal["minimax"] = "minimax"
    smallest: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    """Singular values from here on, relative to the Frobenius norm, are moved closest to 1."""


NewtonSchulz = Annotated[Quintic | Minimax, Field(discriminator="kind")]


class Muon(Optim):
    """Muon in Moonlight's form (arXiv 2502.16982) on matrices, AdamW (b1, b2, eps) on the rest, one learning rate."""

    kind: Literal["muon"] = "muon"
    momentum: Momentum = 0.95
    newton_schulz: NewtonSchulz = Quintic()
    newton_schulz_steps: Annotated[int, Field(ge=1, le=10)] = 5
    update_rms: Annotated[float, Field(gt=0)] = 0.2
    """RMS that each update is scaled to: 0.2 sqrt(max(rows, columns)) times the orthogonal factor."""


Optimizer = Annotated[AdamW | Muon, Field(discriminator="kind")]


def schedule_problems(schedule: Schedule, steps: int) -> Iterator[tuple[str, str]]:
    """Yields (field, problem) for a schedule that does not fit into `steps`."""
    decay = getattr(schedule, "decay_steps", 0)
    if schedule.warmup_steps + decay > steps:
        parts = f"warmup_steps={schedule.warmup_steps} + decay_steps={decay}" if decay else f"{schedule.warmup_steps}"
        yield "optim.schedule.warmup_steps", f"{parts} is more than train.steps={steps}"
