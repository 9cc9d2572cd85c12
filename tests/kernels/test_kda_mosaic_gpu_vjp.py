"""The backward kernels of KDA: mirror, interpreter and lowering on a CPU, themselves on a GPU."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from lanes import Fragments, Machine, scalar

from pallas_kernels.kda import chunk_mosaic_gpu_vjp as kernels
from pallas_kernels.kda import mirror, mirror_vjp, mosaic_gpu
from pallas_kernels.kda import warp_mosaic_gpu_vjp as warp
from pallas_kernels.kda.cases import BY_NAME, GRID, Case, exact, make_gate, make_inputs
from pallas_kernels.kda.prepare_mosaic_gpu import FINE, FORGET, LOG2E, Prepared
from pallas_kernels.kda.segments_mosaic_gpu import recur_back
from pallas_kernels.testing import assert_all_close, error_ratio

SERVED = [case for case in GRID if case.dtype != "float32" and max(case.key_dim, case.value_dim) <= 128]
QUICK = ["grouped", "total-forgetting"]
on_gpu = pytest.mark.gpu
on_cpu = functools.partial(mosaic_gpu.Options, prepare=mirror.prepare, recur=mirror.recur, backward=mirror_vjp.backward)
on_device = functools.partial(mosaic_gpu.Options, backward=kernels.backward)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradients(make_options, case, inputs):
    """Values and gradients by name, as `cases.run_with_gradients` returns them."""
    names = [n for n in inputs._fields[:8] if getattr(inputs, n) is not None]
    options = make_options(case.key_dim**-0.5 if case.scale is None else case.scale, case.normalize_qk)

    def values(*arrays):
        x = inputs._replace(**dict(zip(names, arrays, strict=True)))
        return mosaic_gpu.padded(options, *x[:5], make_gate(case, x), x.initial_state, x.segment_ids)

    (o, final), pull_back = jax.vjp(values, *(getattr(inputs, n) for n in names))
    gradients = pull_back((jnp.asarray(inputs.d_o, o.dtype), jnp.asarray(inputs.d_final_state, final.dtype)))
    return {"o": o, "final_state": final} | {f"d{n}": d for n, d in zip(names, gradients, strict=True)}


@pytest.mark.parametrize("name", QUICK)
def test_the_mirror_computes_the_gradients(name):
    case = BY_NAME[name].reduced()
    inputs = make_inputs(case)
    assert_all_close(_gradients(on_cpu, case, inputs), exact(case, inputs), case.tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_the_mirror_computes_the_gradients_in_full(case):
    inputs = make_inputs(case)
    assert_all_close(_gradients(on_cpu, case, inputs), exact(case, inputs), case.tolerance)


def test_small_cotangents_keep_their_digits():
    case = BY_NAME["grouped"].reduced()
    inputs = make_inputs(case)
    small = inputs._replace(d_o=inputs.d_o * 1e-6, d_final_state=inputs.d_final_state * 1e-6)
    got, want = (_gradients(on_cpu, case, x) for x in (small, inputs))
    gradients = [name for name in want if name.startswith("d")]
    # Measured: 5e-3, the 16-bit cotangents of o themselves.
    assert_all_close({n: got[n] for n in gradients}, {n: want[n].astype(jnp.float32) * 1e-6 for n in gradients}, 1e-2)


# Slow decays, so that far segments still matter; a document starts inside the second of three segments.
SEGMENTED = Case(
    "segmented", 1, 384, 1, 2, 64, 64, dtype="bfloat16", gate="softplus", gate_offset=-6.0, lengths=(200, 150),
    normalize_qk=True,
)  # fmt: skip


def _in_segments(make_options, number: int):
    return functools.partial(make_options, count_segments=lambda *_, **__: number)


def _check_documents(options, inputs, got):
    """A change in one document of SEGMENTED reaches the segments before, and no bit of the other document."""
    for changed, other in ((slice(130, 200), slice(200, None)), (slice(260, 350), slice(0, 200))):
        arrays = {name: np.array(getattr(inputs, name)) for name in ("d_o", "v")}
        for x in arrays.values():
            x[:, changed] = x[:, changed][:, ::-1]
        results = _gradients(options, SEGMENTED, inputs._replace(**arrays))
        for name in ("o", "dq", "dk", "dv", "dg", "dbeta"):
            np.testing.assert_array_equal(got[name][:, other], results[name][:, other])
        before = slice(0, 128) if changed.start < 200 else slice(200, 256)
        assert np.any(got["dv"][:, before] != results["dv"][:, before])


def test_segments_of_time_compute_the_gradients_and_keep_documents_apart():
    inputs, three = make_inputs(SEGMENTED), _in_segments(on_cpu, 3)
    got = _gradients(three, SEGMENTED, inputs)
    # Measured: 2.1e-3 or less (da_log 1.4e-3), as with one segment.
    assert_all_close(got, exact(SEGMENTED, inputs), SEGMENTED.tolerance)
    _check_documents(three, inputs, got)


@pytest.mark.slow
def test_chunks_filled_up_with_padding_change_nothing(monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "fill_chunks", lambda chunks, blocks: chunks + 2)
    case = BY_NAME["grouped"].reduced()
    inputs = make_inputs(case)
    got = _gradients(functools.partial(on_cpu), case, inputs)  # a key of its own in the cache of compiled functions
    assert_all_close(got, exact(case, inputs), case.tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("of_all", [True, False], ids=["inputs and cotangents", "cotangents"])
def test_members_are_cut_like_one_model(of_all):
    """Six segments for the rows of one model, in a loop that is traced before models are joined, three for two's."""
    few = functools.partial(on_cpu, count_segments=lambda chunks, blocks, **_: 6 if blocks == 2 else 3)
    inputs = make_inputs(SEGMENTED)
    values, cotangents = (jnp.stack([jnp.asarray(x), -2 * jnp.asarray(x)]) for x in (inputs.v, inputs.d_o))
    gate = make_gate(SEGMENTED, inputs)

    def layers(v):
        def layer(v, _):
            o, _ = mosaic_gpu.padded(few(0.1, True), *inputs[:2], v, *inputs[3:5], gate, None, None)
            return o.astype(v.dtype), None

        return jax.lax.scan(layer, v, None, length=2)[0]

    pull = jax.jit(lambda v, d_o: jax.vjp(layers, v)[1](d_o)[0])
    together = jax.jit(jax.vmap(pull, in_axes=(0 if of_all else None, 0)))(values if of_all else values[0], cotangents)
    for i, got in enumerate(together):
        want = pull(values[i if of_all else 0], cotangents[i])
        assert error_ratio(got, want) < 1e-6  # measured 0; 4.6e-2 where the gradients are cut unlike the states


@pytest.fixture
def interpreted(monkeypatch):
    """Runs the chunk kernel on a CPU, its warpgroups as threads, with a detector of races between them."""

    def products(*groups, shape=None):
        value = lambda x: x if isinstance(x, jax.Array) else x[...]
        multiply = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
        return [sum(multiply(value(a), value(b)) for a, b in pairs) for pairs in groups]

    def fine_levels(g, k, q, high, low, tables, part, *sums):
        *sums, dg = _fine_levels(g[...], k[...], q[...], *tables, part, *sums)
        columns = pl.ds(warp.PART * part, warp.PART)
        high[:, columns] = dg.astype(high.dtype)
        low[:, columns] = (dg - dg.astype(high.dtype).astype(dg.dtype)).astype(high.dtype)
        return sums

    def column_sums(x, out, start=0):
        out[...] = start + x.reshape(4, 16, -1).sum(1).reshape(out.shape)

    kernel = functools.partial(plgpu.kernel, interpret=plgpu.InterpretGPUParams(detect_races=True))
    monkeypatch.setattr(plgpu, "kernel", kernel)
    stand_ins = dict(
        products=products, hidden_zero=lambda: jnp.int32(0), meet=plgpu.commit_smem, MULTIPROCESSORS=2,
        fine_tables=lambda *refs: [ref[...] for ref in refs], fine_levels=fine_levels,
        column_sums=column_sums, add_column_sums=lambda x, out: column_sums(x, out, out[...]),
        triangle=_triangle, later_in_document=_later_in_document, level_triangle=_level_triangle,
        level_pairs=_level_pairs, by_block=_by_block,
        add_level=_add_level, fold=_fold, store_diagonal=_store_diagonal,
        cut=lambda x: tuple(jnp.split(x, 64 // warp.PART, 1)), join=lambda *parts: jnp.concatenate(parts, 1),
        fast_exp2=jnp.exp2, fast_log2=lambda x: jax.lax.log(x) * LOG2E, fast_rsqrt=jax.lax.rsqrt,
    )  # fmt: skip
    # One dtype, or tiles seen through two would all count as races.
    for name, value in (stand_ins | dict(bf16=jnp.float16)).items():
        monkeypatch.setattr(kernels, name, value)


def _fine_levels(g, k, q, da, dl, beta, part, dq, up, down):
    """What `warp.fine_levels` computes, with its roundings: dq, up, down, and dg in one piece."""
    width = warp.PART
    g, k, q = (jax.lax.dynamic_slice_in_dim(x, width * part, width, 1) for x in (g, k, q))
    row, column = _indices()
    multiply = functools.partial(jnp.dot, preferred_element_type=jnp.float32, precision="highest")
    dg = q * dq + k * (beta.astype(jnp.float16).astype(jnp.float32)[:, None] * up - down)
    for n in range(FINE):
        start, second = row >> n << n, (row & (1 << n)) != 0
        span = jnp.where(second, (start <= column) & (column <= row), (row < column) & (column < start + (1 << n)))
        factor = jnp.exp2(multiply(span.astype(jnp.float32), g.astype(jnp.float32)))
        keys, queries = (x.astype(jnp.float16) * factor.astype(jnp.float16) for x in (k, q))
        pair, second = (row ^ column) >> n == 1, second[:, :width]
        read = jnp.where(second, keys * beta.astype(jnp.float16)[:, None], keys)
        of_pairs = lambda x, y, pair=pair: multiply(jnp.where(pair, x, 0).astype(jnp.float32), y.astype(jnp.float32))
        by_a, by_l = of_pairs(da, jnp.where(second, queries, keys)), of_pairs(dl, read)
        dq, up = dq + jnp.where(second, factor * by_a, 0), up + jnp.where(second, factor * by_l, 0)
        down = down + jnp.where(second, 0, factor * (by_a + by_l))
        dg = dg + jnp.where(second, queries * by_a + read * by_l, -keys * (by_a + by_l))
    return dq, up, down, dg


def _indices():
    """Row and column numbers, [64, 64]."""
    return (jax.lax.broadcasted_iota(jnp.int32, (64, 64), axis) for axis in range(2))


def _triangle(*, lower, inclusive, dtype=jnp.float16):
    row, column = _indices()
    return ((column < row + inclusive) == lower).astype(dtype)


def _later_in_document(codes):
    codes = codes[...]
    return _triangle(lower=False, inclusive=False) * (codes[:, None] == codes[None]).astype(jnp.float16)


def _fold(lower, upper, factor):
    return (factor * jnp.where(_triangle(lower=True, inclusive=False) == 1, lower, upper)).astype(jnp.float16)


def _store_diagonal(x, factor, out):
    out[...] = factor * jnp.diag(x)


def _level_triangle(n):
    row, column = _indices()
    return (_by_block(n, column <= row, row < column) & (column >> n == row >> n)).astype(jnp.float16)


def _level_pairs(x, n):
    row, column = _indices()
    x = jnp.where((row ^ column) >> n == 1, x, 0)
    return x, _by_block(n, 0 * x, x), _by_block(n, x, 0 * x)


def _by_block(n, second, first):
    row, _ = _indices()
    return jnp.where((row >> n & 1) == 1, second, first)


def _add_level(n, factor, x, dq, up, down):
    x, y = (factor.astype(jnp.float32) * x for x in x)
    return dq + _by_block(n, x, 0 * x), up + y, down + _by_block(n, 0 * x, x)


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    for name, value in machine.names.items():
        monkeypatch.setattr(warp, name, value)
    return machine


@pytest.mark.parametrize("part", [0, 1, 2])
def test_the_instructions_of_a_warp_compute_the_fine_levels(part, machine):
    rng = np.random.default_rng(part)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float16).astype(np.float32)
    tiles, beta = [-np.abs(draw(64, 64)), *(draw(64, 64) for _ in range(4))], np.abs(draw(64))
    sums = [draw(64, warp.PART) for _ in range(3)]
    places = range(0, 8 * 8192, 8192)
    for place, x in zip(places, tiles, strict=False):
        machine.write_tile(place, x)
    machine.write_f32(places[5], beta)
    words = warp._tables(*places[3:6])
    tables = [Fragments.of_words(part) for part in (words[:16], words[16:])]
    got = warp._fine(None, *places[:3], *places[6:], *tables, scalar(part), *map(Fragments.of, sums))
    *want, dg = _fine_levels(*tiles, beta, part, *sums)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x.array(), y, atol=2e-5)  # Measured: 2e-6.
    high, low = (machine.read_tile(place, jnp.bfloat16).astype(np.float32) for place in places[6:])
    got = (high + low)[:, warp.PART * part : warp.PART * (part + 1)]
    np.testing.assert_allclose(got, dg, rtol=2**-16, atol=1e-4)


def test_the_instructions_of_a_warp_make_triangles(machine):
    one = 0x3C003C00
    array = lambda words: Fragments.of_words(words).array()
    for lower, inclusive in itertools.product((True, False), repeat=2):
        full = (lambda warp, block: block < warp) if lower else (lambda warp, block: warp < block)
        got = array(warp._triangle(one, lower, inclusive, full))
        np.testing.assert_array_equal(got, _triangle(lower=lower, inclusive=inclusive))
    codes = np.repeat(np.float32([-2, 1, -1, 1, 0, 2]), [10, 1, 30, 1, 17, 5])
    machine.write_f32(4096, codes)
    np.testing.assert_array_equal(array(warp._same_document(np.full(128, 4096))) != 0, codes[:, None] == codes)
    for level in (4, 5):
        np.testing.assert_array_equal(array(warp._level_triangle(scalar(level))), _level_triangle(level))
        x = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float16)
        got = warp._level_pairs(Fragments.of(x.astype(np.float32)).words(), scalar(level))
        for words, want in zip(got, _level_pairs(x, level), strict=True):
            np.testing.assert_array_equal(array(words), want)


def test_the_instructions_of_a_warp_fold_two_arrays(machine):
    lower, upper = np.random.default_rng(0).standard_normal((2, 64, 64)).astype(np.float32)
    got = warp._fold(Fragments.of(lower), Fragments.of(upper), scalar(0.5))
    want = (np.tril(lower, -1) + np.triu(upper)) / 2
    np.testing.assert_array_equal(Fragments.of_words(got).array(), want.astype(np.float16))
    warp._store_diagonal(None, Fragments.of(lower), scalar(0.5), 0)
    np.testing.assert_array_equal(machine.read_f32(0, 64), np.diag(lower) / 2)


def test_the_instructions_of_a_warp_sum_columns(machine):
    x = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    for times in (1, 2):
        warp._column_sums(None, Fragments.of(x), 0, add=times == 2)
        got = machine.read_f32(0, 4 * 64).reshape(4, 64)
        np.testing.assert_allclose(got, times * x.reshape(4, 16, 64).sum(1), atol=1e-5)  # Measured: 1e-6.


@pytest.mark.parametrize("K", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_the_interpreted_chunk_kernel_equals_its_mirror(K, interpreted, capfd, monkeypatch):
    """Four chunks for each of two CTAs: every buffer is used again, and again after a prefetch."""
    if K == 128:  # the detector takes two warpgroups in parts of one union for a race: here views share no memory
        monkeypatch.setattr(plgpu, "RefUnion", lambda *views: list(views))
    case = dataclasses.replace(
        BY_NAME["packed-aligned"], batch=1, time=256, heads=1, value_heads=2, key_dim=K, value_dim=K,
        dtype="float16", gate="softplus", lengths=(70, 1, 100, 64),
    )  # fmt: skip
    inputs = make_inputs(case)
    gate = mosaic_gpu.gate_of_rows(make_gate(case, inputs), 1)
    code = mosaic_gpu.pad_code(inputs.segment_ids, 1, 256, 0)
    options = on_cpu(0.1, True)
    first = (*inputs[:5], gate, inputs.initial_state, code)
    prepared, beta, h, r, _ = mosaic_gpu.forward(options, *map(_arrays, first), keep=True)[2]
    arguments = (*map(_arrays, (*inputs[:2], inputs.g)), beta, code, gate, prepared, h, r, None)
    cotangents = jnp.asarray(inputs.d_o), jnp.asarray(inputs.d_final_state), jnp.full((1, 2), 0.25)
    with pytest.MonkeyPatch.context() as patch:
        # The interpreter has no warp-specialised pipeline.
        patch.setattr(kernels, "recur_back", functools.partial(recur_back, run=mirror_vjp.reverse_chain))
        got, want = (m.backward(*arguments, *cotangents, scale=0.1, normalize_qk=True) for m in (kernels, mirror_vjp))
    assert "RACE" not in "".join(capfd.readouterr())
    # Measured: 3e-4 or less, the rounding of the results; a_log, a sum of both signs, 2e-3.
    tolerance = dict.fromkeys(want._fields, 1e-3) | {"a_log": 5e-3}
    assert_all_close(got._asdict(), want._asdict(), tolerance)


def _arrays(x):
    return jax.tree.map(jnp.asarray, x)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_given_log_decay_is_rounded_as_in_the_forward_kernel(dtype):
    """In one step from float32 to float16, whatever its dtype."""
    g = jnp.asarray([-0.3, -1e-3, -7.7, -1e4, -5e4], dtype)
    want = np.maximum(np.asarray(g, np.float32) * np.float32(LOG2E), FORGET).astype(np.float16)
    np.testing.assert_array_equal(kernels._base2(g), want)


LOWERED = {  # key channels, gate, dtype, packed
    "softplus": (128, "softplus", "bfloat16", False),
    "packed-bounded": (64, "lower_bound", "float16", True),
    "log-decay": (64, "none", "bfloat16", False),
}


@pytest.mark.parametrize("settings", LOWERED.values(), ids=LOWERED)
def test_lowers_for_hopper(settings):
    K, gate, dtype, packed = settings
    case = dataclasses.replace(
        BY_NAME["packed-aligned"], batch=1, time=128, heads=2, value_heads=4, key_dim=K, value_dim=K, dtype=dtype,
        gate=gate, lengths=(70, 30) if packed else (),
    )  # fmt: skip
    traced = _gradients.trace(on_device, case, make_inputs(case))
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("mosaic_gpu_v2") >= 4


def test_segments_lower_for_hopper():
    half, tokens = (jax.ShapeDtypeStruct(s, d) for s, d in (((2, 6, 64, 64), jnp.float16), ((2, 6, 64), jnp.float32)))
    do, states = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 384, 2, 64), (2, 64, 64)))
    arguments = Prepared(*[half] * 5, tokens), tokens, tokens, do.update(dtype=jnp.bfloat16), states
    traced = jax.jit(recur_back).trace(*arguments, jax.ShapeDtypeStruct((2, 3, 64, 64), jnp.float32))
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("mosaic_gpu_v2") >= 2


# ---------------------------------------------------------------- on a GPU


@on_gpu
@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_the_kernels_compute_the_gradients(case):
    inputs = make_inputs(case)
    assert_all_close(_gradients(on_device, case, inputs), exact(case, inputs), case.tolerance)


WIDE = dataclasses.replace(  # one document, states in and out, blocks that share a head
    SEGMENTED, name="segmented-wide", batch=2, time=448, key_dim=128, value_dim=128, lengths=(), gate="lower_bound",
    slope=False,
)  # fmt: skip


@on_gpu
@pytest.mark.parametrize("case", [SEGMENTED, WIDE], ids=lambda case: case.name)
def test_segments_of_time_compute_the_gradients_on_a_gpu(case):
    inputs, cut = make_inputs(case), _in_segments(on_device, 3 if case.lengths else 7)
    first, second = (_gradients(cut, case, inputs) for _ in range(2))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    assert_all_close(first, exact(case, inputs), case.tolerance)
    if case is SEGMENTED:
        _check_documents(cut, inputs, first)


@on_gpu
@pytest.mark.parametrize("K", [64, 128])
def test_two_runs_are_bit_equal_and_equal_the_mirror_when_every_block_visits_many_chunks(K):
    """And when heads are so many that one block of the chain has both halves of the values."""
    case = dataclasses.replace(
        BY_NAME["grouped"], batch=1, time=2048, heads=24, value_heads=72, key_dim=K, value_dim=K, gate="softplus"
    )
    inputs = make_inputs(case)
    first, second, want = (_gradients(options, case, inputs) for options in (on_device, on_device, on_cpu))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    assert_all_close(first, want, 5e-3)
