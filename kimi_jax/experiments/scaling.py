"""The scaling law of a family of runs: L = a C^-b by least squares of the logarithms, and what two of them say of
compute at equal loss, each with its confidence."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.special import stdtrit

UPPER = 0.975  # of the distribution lies below the end of a two-sided 95 % interval


@dataclass(frozen=True)
class PowerLaw:
    """L = a C^-b.

    Args:
      a: loss at C = 1.
      b: exponent, positive where more compute helps.
      a_interval, b_interval: 95 % confidence; (nan, nan) for two points, which leave nothing to judge by.
      covariance: [2, 2], of log a and b.
      freedom: points beyond two.
    """

    a: float
    b: float
    a_interval: tuple[float, float]
    b_interval: tuple[float, float]
    covariance: np.ndarray = field(repr=False)
    freedom: int

    def __call__(self, compute: np.ndarray) -> np.ndarray:
        return self.a * compute**-self.b


def fit_power_law(compute: Sequence[float], loss: Sequence[float]) -> PowerLaw:
    """Fits log L = log a - b log C.

    Args:
      compute: positive, at least two different values; any unit.
      loss: positive.

    Source: the form of Kimi Linear, arXiv:2510.26692, figure 5; the intervals are those of ordinary least squares.
    """
    x, y = np.log(compute), np.log(loss)
    design = np.stack([np.ones_like(x), -x], axis=1)
    (log_a, b), *_ = np.linalg.lstsq(design, y, rcond=None)
    freedom = len(x) - 2
    variance = np.sum((y - design @ (log_a, b)) ** 2) / freedom if freedom else np.nan
    covariance = variance * np.linalg.inv(design.T @ design)
    half_a, half_b = np.sqrt(np.diag(covariance)) * stdtrit(freedom, UPPER)
    return PowerLaw(
        a=float(np.exp(log_a)),
        b=float(b),
        a_interval=(float(np.exp(log_a - half_a)), float(np.exp(log_a + half_a))),
        b_interval=(float(b - half_b), float(b + half_b)),
        covariance=covariance,
        freedom=freedom,
    )


def compute_ratio(law: PowerLaw, other: PowerLaw, compute: float) -> tuple[float, float, float]:
    """How many times `compute` the `other` family needs for the loss that this one reaches with `compute`.

    Returns:
      The ratio and the ends of its 95 % interval, to first order in the errors of both fits; nan where one has none.
    """
    x = np.log(compute)
    log_loss = np.log(law.a) - law.b * x
    needed = (np.log(other.a) - log_loss) / other.b  # the logarithm of compute
    by_law, by_other = np.array([-1.0, x]) / other.b, np.array([1.0, -needed]) / other.b
    error = np.sqrt(by_law @ law.covariance @ by_law + by_other @ other.covariance @ by_other)
    half = error * stdtrit(law.freedom + other.freedom, UPPER)
    return tuple(float(np.exp(needed - x + shift)) for shift in (0.0, -half, half))
