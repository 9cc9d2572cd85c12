"""The Hopper kernels of KDA: their mirror and their lowering on a CPU, themselves on a GPU."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.kda import (
    LowerBoundGate,
    SoftplusGate,
    blocks_mosaic_gpu,
    chunk_kda,
    mirror,
    mosaic_gpu,
    prepare_mosaic_gpu,
    segments_mosaic_gpu,
)
from pallas_kernels.kda.cases import BY_NAME, GRID, Case, make_gate, make_inputs, run
from pallas_kernels.testing import assert_all_close, error_ratio

SERVED = [case for case in GRID if case.dtype != "float32" and max(case.key_dim, case.value_dim) <= 128]
NAMES = [case.name for case in SERVED]
QUICK = [case for case in SERVED if not case.name.startswith("B") or case.time in (500, 1500)]
on_gpu = pytest.mark.gpu


@functools.partial(jax.jit, static_argnums=0)
def _mirrored(case, inputs):
    scale = case.key_dim**-0.5 if case.scale is None else case.scale
    options = mosaic_gpu.Options(scale, case.normalize_qk, mirror.prepare, mirror.recur)
    gate = make_gate(case, inputs)
    return mosaic_gpu.padded(options, *inputs[:5], gate, inputs.initial_state, inputs.segment_ids)


def _exact(case, inputs):
    """The token recurrence in float64, without gradients."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, inputs)
        return [np.asarray(x) for x in jax.jit(run, static_argnums=(0, 2))(case, wide, "reference")]


def _check(case, got, inputs):
    names = ("o", "final_state")
    got, want = (dict(zip(names, x, strict=True)) for x in (got, _exact(case, inputs)))
    assert_all_close(got, want, {name: case.tolerance[name] for name in names})


@pytest.mark.parametrize("case", QUICK, ids=[case.name for case in QUICK])
def test_the_mirror_computes_the_recurrence(case):
    case = case.reduced()
    inputs = make_inputs(case)
    _check(case, _mirrored(case, inputs), inputs)


@pytest.mark.slow
@pytest.mark.parametrize("case", SERVED, ids=NAMES)
def test_the_mirror_computes_the_recurrence_in_full(case):
    inputs = make_inputs(case)
    _check(case, _mirrored(case, inputs), inputs)


def test_padding_may_hold_anything():
    case = BY_NAME["packed-one-token-documents"]
    inputs = make_inputs(case)
    padding = inputs.segment_ids == 0

    def poison(x):
        return np.where(padding.reshape(*padding.shape, *(1,) * (x.ndim - 2)), x.dtype.type(np.nan), x)

    poisoned = inputs._replace(**{name: poison(getattr(inputs, name)) for name in ("q", "k", "v", "g", "beta")})
    for got, want in zip(_mirrored(case, poisoned), _mirrored(case, inputs), strict=True):
        np.testing.assert_array_equal(got, want)
    assert not np.any(np.asarray(_mirrored(case, poisoned)[0])[padding])


LOWERED = {
    "softplus": Case("a", 1, 128, 2, 2, 128, 128, dtype="bfloat16", gate="softplus", normalize_qk=True),
    "bounded-packed-grouped": Case(
        "b", 2, 100, 1, 2, 128, 128, dtype="float16", gate="lower_bound", lengths=(30, 60), normalize_qk=True
    ),
    "log-decay": Case("c", 1, 64, 1, 1, 128, 128, dtype="bfloat16"),
    "narrow-keys": Case("d", 1, 70, 1, 1, 60, 128, dtype="bfloat16", gate="softplus"),
    "narrow-values": Case("e", 1, 64, 70, 70, 128, 30, dtype="bfloat16", gate="lower_bound", slope=False),
}


@pytest.mark.parametrize("case", LOWERED.values(), ids=LOWERED)
def test_every_configuration_lowers_for_cuda(case):
    inputs = make_inputs(case)
    gate = make_gate(case, inputs)

    def call(q, k, v, g, beta, state):
        options = mosaic_gpu.Options(0.1, case.normalize_qk)
        return mosaic_gpu.padded(options, q, k, v, g, beta, gate, state, inputs.segment_ids)

    lowered = jax.jit(call).trace(*inputs[:5], inputs.initial_state).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu") >= 2


def test_the_states_and_errors_kept_for_the_backward_lower_for_cuda():
    case = LOWERED["bounded-packed-grouped"]
    inputs = make_inputs(case)
    code = mosaic_gpu.pad_code(inputs.segment_ids, 2, 100, 28)
    pad = functools.partial(jax.tree.map, lambda x: jnp.pad(x, ((0, 0), (0, 28), *((0, 0),) * (x.ndim - 2))))
    options, gate = mosaic_gpu.Options(0.1, True), mosaic_gpu.gate_of_rows(make_gate(case, inputs), 2)

    def call(arrays, state):
        return mosaic_gpu.forward(options, *arrays, gate, state, code, keep=True)

    lowered = jax.jit(call).trace(pad(inputs[:5]), inputs.initial_state).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def _segmented(case, inputs, prepare, recur, segments):
    """(o, final state, states entering chunks) in `segments` pieces; slow decays, so that far chunks still matter."""
    B, T, HV, V = inputs.v.shape
    code = mosaic_gpu.pad_code(inputs.segment_ids, B, T, 0)
    steps = jnp.moveaxis(jnp.asarray(inputs.beta, jnp.float32), 2, 1).reshape(B * HV, T // 64, 64)
    steps = jnp.where(jnp.repeat(code, HV, 0) == prepare_mosaic_gpu.PADDING, 0.0, steps)
    gate = mosaic_gpu.gate_of_rows(make_gate(case, inputs), B)
    prepared = prepare(*inputs[:2], inputs.g, steps, code, gate, scale=0.1, normalize_qk=True)
    first = inputs.initial_state.reshape(B * HV, V, -1)
    o, final, (entering, _), _ = recur(prepared, inputs.v, steps, code, first, keep=True, split=1, segments=segments)
    return o, final, entering


SEGMENTED = Case("segmented", 1, 768, 1, 2, 64, 128, decay_divisor=100.0, lengths=(500, 250))
_mirror_segmented = jax.jit(
    lambda inputs, segments: _segmented(SEGMENTED, inputs, mirror.prepare, mirror.recur, segments), static_argnums=1
)


def test_segments_change_nothing_but_rounding():
    inputs = make_inputs(SEGMENTED)
    whole, cut = (_mirror_segmented(inputs, n) for n in (1, 4))
    # Measured: o 2.8e-4, final state 0, entering states 1.2e-4: float16 in the maps and in o.
    named = (dict(zip(("o", "final", "entering"), results, strict=True)) for results in (cut, whole))
    assert_all_close(*named, 5e-4)
    moved = _mirror_segmented(inputs._replace(initial_state=inputs.initial_state + 1), 4)[0]
    assert np.any(np.asarray(moved[:, 400:500] != cut[0][:, 400:500]))  # the first document still knows it
    np.testing.assert_array_equal(moved[:, 500:], cut[0][:, 500:])


@pytest.mark.parametrize(
    ("chunks", "blocks", "segments"),
    [(1024, 64, 1), (1024, 16, 8), (128, 16, 8), (64, 16, 1), (1021, 16, 1), (1024, 132, 1)],
)
def test_only_few_heads_and_long_sequences_are_cut(chunks, blocks, segments):
    assert segments_mosaic_gpu.count_segments(chunks, blocks) == segments


@pytest.mark.parametrize(
    ("chunks", "blocks", "filled"),
    [(2047, 16, 2048), (1563, 16, 1568), (1563, 64, 1563), (2048, 24, 2048), (99, 4, 99)],
)
def test_chunks_are_filled_up_only_where_that_halves_the_chain(chunks, blocks, filled):
    assert segments_mosaic_gpu.fill_chunks(chunks, blocks) == filled


@pytest.mark.parametrize("segments", [0, 1, 6, 7])
def test_maps_in_pairs_give_what_maps_in_turn_give(segments):
    rng, shapes = np.random.default_rng(0), ((2, 5, 4), (2, segments, 5, 4), (2, segments, 4, 4))
    first, added, applied = (rng.standard_normal(shape).astype(np.float32) / 3 for shape in shapes)
    want = [first]
    for n in range(segments):
        want.append(want[-1] @ applied[:, n] + added[:, n])
    got = segments_mosaic_gpu.entering_states(*map(jnp.asarray, (first, added, applied)))
    np.testing.assert_allclose(got, np.stack(want, 1), atol=1e-6)  # Measured: 1.2e-7.


def test_segments_lower_for_cuda():
    inputs = make_inputs(SEGMENTED)

    def call(inputs):
        return _segmented(SEGMENTED, inputs, prepare_mosaic_gpu.prepare, segments_mosaic_gpu.recur, 3)

    assert jax.jit(call).trace(inputs).lower(lowering_platforms=("cuda",)).as_text().count("mosaic_gpu") >= 3


class PlainBlocks:
    """`blocks_mosaic_gpu`, whose inline instructions the interpreter lacks, in plain JAX."""

    SIDE = blocks_mosaic_gpu.SIDE
    _einsum = staticmethod(functools.partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32))
    log2 = staticmethod(jnp.log2)

    def to_float32(x):
        return x.astype(jnp.float32)

    def exp2(x):
        return jnp.exp2(x.astype(jnp.float32)).astype(x.dtype)

    def flip(x):
        return x.reshape(8, 8, -1, 8).transpose(0, 3, 2, 1).reshape(x.shape)

    def mix(weights, flipped):
        x = PlainBlocks.flip(flipped).reshape(4, 16, -1)
        return PlainBlocks._einsum("wij,wjk->wik", weights.reshape(4, 16, 16), x).reshape(flipped.shape).astype(x.dtype)

    def _right(x, corner):
        """The block that meets each one: itself, or the one above the second of every two."""
        x = x.reshape(4, 2, 8, -1)
        return (jnp.stack([jnp.zeros_like(x[:, 0]), x[:, 0]], 1) if corner else x).reshape(8, 8, -1)

    def correlate(sums, queries, keys, *, corner):
        right = PlainBlocks._right(keys, corner)
        lefts = (x.reshape(right.shape) for x in (queries, keys))
        dots = (PlainBlocks._einsum("bik,bjk->bij", left, right) for left in lefts)
        return [total + dot.reshape(total.shape) for total, dot in zip(sums, dots, strict=True)]

    def multiply(a, b, *, corner=False):
        return PlainBlocks._einsum("bij,bjk->bik", a.reshape(8, 8, 8), PlainBlocks._right(b, corner)).reshape(a.shape)

    def _masked(x, mask):
        row, column = (jax.lax.broadcasted_iota(jnp.int32, (64, 64), axis) for axis in (0, 1))
        return jnp.where(mask(row, column), x, jnp.zeros_like(x))

    def spread(diagonal, corner):
        left = lambda i, j: (i // 8 == j // 8 + 1) & (i // 8 % 2 == 1)
        own = PlainBlocks._masked(jnp.tile(diagonal, (1, 8)), lambda i, j: i // 8 == j // 8)
        return own + PlainBlocks._masked(jnp.tile(corner, (1, 8)), left)

    def neighbours(x):
        return PlainBlocks._masked(x, lambda i, j: (i // 16 == j // 16 + 1) & (i // 16 % 2 == 1))

    def lower_left(x):
        return PlainBlocks._masked(jnp.tile(x, (1, 2)), lambda i, j: (i >= 32) & (j < 32))

    def store_sums(flipped, memory, *, row, column):
        x = PlainBlocks.flip(flipped).astype(jnp.float32)
        memory[pl.ds(row, 4), pl.ds(column, x.shape[1])] = x.reshape(4, 16, -1).sum(1)

    def load_row(memory, *, row, column, width):
        return jnp.repeat(memory[pl.ds(row, 4), pl.ds(column, width)], 16, axis=0)


@pytest.fixture
def interpreted(monkeypatch):
    """Runs the preparation kernel in Pallas's interpreter, as one block of one warpgroup.

    What the interpreter lacks is replaced: products with an operand in registers go through shared memory, inline
    instructions (of which no value depends) go, and accumulating in place becomes a sum.
    """
    wgmma, kernel, axis_index = plgpu.wgmma, plgpu.kernel, jax.lax.axis_index

    def staged(accumulator, a, b):
        if not isinstance(a, jax.Array):
            return wgmma(accumulator, a, b)

        def through_memory(memory):
            memory[...] = a
            wgmma(accumulator, memory, b)

        pl.run_scoped(through_memory, plgpu.SMEM(a.shape, a.dtype))

    def on_cpu(*args, num_threads, thread_name, **kwargs):
        return kernel(*args, **kwargs, interpret=plgpu.InterpretGPUParams())

    def sum_with_product(start, a, b):
        return start + prepare_mosaic_gpu.products([(a, b)], shape=start.shape)[0]

    monkeypatch.setattr(plgpu, "wgmma", staged)
    monkeypatch.setattr(plgpu, "kernel", on_cpu)
    monkeypatch.setattr(jax.lax, "axis_index", lambda name: jnp.int32(0) if name == "team" else axis_index(name))
    replaced = dict(TEAMS=1, MULTIPROCESSORS=1, hidden_zero=lambda: jnp.int32(0), meet=lambda: None, blocks=PlainBlocks)
    for name, value in replaced.items():
        monkeypatch.setattr(prepare_mosaic_gpu, name, value)
    monkeypatch.setattr(prepare_mosaic_gpu, "add_product", sum_with_product)


INTERPRETED = {  # key channels, gate, g's dtype, packed
    "packed-bounded": (64, LowerBoundGate, jnp.bfloat16, True),
    "log-decay": (64, None, jnp.float32, False),
    "softplus": pytest.param((128, SoftplusGate, jnp.bfloat16, False), marks=pytest.mark.slow),
}


@pytest.mark.parametrize("settings", INTERPRETED.values(), ids=INTERPRETED)
def test_the_interpreted_preparation_equals_its_mirror(settings, interpreted):
    K, gate, dtype, packed = settings
    draw = functools.partial(np.random.default_rng(0).standard_normal, dtype=np.float32)
    q, k = (jnp.asarray(draw((1, 64, 1, K)), jnp.bfloat16) for _ in range(2))
    g = jnp.asarray(-np.abs(draw((1, 64, 2, K))) if gate is None else draw((1, 64, 2, K)), dtype)
    code = np.zeros((1, 1, 64), np.int32)
    code[0, 0, 7], code[0, 0, 30:40] = prepare_mosaic_gpu.RESET, prepare_mosaic_gpu.PADDING
    beta = np.where(code == prepare_mosaic_gpu.PADDING, 0, 1 / (1 + np.exp(draw((2, 1, 64))))).astype(np.float32)
    gate = gate and gate(jnp.asarray([[0.5, 1.0]]), jnp.asarray(draw((1, 2, K)) - 2))
    arguments = (q, k, g, jnp.asarray(beta), jnp.asarray(code) if packed else None, gate)
    got, want = (m.prepare(*arguments, scale=0.1, normalize_qk=True) for m in (prepare_mosaic_gpu, mirror))
    # Measured: 3e-5 or less, from exp2 and from sums in another order.
    assert_all_close(got._asdict(), want._asdict(), 2e-4)


def test_refusals_name_the_reason():
    case = LOWERED["softplus"]
    q, k, v, g, *_ = make_inputs(case)
    assert mosaic_gpu.unserved(q, k, v, g, None) is None
    assert "float32" in mosaic_gpu.unserved(*(x.astype(np.float32) for x in (q, k, v)), g, None)
    assert "128" in mosaic_gpu.unserved(np.zeros((1, 1, 1, 256), q.dtype), k, v, g, None)
    assert "tile=32" in mosaic_gpu.unserved(q, k, v, g, 32)
    if jax.default_backend() != "gpu":
        assert "GPU" in mosaic_gpu.refuse(q, k, v, g, None, tile=None)


@pytest.mark.parametrize(("capability", "served"), [("8.0", False), ("9.0", True), ("10.0", False)])
def test_only_hopper_is_served(capability, served, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability=capability)])
    reason = mosaic_gpu.refuse(*make_inputs(LOWERED["softplus"])[:5], tile=None)
    assert reason is None if served else f"this GPU has {capability}" in reason


# ---------------------------------------------------------------- on a GPU


def _on_gpu(case, inputs):
    return jax.jit(run, static_argnums=(0, 2))(dataclasses.replace(case, tile=None), inputs, "mosaic_gpu")


@on_gpu
@pytest.mark.parametrize("case", SERVED, ids=NAMES)
def test_the_kernels_compute_the_recurrence(case):
    inputs = make_inputs(case)
    _check(case, _on_gpu(case, inputs), inputs)


@on_gpu
@pytest.mark.parametrize("name", ["grouped", "packed-aligned", "total-forgetting"])
def test_the_kernels_equal_their_mirror(name):
    case = BY_NAME[name]
    inputs = make_inputs(case)
    for got, want in zip(_on_gpu(case, inputs), _mirrored(case, inputs), strict=True):
        assert error_ratio(got, want) < 1e-3


@on_gpu
def test_the_kernels_join_segments_as_their_mirror_does():
    inputs = make_inputs(SEGMENTED)
    kernels = dict(prepare=prepare_mosaic_gpu.prepare, recur=segments_mosaic_gpu.recur)
    got = jax.jit(functools.partial(_segmented, SEGMENTED, **kernels, segments=4))(inputs)
    for x, want in zip(got, _mirror_segmented(inputs, 4), strict=True):
        assert error_ratio(x, want) < 1e-3


@on_gpu
def test_two_runs_are_bit_equal():
    case = dataclasses.replace(BY_NAME["grouped"], time=2048, heads=16, value_heads=48, key_dim=128, value_dim=128)
    inputs = make_inputs(case)
    for first, second in zip(_on_gpu(case, inputs), _on_gpu(case, inputs), strict=True):
        np.testing.assert_array_equal(first, second)


@on_gpu
@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta"])
def test_the_future_does_not_touch_the_past(name):
    case = dataclasses.replace(BY_NAME["grouped"], key_dim=128, value_dim=128)
    inputs = make_inputs(case)
    changed = np.array(getattr(inputs, name))
    changed[:, 77:] = changed[:, :76:-1]  # the same tokens in another order
    before, _ = _on_gpu(case, inputs)
    after, _ = _on_gpu(case, inputs._replace(**{name: changed}))
    np.testing.assert_array_equal(before[:, :77], after[:, :77])
    assert np.any(before[:, 77:] != after[:, 77:])


@on_gpu
def test_large_values_are_served_and_overflow_is_loud():
    case = dataclasses.replace(BY_NAME["grouped"], dtype="bfloat16", heads=1, value_heads=1)
    inputs = make_inputs(case)
    large = inputs._replace(v=(inputs.v * 1000).astype(inputs.v.dtype), initial_state=inputs.initial_state * 1000)
    _check(case, _on_gpu(case, large), large)
    too_large = inputs._replace(v=(inputs.v.astype(np.float32) * 1e6).astype(inputs.v.dtype))
    assert not np.isfinite(np.asarray(_on_gpu(case, too_large)[0], np.float32)).all()


@on_gpu
def test_auto_takes_the_kernels_and_gradients_are_defined():
    case = BY_NAME["packed-aligned"]
    inputs = make_inputs(case)

    def loss(v, implementation):
        o, _ = chunk_kda(
            *inputs[:2],
            v,
            *inputs[3:5],
            gate=make_gate(case, inputs),
            segment_ids=inputs.segment_ids,
            normalize_qk=True,
            implementation=implementation,
        )
        return jnp.sum(o.astype(jnp.float32) ** 2)

    assert "mosaic" in jax.jit(loss, static_argnums=1).lower(inputs.v, "auto").as_text()
    got, want = (jax.grad(loss)(jnp.asarray(inputs.v), name) for name in ("auto", "reference"))
    assert error_ratio(got, want) < case.tolerance["dv"]
