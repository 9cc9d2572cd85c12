"""The learning rate of each step."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kimi_jax.config.optim import Constant, Optim, Schedule, WarmupCosine, WarmupStableDecay

type Decay = Callable[[Float[Array, ""], int], Float[Array, ""]]


def learning_rate(cfg: Optim, steps: int) -> Callable[..., Float[Array, ""]]:
    """Builds the schedule of a run.

    Warmup step i of W has (i + 1) / W of the peak, so no step is wasted on a rate of zero; a decay starts at the peak
    and reaches its final value where step `steps` would be.

    Args:
      cfg: peak and shape.
      steps: steps of the whole run.

    Returns:
      A function from the 0-based step (int32 scalar) to the learning rate (float32 scalar); its second argument, a
      float32 scalar, takes the place of `cfg.peak_lr`.
    """
    decay = _DECAYS[type(cfg.schedule)](cfg.schedule, steps)
    warmup_steps = cfg.schedule.warmup_steps

    def rate(step: Int[Array, ""], peak_lr: float | Float[Array, ""] = cfg.peak_lr) -> Float[Array, ""]:
        step = jnp.asarray(step, jnp.float32)
        warmup = jnp.minimum(1.0, (step + 1.0) / max(warmup_steps, 1))
        return peak_lr * warmup * decay(step)

    return rate


def _stable_decay(cfg: WarmupStableDecay, steps: int) -> Callable[[Float[Array, ""]], Float[Array, ""]]:
    def factor(step):
        left = jnp.clip((steps - step) / max(cfg.decay_steps, 1), 0.0, 1.0)
        return cfg.final_fraction + (1.0 - cfg.final_fraction) * left if cfg.decay_steps else jnp.ones(())

    return factor


def _cosine(cfg: WarmupCosine, steps: int) -> Callable[[Float[Array, ""]], Float[Array, ""]]:
    def factor(step):
        done = jnp.clip((step - cfg.warmup_steps) / max(steps - cfg.warmup_steps, 1), 0.0, 1.0)
        return cfg.final_fraction + (1.0 - cfg.final_fraction) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))

    return factor


def _constant(cfg: Constant, steps: int) -> Callable[[Float[Array, ""]], Float[Array, ""]]:
    return lambda step: jnp.ones(())


_DECAYS: dict[type[Schedule], Callable] = {WarmupStableDecay: _stable_decay, WarmupCosine: _cosine, Constant: _constant}
