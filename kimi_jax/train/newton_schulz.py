"""Polynomials of the Newton-Schulz steps: X <- a X + b (X X^T) X + c (X X^T)^2 X acts on the singular values alone."""

from typing import NamedTuple

import numpy as np

ITERATIONS = 30  # of Remez's exchange; its extrema settle to double precision in a handful
NARROW = 1e-4  # half the width of an interval around 1 in which Taylor's polynomial is as good
SAFETY = 1.01  # rounding takes singular values over the end of an interval, where errors grow up to 26-fold per step


class Polynomial(NamedTuple):
    """a x + b x^3 + c x^5."""

    a: float
    b: float
    c: float


QUINTIC = Polynomial(3.4445, -4.7750, 2.0315)


def quintic(steps: int) -> list[Polynomial]:
    """One polynomial for all steps: steepest at 0, it leaves singular values between 0.68 and 1.2.

    Source: Moonlight, arXiv:2502.16982, section 2.
    """
    return [QUINTIC] * steps


def minimax(steps: int, smallest: float) -> list[Polynomial]:
    """Of each step the polynomial closest to 1 on the interval in which the step before left the singular values.

    But for `SAFETY`, by which the argument of each is divided, no other sequence of as many leaves those from
    `smallest` to 1 closer to 1.

    Source: Polar Express, arXiv:2505.16932, theorem 3.1; the factor is that of its remarks on finite precision.
    """
    polynomials, low, high = [], smallest, 1.0
    for _ in range(steps):
        (a, b, c), error = _closest_to_one(low, high)
        a, b, c = a / SAFETY, b / SAFETY**3, c / SAFETY**5
        polynomials.append(Polynomial(a, b, c))
        low, high = a * low + b * low**3 + c * low**5, 1.0 + error
    return polynomials


def _closest_to_one(low: float, high: float) -> tuple[Polynomial, float]:
    """The odd polynomial of degree 5 whose error on the interval takes its extreme values +-E at four points, and E."""
    if high - low < 2 * NARROW:
        return Polynomial(1.875, -1.25, 0.375), 0.0
    inner = np.array([0.75 * low + 0.25 * high, 0.25 * low + 0.75 * high])
    for _ in range(ITERATIONS):
        x = np.array([low, *inner, high])
        signs = np.array([1.0, -1.0, 1.0, -1.0])  # 1 - error, 1 + error, ...
        a, b, c, error = np.linalg.solve(np.stack([x, x**3, x**5, signs], 1), np.ones(4))
        inner = np.sqrt((-3 * b + np.array([-1.0, 1.0]) * np.sqrt(9 * b * b - 20 * a * c)) / (10 * c))
    return Polynomial(float(a), float(b), float(c)), float(error)
