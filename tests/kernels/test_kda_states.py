"""States inside a sequence are the final states of its prefixes, in every implementation."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from pallas_kernels.kda import chunk_kda, chunk_kda_with_states, mirror, mosaic_gpu
from pallas_kernels.kda.cases import BY_NAME, make_gate, make_inputs
from pallas_kernels.testing import error_ratio

CASE = dataclasses.replace(BY_NAME["grouped"], batch=1, time=200, heads=1, value_heads=2, key_dim=16, value_dim=16)
PACKED = dataclasses.replace(CASE, lengths=(64, 30, 50, 40))  # one starts with a block, one crosses into the next
EVERY = 64


def _settings(case, inputs):
    return dict(gate=make_gate(case, inputs), initial_state=inputs.initial_state, normalize_qk=True, scale=0.1)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _with_states(case, inputs, implementation):
    settings = _settings(case, inputs) | dict(segment_ids=inputs.segment_ids)
    return chunk_kda_with_states(*inputs[:5], every=EVERY, implementation=implementation, **settings)


@functools.partial(jax.jit, static_argnums=0)
def _through_the_kernels(case, inputs):
    options = mosaic_gpu.Options(0.1, True, mirror.prepare, mirror.recur)
    gate = make_gate(case, inputs)
    return mosaic_gpu.padded(options, *inputs[:5], gate, inputs.initial_state, inputs.segment_ids, every=EVERY)


@functools.partial(jax.jit, static_argnums=0)
def _prefixes(case, inputs):
    """o and the final states of the first 64, 128, 192 and all tokens, from the definition."""
    ids = np.ones((1, case.time), np.int32) if inputs.segment_ids is None else inputs.segment_ids

    def until(length):  # padding leaves the state alone: one shape for all
        kept = jax.numpy.where(np.arange(case.time) < length, ids, 0)
        return chunk_kda(*inputs[:5], segment_ids=kept, implementation="reference", **_settings(case, inputs))

    o, states = jax.lax.map(until, np.asarray([64, 128, 192, case.time]))
    return o[-1], states


def _check(case, inputs, got, limit):
    o, states = _prefixes(case, inputs)
    assert got[2].shape == (1, 3, 2, 16, 16)
    assert error_ratio(got[2][0], states[:3, 0]) < limit
    assert error_ratio(got[1], states[3]) < limit
    assert error_ratio(got[0], o) < max(limit, 3e-4)  # o is float16


@pytest.mark.parametrize("case", [pytest.param(CASE, marks=pytest.mark.slow), PACKED], ids=["one-document", "packed"])
@pytest.mark.parametrize("implementation", ["reference", "chunked", "kernels"])
def test_states_are_those_of_the_prefixes(case, implementation):
    inputs = make_inputs(case)
    if implementation == "kernels":
        got = _through_the_kernels(case, inputs)
    else:
        got = _with_states(case, inputs, implementation)
    # Measured: 0, 2e-7 and, of float16 operands and states, 4e-4.
    _check(case, inputs, got, 1e-3 if implementation == "kernels" else 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [CASE, PACKED], ids=["one-document", "packed"])
def test_the_kernels_return_the_states_of_the_prefixes(case):
    inputs = make_inputs(case)
    _check(case, inputs, _with_states(case, inputs, "mosaic_gpu"), 1e-3)


@pytest.mark.parametrize("every", [0, 32, 96, 256])
def test_blocks_that_do_not_fit_are_refused(every):
    inputs = make_inputs(CASE)
    with pytest.raises(ValueError, match=f"every={every} must be a multiple of 64 from 64 to T=200"):
        chunk_kda_with_states(*inputs[:5], every=every, **_settings(CASE, inputs))
