"""The error measure behind every tolerance: what it passes, what it fails, what it tells."""

import numpy as np
import pytest

from pallas_kernels.testing import assert_all_close, assert_close, error_ratio, generator

WANT = np.array([3.0, -4.0, 0.0])


def test_error_ratio_is_relative_to_the_reference():
    assert error_ratio(WANT, WANT) == 0
    assert error_ratio(1.01 * WANT, WANT) == pytest.approx(0.01, rel=1e-6)
    assert error_ratio(1e6 * 1.01 * WANT, 1e6 * WANT) == pytest.approx(0.01, rel=1e-6)


def test_tolerance_is_a_limit():
    assert_close("x", 1.01 * WANT, WANT, 0.0101)
    with pytest.raises(AssertionError, match=r"x: error ratio 1.00e-02 > 1e-02, largest difference 4.00e-02"):
        assert_close("x", 1.01 * WANT, WANT, 0.0099)


def test_negligible_differences_pass():
    assert_close("x", np.array([1e-7]), np.array([0.0]), 1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_a_number_fails(bad):
    with pytest.raises(AssertionError, match="x: "):
        assert_close("x", np.array([3.0, bad, 0.0]), WANT, 1e9)


def test_shapes_must_agree():
    with pytest.raises(AssertionError, match=r"x: shape \(1, 3\), want \(3,\)"):
        assert_close("x", WANT[None], WANT, 1.0)


def test_all_failures_are_told():
    with pytest.raises(AssertionError, match=r"a: error ratio(.|\n)*c: error ratio"):
        assert_all_close({"a": 2 * WANT, "b": WANT, "c": 0 * WANT}, dict.fromkeys("abc", WANT), 1e-3)
    with pytest.raises(AssertionError, match="want"):
        assert_all_close({"a": WANT}, {"b": WANT}, 1e-3)


def test_generators_depend_on_seed_and_labels_alone():
    assert generator(0, "q").random() == generator(0, "q").random()
    assert len({generator(0, "q").random(), generator(1, "q").random(), generator(0, "k").random()}) == 3
