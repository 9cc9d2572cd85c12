"""Kimi Delta Attention in plain JAX: the chunked form against the recurrence, values and every gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kda import LowerBoundGate, SoftplusGate, chunk_kda, step_kda
from pallas_kernels.kda.cases import BY_NAME, GRID, Case, exact, make_inputs, run, run_with_gradients
from pallas_kernels.kda.reference import L2_EPS, l2_normalize
from pallas_kernels.testing import assert_all_close, assert_close, generator

# Most of the time here is compilation: less of it, at the price of slower code.
_quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
_full = jax.jit(run_with_gradients, static_argnums=(0, 2))
_quick = _quick_jit(run_with_gradients, static_argnums=(0, 2))
_values = _quick_jit(run, static_argnums=(0, 2))

SMALL = Case("small", 2, 75, 2, 4, 16, 24, dtype="float32", gate="softplus", scale=None, normalize_qk=True, tile=16)
FLOAT32 = 2e-6  # error ratio between two float32 orders of the same sums; measured up to 6e-7
NAMES = ("o", "final_state", "dq", "dk", "dv", "dg", "dbeta", "dinitial_state")
# da_log and ddt_bias are sums over all tokens in which most cancels; measured up to 4e-6, 4e-5 and 1e-5.
ORDERS = dict.fromkeys(NAMES, 2e-5) | {"da_log": 2e-4, "ddt_bias": 1e-4}


def _check(case: Case, got: dict, want: dict) -> None:
    assert_all_close(got, want, {name: case.tolerance[name] for name in want})


@pytest.mark.parametrize("case", GRID, ids=[case.name for case in GRID])
def test_values_and_gradients(case):
    case = case.reduced()
    inputs = make_inputs(case)
    _check(case, _quick(case.call, inputs, "chunked"), exact(case, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("case", GRID, ids=[case.name for case in GRID])
def test_values_and_gradients_in_full(case):
    inputs = make_inputs(case)
    _check(case, _full(case.call, inputs, "chunked"), exact(case, inputs))


def test_float64_agrees_to_the_last_digits():
    """The formulas themselves, without rounding: measured at most 3e-14."""
    case = dataclasses.replace(SMALL, time=40)
    inputs = make_inputs(case)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(np.float64), inputs)
        got = _quick(case.call, wide, "chunked")
        assert_all_close(got, exact(case, inputs), 1e-12)


def test_chunk_length_does_not_matter():
    inputs = make_inputs(SMALL)
    short, long = (_quick(SMALL.call._replace(tile=tile), inputs, "chunked") for tile in (16, 64))
    assert_all_close(long, short, ORDERS)


def _slice_time(inputs, at):
    arrays = {n: getattr(inputs, n) for n in ("q", "k", "v", "g", "beta", "d_o", "segment_ids")}
    return inputs._replace(**{n: x[:, at] for n, x in arrays.items() if x is not None})


def test_halves_with_carried_state_equal_the_whole():
    """Values, and gradients that cross the seam through the state; the seam is not at a chunk's end."""
    inputs = make_inputs(dataclasses.replace(SMALL, time=50))
    first, second = _slice_time(inputs, slice(0, 25)), _slice_time(inputs, slice(25, None))
    whole = _quick(SMALL.call, inputs, "chunked")
    _, state = _values(SMALL.call, first, "chunked")
    after = _quick(SMALL.call, second._replace(initial_state=state), "chunked")
    before = _quick(SMALL.call, first._replace(d_final_state=after["dinitial_state"]), "chunked")
    joined = {n: jnp.concatenate([before[n], after[n]], axis=1) for n in ("o", "dq", "dk", "dv", "dg", "dbeta")}
    joined |= {n: before[n] + after[n] for n in ("da_log", "ddt_bias")}
    joined |= {"final_state": after["final_state"], "dinitial_state": before["dinitial_state"]}
    assert_all_close(joined, whole, ORDERS)


LENGTHS = (11, 1, 1, 30, 11, 11)


def _documents(inputs, lengths):
    ends = np.cumsum(lengths)
    return [_slice_time(inputs, slice(end - n, end)) for end, n in zip(ends, lengths, strict=True)]


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
def test_packed_documents_equal_separate_ones(implementation):
    case = dataclasses.replace(SMALL, batch=1, lengths=LENGTHS, time=sum(LENGTHS))
    inputs = make_inputs(case)
    packed = _quick(case.call, inputs, implementation)
    separate, last = [], len(LENGTHS) - 1
    for i, document in enumerate(_documents(inputs, LENGTHS)):
        state = inputs.initial_state if i == 0 else jnp.zeros_like(inputs.initial_state)
        d_final = inputs.d_final_state if i == last else jnp.zeros_like(inputs.d_final_state)
        document = document._replace(segment_ids=None, initial_state=state, d_final_state=d_final)
        separate.append(_quick(case.call, document, implementation))
    want = {n: jnp.concatenate([r[n] for r in separate], axis=1) for n in ("o", "dq", "dk", "dv", "dg", "dbeta")}
    want |= {n: sum(r[n] for r in separate) for n in ("da_log", "ddt_bias")}
    want |= {"final_state": separate[-1]["final_state"], "dinitial_state": separate[0]["dinitial_state"]}
    assert_all_close(packed, want, ORDERS)


def _rows_of_padding():
    """Rows of 40 tokens: padding outside, inside a document, between documents, everywhere, nowhere."""
    ids = np.zeros((5, 40), np.int32)
    ids[0, 7:30] = 3
    ids[1, :12], ids[1, 15:20], ids[1, 25:33] = 1, 1, 2
    ids[2, 10:11], ids[2, 12:13], ids[2, 39] = 4, 5, 4
    ids[4] = 1
    return ids


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
def test_padding_is_as_if_it_were_not_there(implementation):
    """Padding holds nan here; results equal those of the rows without it, and every gradient at padding is zero."""
    ids = _rows_of_padding()
    case = dataclasses.replace(SMALL, batch=len(ids), time=ids.shape[1])
    inputs = make_inputs(case)
    order = np.argsort(ids == 0, axis=1, kind="stable")
    per_token = ("q", "k", "v", "g", "beta", "d_o")

    def fill(x, value):
        return np.where((ids == 0).reshape(*ids.shape, *(1,) * (x.ndim - 2)), x.dtype.type(value), x)

    def reorder(x):
        return np.take_along_axis(np.asarray(x), order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)

    poisoned = inputs._replace(segment_ids=ids, **{n: fill(getattr(inputs, n), np.nan) for n in per_token})
    compact = {n: reorder(fill(getattr(inputs, n), 0)) for n in per_token}
    got = _quick(case.call, poisoned, implementation)
    want = _quick(case.call, inputs._replace(segment_ids=reorder(ids), **compact), "reference")
    per_token = ("o", "dq", "dk", "dv", "dg", "dbeta")
    for name in per_token:
        assert not np.any(np.asarray(got[name])[ids == 0]), name
    assert_all_close(got | {n: reorder(got[n]) for n in per_token}, want, ORDERS)


def test_rows_of_padding_return_the_initial_state():
    case = dataclasses.replace(SMALL, time=20)
    inputs = make_inputs(case)._replace(segment_ids=np.zeros((2, 20), np.int32))
    o, state = _values(case.call, inputs, "chunked")
    assert not o.any()
    np.testing.assert_array_equal(state, inputs.initial_state)


@pytest.mark.parametrize("at", [1, 16, 37, 74])
@pytest.mark.parametrize("changed", ["q", "k", "v", "g", "beta"])
def test_the_past_does_not_depend_on_the_future(changed, at):
    inputs = make_inputs(SMALL)
    before, _ = _values(SMALL.call, inputs, "chunked")
    future = getattr(inputs, changed).copy()
    future[:, at:] = 0.7 - 3 * future[:, at:]
    after, _ = _values(SMALL.call, inputs._replace(**{changed: future}), "chunked")
    np.testing.assert_array_equal(before[:, :at], after[:, :at])
    assert np.any(before[:, at:] != after[:, at:])


@pytest.mark.parametrize("document", range(len(LENGTHS)))
def test_documents_do_not_see_each_other(document):
    """Changing one document leaves every bit of the others alone: outputs and gradients per token."""
    case = dataclasses.replace(SMALL, batch=1, lengths=LENGTHS, time=sum(LENGTHS))
    inputs = make_inputs(case)
    inside = inputs.segment_ids[0] == document + 1
    changed = {}
    for name in ("q", "k", "v", "g", "beta", "d_o"):
        changed[name] = getattr(inputs, name).copy()
        changed[name][:, inside] = 0.3 - 2 * changed[name][:, inside]
    before, after = (_quick(case.call, x, "chunked") for x in (inputs, inputs._replace(**changed)))
    for name in ("o", "dq", "dk", "dv", "dg", "dbeta"):
        np.testing.assert_array_equal(np.asarray(before[name])[:, ~inside], np.asarray(after[name])[:, ~inside], name)
    assert np.all(np.any(np.asarray(before["o"])[:, inside] != np.asarray(after["o"])[:, inside], axis=(0, 2, 3)))


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
def test_a_closed_gate_forgets_everything(implementation):
    """With g = -1000 at one token, what follows equals a run that starts there from a zero state."""
    case = dataclasses.replace(SMALL, gate="none", time=40)
    inputs = make_inputs(case)
    g = inputs.g.copy()
    g[:, 21] = -1000
    whole, state = _values(case.call, inputs._replace(g=g), implementation)
    tail = _slice_time(inputs, slice(21, None))._replace(initial_state=jnp.zeros_like(inputs.initial_state))
    o, final = _values(case.call, tail, implementation)
    assert_close("o", whole[:, 21:], o, FLOAT32)
    assert_close("final_state", state, final, FLOAT32)


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-4, 1.0])
def test_norm_of_near_zero_vectors(scale):
    """x / sqrt(sum x^2 + 1e-6): zero stays zero, and the gradient is exact where eps matters."""
    x = scale * generator(0, "norm").standard_normal((3, 8))
    y, pull_back = jax.vjp(l2_normalize, jnp.asarray(x, jnp.float32))
    dy = generator(0, "dnorm").standard_normal((3, 8))
    inverse = 1 / np.sqrt(np.sum(x * x, -1, keepdims=True) + L2_EPS)
    want = inverse * dy - x * inverse**3 * np.sum(x * dy, -1, keepdims=True)
    assert_close("y", y, x * inverse, 1e-6)
    assert_close("dx", pull_back(jnp.asarray(dy, jnp.float32))[0], want, 1e-6)


def test_zero_queries_and_keys_under_the_norm():
    case = dataclasses.replace(SMALL, time=20)
    inputs = make_inputs(case)
    inputs = inputs._replace(q=inputs.q * 1e-4, k=np.where(np.arange(20)[None, :, None, None] % 3, 0, inputs.k * 1e-4))
    _check(case, _quick(case.call, inputs, "chunked"), exact(case, inputs))


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
def test_no_initial_state_is_a_zero_state(implementation):
    case = dataclasses.replace(SMALL, time=20)
    inputs = make_inputs(case)
    zero = inputs._replace(initial_state=np.zeros_like(inputs.initial_state))
    got = _values(case.call, inputs._replace(initial_state=None), implementation)
    for x, y in zip(got, _values(case.call, zero, implementation), strict=True):
        np.testing.assert_array_equal(x, y)


def test_steps_equal_the_sequence():
    inputs = make_inputs(dataclasses.replace(SMALL, time=9))
    gate = SoftplusGate(inputs.a_log, inputs.dt_bias)
    want, final = _values(SMALL.call, inputs, "chunked")
    step = jax.jit(functools.partial(step_kda, normalize_qk=True))
    state, outputs = inputs.initial_state, []
    for t in range(9):
        o, state = step(*(x[:, t] for x in inputs[:5]), state, gate=gate)
        outputs.append(o)
    assert_close("o", jnp.stack(outputs, axis=1), want, FLOAT32)
    assert_close("state", state, final, FLOAT32)


def test_the_recurrence_multiplies_float32_in_full():
    """Whatever the default of the device: a GPU would keep 10 bits of each factor."""
    inputs = make_inputs(dataclasses.replace(SMALL, gate="none", time=1))
    with jax.default_matmul_precision("default"):
        text = jax.jit(step_kda).lower(*(x[:, 0] for x in inputs[:5]), inputs.initial_state).as_text()
    assert text.count("stablehlo.dot_general") == text.count("precision = [HIGHEST, HIGHEST]") == 2


def test_output_dtypes():
    for dtype in ("bfloat16", "float16", "float32"):
        inputs = make_inputs(dataclasses.replace(SMALL, dtype=dtype, time=3))
        o, state = jax.eval_shape(functools.partial(run, SMALL.call, implementation="chunked"), inputs)
        assert (o.dtype, state.dtype) == (dtype, jnp.float32)


def test_vmap_equals_a_loop():
    case = dataclasses.replace(SMALL, time=20, lengths=(7, 9))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(make_inputs(case, seed) for seed in range(2)))
    batched = _quick_jit(jax.vmap(functools.partial(run_with_gradients, case.call, implementation="chunked")))(stacked)
    for seed in range(2):
        want = _quick(case.call, make_inputs(case, seed), "chunked")
        assert_all_close({n: x[seed] for n, x in batched.items()}, want, ORDERS)


def test_inside_scan_and_remat():
    """Two layers under `lax.scan` and `jax.checkpoint` equal two calls in a row."""
    case = dataclasses.replace(SMALL, time=20, value_heads=2, value_dim=16)
    inputs = make_inputs(case)
    q, k, v, g, beta = inputs[:5]
    layer = functools.partial(chunk_kda, normalize_qk=True, implementation="chunked", tile=16)
    gate = SoftplusGate(inputs.a_log, inputs.dt_bias)

    def scanned(v):
        body = jax.checkpoint(lambda x, _: (layer(q, k, x, g, beta, gate=gate)[0], None))
        return jnp.sum(jax.lax.scan(body, v, None, length=2)[0] ** 2)

    def plain(v):
        for _ in range(2):
            v = layer(q, k, v, g, beta, gate=gate)[0]
        return jnp.sum(v**2)

    got, want = (_quick_jit(jax.value_and_grad(f))(v) for f in (scanned, plain))
    assert_close("loss", got[0], want[0], FLOAT32)
    assert_close("dv", got[1], want[1], FLOAT32)


def test_backward_keeps_the_inputs_alone():
    inputs = make_inputs(dataclasses.replace(SMALL, time=64))
    gate = SoftplusGate(inputs.a_log, inputs.dt_bias)
    arrays = (*inputs[:5], gate, inputs.initial_state)

    def values(q, k, v, g, beta, gate, state):
        return chunk_kda(q, k, v, g, beta, gate=gate, initial_state=state, implementation="chunked", tile=16)

    _, pull_back = jax.eval_shape(lambda *a: jax.vjp(values, *a), *arrays)
    kept = sorted(x.shape for x in jax.tree.leaves(pull_back))
    assert kept == sorted(x.shape for x in jax.tree.leaves(arrays))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": np.zeros((1, 4, 2, 7))}, r"k has shape \(1, 4, 2, 7\), must be \(1, 4, 2, 8\)"),
        ({"beta": np.zeros((1, 4, 3))}, "beta has shape"),
        ({"q": np.zeros((1, 4, 3, 8)), "k": np.zeros((1, 4, 3, 8))}, "HV=4 must be a multiple of H=3"),
        ({"q": np.zeros((1, 0, 2, 8))}, "T=0 must be at least 1"),
        ({"q": np.zeros((4, 2, 8))}, r"q has shape \(4, 2, 8\), must be \(B, T, H, K\)"),
        ({"q": np.zeros((1, 4, 2, 8), np.int32)}, "q is int32, must be floating"),
        ({"k": np.zeros((1, 4, 2, 8), np.float32)}, "q is float64, k is float32, v is float64: must be of one dtype"),
        ({"initial_state": np.zeros((1, 4, 8, 8), np.int32)}, "initial_state is int32, must be floating"),
        ({"gate": "softplus"}, "gate='softplus' must be a SoftplusGate"),
        ({"initial_state": np.zeros((1, 4, 7, 8))}, "initial_state has shape"),
        ({"segment_ids": np.zeros((1, 5), np.int32)}, "segment_ids has shape"),
        ({"segment_ids": np.zeros((1, 4))}, "segment_ids is float64, must be integer"),
        ({"gate": SoftplusGate(None, np.zeros((4, 8)))}, "a_log is None, which only LowerBoundGate allows"),
        ({"gate": LowerBoundGate(None, np.zeros((4, 8)), 0.5)}, "bound=0.5 must be negative"),
        ({"gate": LowerBoundGate(np.zeros(2), np.zeros((4, 8)))}, "gate.a_log has shape"),
        ({"gate": SoftplusGate(np.zeros(4), np.zeros(32))}, "gate.dt_bias has shape"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    good = {"q": np.zeros((1, 4, 2, 8)), "k": np.zeros((1, 4, 2, 8)), "v": np.zeros((1, 4, 4, 8))}
    good |= {"g": np.zeros((1, 4, 4, 8)), "beta": np.zeros((1, 4, 4))}
    with pytest.raises(ValueError, match=message):
        chunk_kda(**(good | change))


def test_names_are_unique():
    assert len(BY_NAME) == len(GRID)
