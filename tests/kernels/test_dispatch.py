"""How an implementation is chosen: by name or the first that accepts, and every refusal is told."""

import logging
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Implementation, call
from pallas_kernels.kda import api as kda
from pallas_kernels.kda import chunk_kda, step_kda
from pallas_kernels.short_conv import short_conv
from pallas_kernels.ssd import api as ssd


def _never(x, **_):
    return f"x={x} is refused"


TABLE = {
    "fast": Implementation(lambda x, **_: ("fast", x), _never),
    "middle": Implementation(lambda x, **_: ("middle", x)),
    "slow": Implementation(lambda x, **_: ("slow", x)),
}


@pytest.mark.parametrize("table", [kda.IMPLEMENTATIONS, ssd.IMPLEMENTATIONS], ids=["kda", "ssd"])
def test_the_definitions_refuse_parts_of_sequences(table):
    refuse = table["reference"].refuse
    assert refuse(axis="context") == "axis='context': this form runs on one device"
    assert refuse(axis=None) is None


def test_auto_takes_the_first_that_accepts():
    assert call("op", TABLE, "auto", 3) == ("middle", 3)


def test_a_name_runs_that_one():
    assert call("op", TABLE, "slow", 3) == ("slow", 3)


def test_a_named_one_that_refuses_raises_its_reason():
    with pytest.raises(NotImplementedError, match=r"op: no implementation accepts .* fast: x=3 is refused"):
        call("op", TABLE, "fast", 3)


def test_all_refusals_are_told():
    table = {"a": TABLE["fast"], "b": TABLE["fast"]}
    with pytest.raises(NotImplementedError, match="a: x=3 is refused; b: x=3 is refused"):
        call("op", table, "auto", 3)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"implementation='fats' is unknown; choose auto, fast, middle, slow"):
        call("op", TABLE, "fats", 3)


def _kda_arguments(*time):
    return [np.zeros((1, *time, 2, 8), np.float32) for _ in range(4)] + [np.zeros((1, *time, 2), np.float32)]


def test_operators_name_unknown_implementations():
    with pytest.raises(ValueError, match="chunk_kda: implementation='triton' is unknown"):
        chunk_kda(*_kda_arguments(3), implementation="triton")
    with pytest.raises(ValueError, match="step_kda: implementation='chunked' is unknown"):
        step_kda(*_kda_arguments(), np.zeros((1, 2, 8, 8), np.float32), implementation="chunked")
    with pytest.raises(ValueError, match="short_conv: implementation='lax' is unknown"):
        short_conv(np.zeros((1, 3, 4), np.float32), np.zeros((4, 4), np.float32), implementation="lax")


def test_chunk_lengths_nobody_measured_are_refused():
    with pytest.raises(NotImplementedError, match=r"chunked: tile=24 must be one of \(16, 32, 64\)"):
        chunk_kda(*_kda_arguments(3), implementation="chunked", tile=24)


def test_the_gpu_kernels_refuse_a_cpu():
    """Naming a kernel never runs something else in silence."""
    with pytest.raises(NotImplementedError, match="mosaic_gpu: "):
        chunk_kda(*_kda_arguments(3), implementation="mosaic_gpu")


def test_a_gpu_without_kernels_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "_told", set())
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability="8.0")])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            chunk_kda(*_kda_arguments(3))
    assert len(caplog.messages) == 1
    assert "chunk_kda runs chunked, which is slower: mosaic_gpu: " in caplog.text and "has 8.0" in caplog.text


def test_a_cpu_has_no_kernels_to_miss(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "_told", set())
    assert call("op", TABLE, "auto", 3) == ("middle", 3)
    assert not caplog.messages


def test_equal_calls_within_a_program_are_traced_once_on_a_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    traced = []

    def scaled(pair, y, *, factor, bias=None):
        traced.append(factor)
        return factor * (pair["x"] + y) if bias is None else bias

    table = {"only": Implementation(scaled)}

    ones = np.ones(3, np.float32)

    def program(x, y):
        first = call("op", table, "auto", {"x": x}, y, factor=2)
        second = call("op", table, "auto", {"x": y}, first, factor=2)
        return call("op", table, "auto", {"x": second}, ones, factor=3, bias=None)  # a constant of the program

    gradient = jax.jit(jax.grad(lambda x, y: program(x, y).sum()))(ones, ones)
    np.testing.assert_array_equal(gradient, 12 * ones)
    assert traced == [2, 3]
    call("op", table, "auto", {"x": ones}, ones, factor=2)
    assert traced == [2, 3, 2], "outside of a program it runs as it is"
