"""The decode step: its definition against the sequence, the Hopper kernel's lowering on a CPU, the kernel on a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.kda import reference, step_kda, step_mosaic_gpu
from pallas_kernels.kda.cases import Case, make_gate, make_inputs
from pallas_kernels.testing import assert_all_close, error_ratio

SMALL = Case("small", 3, 5, 2, 4, 16, 24, dtype="float32", gate="softplus", scale=None, normalize_qk=True)
_steps = jax.jit(step_kda, static_argnames=("scale", "normalize_qk", "implementation"))


def _call(inputs, state, tokens=slice(None), case=SMALL, **settings):
    arrays = (x[:, tokens] for x in inputs[:5])
    settings = {"gate": make_gate(case, inputs), "normalize_qk": True, "implementation": "reference"} | settings
    return jax.tree.map(np.asarray, _steps(*arrays, state, **settings))


def _pool(inputs, rows=7):
    """A state pool, and the rows of it that the sequences have: the second one is inactive."""
    pool = np.array(np.random.default_rng(1).standard_normal((rows, *inputs.initial_state.shape[1:])), np.float32)
    return pool, np.array([4, -1, 2], np.int32)


def test_several_tokens_equal_single_ones():
    inputs = make_inputs(SMALL)
    want, final = _call(inputs, inputs.initial_state)
    state, outputs = inputs.initial_state, []
    for t in range(SMALL.time):
        o, state = _call(inputs, state, t)
        outputs.append(o)
    np.testing.assert_array_equal(jnp.stack(outputs, axis=1), want)
    np.testing.assert_array_equal(state, final)


def test_slots_read_and_write_their_rows_alone():
    inputs = make_inputs(SMALL)
    pool, slots = _pool(inputs)
    o, new = _call(inputs, pool, slots=slots)
    want, final = _call(inputs, pool[slots])
    np.testing.assert_array_equal(o[[0, 2]], want[[0, 2]])
    np.testing.assert_array_equal(new[slots[[0, 2]]], final[[0, 2]])
    assert not np.any(o[1])
    others = [0, 1, 3, 5, 6]
    np.testing.assert_array_equal(new[others], pool[others])


def test_the_state_stays_at_the_accepted_tokens():
    inputs = make_inputs(SMALL)
    accepted = np.array([0, 2, 5], np.int32)
    o, state = _call(inputs, inputs.initial_state, accepted=accepted)
    np.testing.assert_array_equal(o, _call(inputs, inputs.initial_state)[0])
    for row, a in enumerate(accepted):
        want = _call(inputs, inputs.initial_state, slice(0, a))[1] if a else inputs.initial_state
        np.testing.assert_array_equal(state[row], want[row])


def test_drafts_are_verified_by_replaying_what_was_accepted():
    """Three drafts, of which two are accepted, then those two again before the next drafts: as if never drafted."""
    inputs = make_inputs(SMALL)
    none, two = (np.full(3, n, np.int32) for n in (0, 2))
    _, state = _call(inputs, inputs.initial_state, slice(0, 3), accepted=none)
    np.testing.assert_array_equal(state, inputs.initial_state)
    o, state = _call(inputs, state, slice(0, 5), accepted=two)
    want, straight = _call(inputs, inputs.initial_state, slice(0, 2))
    np.testing.assert_array_equal(o[:, :2], want)
    np.testing.assert_array_equal(state, straight)


def test_a_bfloat16_state_is_rounded_once_per_call():
    inputs = make_inputs(SMALL)
    narrow = inputs.initial_state.astype(jnp.bfloat16)
    o, state = _call(inputs, narrow)
    want, final = _call(inputs, narrow.astype(np.float32))
    assert state.dtype == jnp.bfloat16
    np.testing.assert_array_equal(o, want)
    np.testing.assert_array_equal(state, final.astype(jnp.bfloat16))


def test_wrong_slots_are_said():
    inputs = make_inputs(SMALL)
    with pytest.raises(ValueError, match="slots is float32, must be integer"):
        _call(inputs, inputs.initial_state, slots=np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"accepted has shape \(2,\), must be \(3,\)"):
        _call(inputs, inputs.initial_state, accepted=np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="state is int32, must be floating"):
        _call(inputs, np.zeros(inputs.initial_state.shape, np.int32))
    with pytest.raises(ValueError, match="state has shape"):
        _call(inputs, np.zeros((7, *inputs.initial_state.shape[1:]), np.float32))


# ---------------------------------------------------------------- the Hopper kernel

KERNEL = {
    "softplus": Case("a", 2, 1, 1, 2, 128, 128, dtype="bfloat16", gate="softplus", normalize_qk=True),
    "bounded-grouped-float16": Case("b", 3, 3, 1, 2, 64, 32, dtype="float16", gate="lower_bound", normalize_qk=True),
    "no-slope-float32": Case("c", 2, 2, 1, 1, 96, 48, dtype="float32", gate="lower_bound", slope=False),
    "log-decay-forgets": Case("d", 2, 2, 1, 1, 32, 16, dtype="bfloat16", masked=0.5, masked_decay=-1000.0),
}
# Error ratio to the definition in float32: the rounding of o (bfloat16, float16, float32), and of the state in float32.
ROUNDING = {"bfloat16": 3e-3, "float16": 4e-4, "float32": 2e-6}


def _kernel_call(case, inputs, state, module=step_mosaic_gpu, **settings):
    settings = {"slots": None, "accepted": None, "scale": 0.1, "normalize_qk": case.normalize_qk} | settings
    return module.step_kda(*inputs[:5], state, gate=make_gate(case, inputs), **settings)


def _check_kernel(case, got, want):
    tolerance = {"o": ROUNDING[case.dtype], "state": 5e-3 if want[1].dtype == jnp.bfloat16 else 2e-6}
    assert_all_close(*(dict(zip(("o", "state"), x, strict=True)) for x in (got, want)), tolerance)


def _pooled(case, inputs):
    """States of a pool, slots and accepted tokens: one sequence inactive, one that accepts nothing."""
    N = case.batch
    pool = np.random.default_rng(2).standard_normal((N + 3, *inputs.initial_state.shape[1:])).astype(np.float32)
    slots, accepted = np.arange(N + 1, 1, -1, dtype=np.int32), np.arange(N, dtype=np.int32) % (case.time + 1)
    slots[-1] = -1
    return pool, {"slots": slots, "accepted": accepted}


@pytest.mark.parametrize("case", KERNEL.values(), ids=KERNEL)
def test_the_kernel_lowers_for_cuda_and_updates_the_state_in_place(case):
    inputs = make_inputs(case)
    pool, settings = _pooled(case, inputs)
    for state, chosen in ((inputs.initial_state, {}), (jnp.asarray(pool, jnp.bfloat16), settings)):
        call = jax.jit(lambda state, chosen=chosen: _kernel_call(case, inputs, state, **chosen), donate_argnums=0)
        text = call.trace(state).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("custom_call @mosaic_gpu") == 1
        assert "output_operand_alias<output_tuple_indices = [1]" in text


@pytest.mark.parametrize("name", ["bounded-grouped-float16", "log-decay-forgets"])
def test_the_interpreted_kernel_equals_the_definition(name, monkeypatch):
    kernel = plgpu.kernel
    monkeypatch.setattr(plgpu, "kernel", functools.partial(kernel, interpret=plgpu.InterpretGPUParams()))
    case = KERNEL[name]
    inputs = make_inputs(case)
    pool, settings = _pooled(case, inputs)
    got, want = (jax.jit(functools.partial(_kernel_call, case, module=m, **settings))(inputs, pool) for m in MODULES)
    _check_kernel(case, got, want)
    untouched = sorted(set(range(len(pool))) - set(settings["slots"]))
    np.testing.assert_array_equal(got[1][np.array(untouched)], pool[np.array(untouched)])


MODULES = (step_mosaic_gpu, reference)


def test_refusals_name_the_reason():
    inputs = make_inputs(KERNEL["softplus"])
    arrays, state = inputs[:4], inputs.initial_state
    assert step_mosaic_gpu.unserved(*arrays, state) is None
    assert "float16" in step_mosaic_gpu.unserved(*arrays, state.astype(np.float16))
    assert "K=256" in step_mosaic_gpu.unserved(*arrays, np.zeros((2, 2, 128, 256), np.float32))
    assert "int8" in step_mosaic_gpu.unserved(*(x.astype(np.int8) for x in arrays), state)
    if jax.default_backend() != "gpu":
        assert "GPU" in step_mosaic_gpu.refuse(*arrays, inputs.beta, state)


# ---------------------------------------------------------------- on a GPU

on_gpu = pytest.mark.gpu
DECODING = {  # batch, heads, channels, tokens: the public cases of fla's tests, and ours
    "B16-H16-D128": (16, 16, 128, 1),
    "B32-H8-D64": (32, 8, 64, 1),
    "B7-H32-D128": (7, 32, 128, 1),
    "B4-H4-D128-T8": (4, 4, 128, 8),
}


@on_gpu
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", DECODING.values(), ids=DECODING)
@pytest.mark.parametrize("gate", ["softplus", "lower_bound", "none"])
def test_the_kernel_equals_the_definition(shape, gate, state_dtype):
    """In a pool three times as large, whose other rows hold 1e30 and keep every bit."""
    B, H, D, T = shape
    case = Case(f"step-{shape}", B, T, H, H, D, D, dtype="bfloat16", gate=gate, normalize_qk=True)
    inputs = make_inputs(case)
    slots = np.random.default_rng(3).permutation(3 * B)[:B].astype(np.int32)
    slots[1] = -1
    pool = np.full((3 * B, H, D, D), 1e30, np.float32)
    pool[slots[slots >= 0]] = inputs.initial_state[slots >= 0]
    pool, accepted = jnp.asarray(pool, state_dtype), np.arange(B, dtype=np.int32) % (T + 1)
    settings = {"slots": slots, "accepted": accepted if T > 1 else None}
    got, want = (jax.jit(functools.partial(_kernel_call, case, module=m, **settings))(inputs, pool) for m in MODULES)
    used = np.sort(slots[slots >= 0])
    _check_kernel(case, (got[0], got[1][used]), (want[0], want[1][used]))
    others = np.setdiff1d(np.arange(3 * B), used)
    np.testing.assert_array_equal(got[1][others], pool[others])


@on_gpu
@pytest.mark.parametrize("case", KERNEL.values(), ids=KERNEL)
def test_the_kernel_serves_every_configuration(case):
    inputs = make_inputs(case)
    for state, settings in ((inputs.initial_state, {}), _pooled(case, inputs)):
        call = (jax.jit(functools.partial(_kernel_call, case, module=m, **settings)) for m in MODULES)
        got, want = (f(inputs, state) for f in call)
        _check_kernel(case, got, want)


@on_gpu
def test_auto_takes_the_kernel_and_many_steps_equal_the_sequence():
    case = dataclasses.replace(KERNEL["softplus"], time=200, heads=2)
    inputs = make_inputs(case)
    gate = make_gate(case, inputs)
    step = jax.jit(functools.partial(step_kda, gate=gate, normalize_qk=True), donate_argnums=5)
    assert "mosaic" in step.lower(*(x[:, 0] for x in inputs[:5]), inputs.initial_state).as_text()
    state, outputs = jnp.asarray(inputs.initial_state), []
    for t in range(case.time):
        o, state = step(*(x[:, t] for x in inputs[:5]), state)
        outputs.append(o)
    settings = {"scale": 128**-0.5, "initial_state": inputs.initial_state, "segment_ids": None, "tile": None}
    want, final = reference.chunk_kda(*inputs[:5], gate=gate, normalize_qk=True, **settings)
    assert error_ratio(jnp.stack(outputs, 1), want) < ROUNDING["bfloat16"]
    assert error_ratio(state, final) < 1e-5
