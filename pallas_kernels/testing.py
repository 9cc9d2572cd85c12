"""How far an implementation may be from its definition, and inputs that do not depend on the order of drawing."""

import zlib
from collections.abc import Mapping

import numpy as np
from jaxtyping import ArrayLike

NEGLIGIBLE = 1e-6  # largest absolute difference that passes whatever the ratio


def generator(seed: int, *labels: object) -> np.random.Generator:
    """Makes a random generator for one array: the same for the same seed and labels, whatever else is drawn."""
    return np.random.default_rng([seed, zlib.crc32(repr(labels).encode())])


def error_ratio(got: ArrayLike, want: ArrayLike) -> float:
    """Returns RMS(got - want) / RMS(want), computed in float64; nan if either holds one.

    Source: flash-linear-attention, fla/utils.py, get_err_ratio.
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(_rms(got - want) / (_rms(want) + 1e-8))


def _rms(x: np.ndarray) -> float:
    return np.sqrt(np.mean(np.square(x))) if x.size else 0.0


def assert_close(name: str, got: ArrayLike, want: ArrayLike, tolerance: float) -> None:
    """Fails unless `got` equals `want` within an error ratio of `tolerance`.

    Args:
      name: what is compared, for the message.
      got, want: arrays of one shape.
      tolerance: largest error ratio; differences up to 1e-6 pass in any case, a nan never does.

    Raises:
      AssertionError: with the name, the ratio and the largest absolute difference.
    """
    if failure := _failure(name, got, want, tolerance):
        raise AssertionError(failure)


def assert_all_close(
    got: Mapping[str, ArrayLike], want: Mapping[str, ArrayLike], tolerance: Mapping[str, float] | float
) -> None:
    """Compares arrays by name and reports every failure at once; `tolerance` is one number or one per name."""
    if got.keys() != want.keys():
        raise AssertionError(f"got {sorted(got)}, want {sorted(want)}")
    limits = {name: tolerance if isinstance(tolerance, float) else tolerance[name] for name in want}
    failures = [_failure(name, got[name], want[name], limits[name]) for name in want]
    if any(failures):
        raise AssertionError("\n".join(filter(None, failures)))


def _failure(name: str, got: ArrayLike, want: ArrayLike, tolerance: float) -> str | None:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        return f"{name}: shape {got.shape}, want {want.shape}"
    if np.isnan(got).any() or np.isnan(want).any():
        return f"{name}: {np.isnan(got).sum()} nan, {np.isnan(want).sum()} in the reference"
    largest = np.max(np.abs(got - want), initial=0.0)
    ratio = error_ratio(got, want)
    if largest <= NEGLIGIBLE or ratio <= tolerance:
        return None
    return f"{name}: error ratio {ratio:.2e} > {tolerance:.0e}, largest difference {largest:.2e}"
