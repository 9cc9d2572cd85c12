"""The Hopper kernels of latent attention: the blocks they visit, their glue, their lowering; results on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mla import api, backward_mosaic_gpu, cudnn, forward_mosaic_gpu, mosaic_gpu, xla
from pallas_kernels.mla.forward_mosaic_gpu import Result
from pallas_kernels.mla.spans import Span, key_spans, query_spans
from pallas_kernels.mla.tiles import LOG2E
from pallas_kernels.testing import error_ratio

NAMES = ("q_nope", "q_shared", "k_nope", "k_shared", "v")
INTERPRETED_TOLERANCE = 4e-3  # bfloat16 operands and results; measured 1.9e-3 (o), up to 3.2e-3 (gradients)
MIRROR_TOLERANCE = 2e-6  # measured 4.3e-7


def documents(B, T, longest, seed=0, gaps=True):
    """Random documents, int32 [B, T]; with padding at the start, between and inside documents, and at the end."""
    rng, ids = np.random.default_rng(seed), np.zeros((B, T), np.int32)
    for b in range(B):
        t, number = (int(rng.integers(0, longest // 4)) if gaps else 0), 1
        while t < T:
            n = int(rng.integers(1, longest))
            ids[b, t : t + n] = number
            t, number = t + n + (int(rng.integers(0, longest // 4)) if gaps and rng.random() < 0.3 else 0), number + 1
    if gaps:
        ids[-1, T // 2 : T // 2 + 3] = 0
        ids[-1, -T // 10 :] = 0
    return ids


def draw(B, T, H, N, P, V, dtype=jnp.float32, seed=0):
    """(dy, q_nope, q_shared, k_nope, k_shared, v)."""
    rng = np.random.default_rng(seed)
    shapes = (B, T, H, V), (B, T, H, N), (B, T, H, P), (B, T, H, N), (B, T, P), (B, T, H, V)
    return [jnp.asarray(rng.standard_normal(shape, np.float32)).astype(dtype) for shape in shapes]


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(attention, dy, arrays, ids):
    def run(*arrays):
        return attention(*arrays, segment_ids=ids, key_segment_ids=ids, query_offset=0)

    o, pull_back, peak = jax.vjp(run, *arrays, has_aux=True)
    return o, peak, pull_back(dy)


def scaled(module, scale=0.1):
    return functools.partial(module.mla_attention, scale=scale)


# Blocks.


@pytest.mark.parametrize("T, rows, columns", [(37, 8, 8), (37, 8, 4), (64, 4, 8), (37, 16, 12)])
def test_spans_cover_what_is_seen_and_leave_out_the_mask_only_where_all_is(T, rows, columns):
    for ids in (None, documents(3, T, 25)):
        given = None if ids is None else jnp.asarray(ids)
        numbers = np.ones((1, T), int) if ids is None else ids
        tables = np.asarray(key_spans(given, T, rows, columns)), np.asarray(query_spans(given, T, rows, columns))
        for b, row in enumerate(numbers):
            seen = (row[:, None] == row) & (row != 0) & np.tri(T, dtype=bool)
            for table, visible in zip(tables, (seen, seen.T), strict=True):
                for n, bounds in enumerate(table[b]):
                    strip = visible[n * rows : (n + 1) * rows]
                    check_span(Span(*map(int, bounds)), strip, columns)


def check_span(span, strip, columns):
    blocks = [int(span.block(np.int32(step))) for step in range(span.num_blocks)]
    assert sorted(blocks) == list(range(span.first, span.end))
    needed = [j for j in range(-(-strip.shape[1] // columns)) if strip[:, j * columns : (j + 1) * columns].any()]
    assert set(needed) <= set(blocks)
    for block in blocks[span.num_masked :]:
        assert strip[:, block * columns : (block + 1) * columns].all()


def test_documents_bound_the_work():
    """Sixteen documents of 64 tokens in blocks of 16: 10 pairs of blocks each, of 2080 without documents."""
    ids = jnp.repeat(jnp.arange(1, 17, dtype=jnp.int32), 64)[None]
    span = Span(*np.moveaxis(np.asarray(key_spans(ids, 1024, 16, 16)), -1, 0))
    assert (span.num_blocks.sum(), span.num_masked.sum()) == (160, 64)


# Glue: the kernels replaced by what they compute, block by block.


def visible_pairs(shape, spans, ids, rows, columns, *, by_key):
    """What the masks of a kernel let through, [B, T, T] by query and key, from its own table."""
    T = shape.tokens
    spans = np.broadcast_to(np.asarray(spans), (shape.batch, *spans.shape[1:]))
    one, other = (np.asarray(i) for i in (ids or (np.ones((shape.batch, shape.padded), int),) * 2))
    mask = np.tri(T, dtype=bool) & (one[:, :T, None] == other[:, None, :T])
    mask = mask.swapaxes(1, 2) if by_key else mask
    out = np.zeros_like(mask)
    for b, n in np.ndindex(spans.shape[:2]):
        span = Span(*map(int, spans[b, n]))
        for step in range(span.num_blocks):
            block = int(span.block(np.int32(step)))
            at = b, slice(n * rows, (n + 1) * rows), slice(block * columns, (block + 1) * columns)
            out[at] = mask[at] if step < span.num_masked else True
    return out.swapaxes(1, 2) if by_key else out


def logits(shape, q, kv, k_shared):
    nope = slice(None, shape.nope)
    own = jnp.einsum("BTHN,BSHN->BHTS", q[..., nope], kv[..., nope])
    return own + jnp.einsum("BTHP,BSP->BHTS", q[..., shape.nope :], k_shared)


def mirror_forward(shape, q, kv, k_shared, spans, ids, *, scale):
    seen = visible_pairs(shape, spans, ids, 128, 128, by_key=False)[:, None]
    s = jnp.where(seen, scale * logits(shape, q, kv, k_shared), -jnp.inf)
    peak = jnp.maximum(jnp.max(s, -1), -1e30)
    p = jnp.exp(s - peak[..., None])
    total = jnp.sum(p, -1)
    some = total > 0
    p = jnp.where(some[..., None], p / jnp.where(some, total, 1)[..., None], 0)
    o = jnp.einsum("BHTS,BSHV->BTHV", p, kv[..., shape.nope :])
    offset = jnp.where(some, -(peak + jnp.log(jnp.where(some, total, 1))) / scale, -1e30)
    pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, shape.padded - shape.tokens)))
    return Result(o, pad(offset), pad(jnp.where(some, peak * LOG2E, -1e30)))


def mirror_ds(shape, q, kv, k_shared, do, offset, delta, seen, scale):
    T = shape.tokens
    p = jnp.exp(scale * (logits(shape, q, kv, k_shared) + offset[:, :, :T, None]))
    p = jnp.where(seen[:, None], p, 0)
    dp = jnp.einsum("BTHV,BSHV->BHTS", do, kv[..., shape.nope :]) + delta[:, :, :T, None]
    return p, scale * p * dp


def mirror_query_gradient(shape, q, kv, k_shared, do, offset, delta, spans, ids, *, scale):
    seen = visible_pairs(shape, spans, ids, 128, mosaic_gpu.BLOCK_KEYS, by_key=False)
    _, ds = mirror_ds(shape, q, kv, k_shared, do, offset, delta, seen, scale)
    own = jnp.einsum("BHTS,BSHN->BTHN", ds, kv[..., : shape.nope])
    return jnp.concatenate([own, jnp.einsum("BHTS,BSP->BTHP", ds, k_shared)], -1)


def mirror_key_gradients(shape, q, kv, k_shared, do, offset, delta, spans, ids, *, scale):
    seen = visible_pairs(shape, spans, ids, 128, mosaic_gpu.BLOCK_QUERIES, by_key=True)
    p, ds = mirror_ds(shape, q, kv, k_shared, do, offset, delta, seen, scale)
    dk, dv = jnp.einsum("BHTS,BTHK->BSHK", ds, q), jnp.einsum("BHTS,BTHV->BSHV", p, do)
    return jnp.concatenate([dk[..., : shape.nope], dv], -1), dk[..., shape.nope :]


@pytest.mark.parametrize("T, packed", [(300, True), pytest.param(173, False, marks=pytest.mark.slow)])
def test_glue(T, packed, monkeypatch):
    """`_core` with the kernels' definitions in their place, against automatic differentiation of the plain form."""
    monkeypatch.setattr(mosaic_gpu, "forward", mirror_forward)
    monkeypatch.setattr(mosaic_gpu, "query_gradient", mirror_query_gradient)
    monkeypatch.setattr(mosaic_gpu, "key_gradients", mirror_key_gradients)
    monkeypatch.setattr(mosaic_gpu, "by_rows", lambda call: call)  # the mirrors read their tables
    dy, *arrays = draw(2, T, 2, 16, 8, 12)
    ids = jnp.asarray(documents(2, T, 90)) if packed else None
    o, peak, gradients = with_gradients.__wrapped__(scaled(mosaic_gpu), dy, arrays, ids)
    want_o, want_peak, want_gradients = with_gradients(scaled(xla), dy, arrays, ids)
    assert error_ratio(o, want_o) <= MIRROR_TOLERANCE
    np.testing.assert_allclose(peak, want_peak, rtol=1e-5)
    for name, got, want in zip(NAMES, gradients, want_gradients, strict=True):
        assert error_ratio(got, want) <= MIRROR_TOLERANCE, name


# The kernels themselves, interpreted: blocks, masks, barriers and copies; only the products are stand-ins.


@pytest.fixture
def interpreted(monkeypatch):
    def add_products(*sums):
        value = lambda x: x if isinstance(x, jax.core.Tracer) and "Ref" not in str(x.aval) else x[...]
        multiply = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
        return tuple(start + sum(multiply(value(a), value(b)) for a, b in pairs) for start, pairs in sums)

    for module in (forward_mosaic_gpu, backward_mosaic_gpu):
        monkeypatch.setattr(module, "add_products", add_products)
    monkeypatch.setattr(backward_mosaic_gpu, "hidden_zero", lambda: 0)
    monkeypatch.setattr(plgpu, "set_max_registers", lambda number, *, action: None)
    monkeypatch.setattr(plgpu, "kernel", functools.partial(plgpu.kernel, interpret=plgpu.InterpretGPUParams()))


CASES = {  # T, N, P, V, packed
    "packed": (256, 64, 64, 64, True),
    "ragged": (333, 64, 0, 128, False),
    "released dimensions": (576, 128, 64, 128, True),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c == "packed" else pytest.mark.slow) for c in CASES])
def test_interpreted_kernels(case, interpreted):
    T, N, P, V, packed = CASES[case]
    dy, *arrays = draw(1, T, 1, N, P, V, jnp.bfloat16)
    ids = jnp.asarray(documents(1, T, 100)) if packed else None
    o, peak, gradients = with_gradients.__wrapped__(scaled(mosaic_gpu), dy, arrays, ids)
    wide = [x.astype(jnp.float32) for x in (dy, *arrays)]
    want_o, want_peak, want_gradients = with_gradients(scaled(xla), wide[0], wide[1:], ids)
    assert error_ratio(o, want_o) <= INTERPRETED_TOLERANCE
    np.testing.assert_allclose(peak, want_peak, rtol=1e-5)
    for name, got, want in zip(NAMES, gradients, want_gradients, strict=True):
        assert not got.size or error_ratio(got, want) <= INTERPRETED_TOLERANCE, name


# Refusals and lowering.


def refusal(*, dtype=jnp.bfloat16, N=128, P=64, V=128, scale=0.1, offset=0):
    _, *arrays = draw(1, 8, 1, N, P, V, dtype)
    masks = dict(segment_ids=None, key_segment_ids=None, query_offset=offset)
    return mosaic_gpu.unserved(*arrays, scale=scale, **masks)


def test_refusals_say_why():
    assert refusal() is None
    assert refusal(P=0) is None
    assert "must share bfloat16 or float16, got float32" in refusal(dtype=jnp.float32)
    assert "100 + 64 key and 128 value channels" in refusal(N=100)
    assert "scale=-1 must be positive" in refusal(scale=-1)
    assert "same tokens only" in refusal(offset=3)
    _, *arrays = draw(1, 8, 1, 128, 64, 128, jnp.bfloat16)
    for name in ("mosaic_gpu", "cudnn"):
        with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU, the default backend is cpu"):
            api.mla_attention(*arrays, implementation=name)


DIMS = {"192/128": (128, 64, 128), "128/128": (128, 0, 128), "192/192": (192, 0, 192), "128/64": (64, 64, 64)}


@pytest.mark.parametrize("dims", ["192/128", pytest.param("192/192", marks=pytest.mark.slow)])
def test_lowers_for_hopper(dims):
    B, T, H = 1, 333, 2
    dy, *arrays = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in draw(B, T, H, *DIMS[dims], jnp.bfloat16))
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32)
    with_gradients.trace(scaled(mosaic_gpu), dy, arrays, ids).lower(lowering_platforms=("cuda",))


# On a GPU.

# Error ratio to the same inputs in float32 through `xla`.
GPU_TOLERANCE = 5e-3  # measured: 2.0e-3 (o), up to 3.2e-3 (gradients), 4.0e-3 (of the shared key)
GPU_MODULES = {"mosaic_gpu": mosaic_gpu, "cudnn": cudnn}


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", GPU_MODULES)
@pytest.mark.parametrize("T, packed", [(384, False), (384, True), (333, True), (5, False)])
@pytest.mark.parametrize("dims", DIMS)
def test_equals_float32(dims, T, packed, implementation):
    if implementation == "cudnn" and (T % 2 or dims != "192/128"):
        pytest.skip("cuDNN takes an even number of packed tokens; one shape is enough for a fall-back")
    dy, *arrays = draw(2, T, 3, *DIMS[dims], jnp.bfloat16)
    ids = jnp.asarray(documents(2, T, 150)) if packed else None
    o, peak, gradients = with_gradients(scaled(GPU_MODULES[implementation]), dy, arrays, ids)
    wide = [x.astype(jnp.float32) for x in (dy, *arrays)]
    want_o, want_peak, want_gradients = with_gradients(scaled(xla), wide[0], wide[1:], ids)
    assert error_ratio(o, want_o) <= GPU_TOLERANCE
    np.testing.assert_allclose(peak, want_peak, rtol=1e-5)
    for name, got, want in zip(NAMES, gradients, want_gradients, strict=True):
        if got.size:
            assert error_ratio(got, want) <= GPU_TOLERANCE, name
            rows = np.asarray(got, np.float32)
            assert ids is None or not rows[np.asarray(ids) == 0].any(), f"{name}: gradient at padding"


@pytest.mark.gpu
def test_two_runs_are_bit_equal_and_the_future_is_unseen():
    dy, *arrays = draw(2, 384, 3, 128, 64, 128, jnp.bfloat16)
    run = functools.partial(with_gradients, scaled(mosaic_gpu))
    first, second = run(dy, arrays, None), run(dy, arrays, None)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    changed = run(dy, [x.at[:, 200:].multiply(-3) for x in arrays], None)
    np.testing.assert_array_equal(
        np.asarray(changed[0][:, :200], np.float32), np.asarray(first[0][:, :200], np.float32)
    )


@pytest.mark.gpu
def test_packed_documents_equal_separate_ones():
    dy, *arrays = draw(1, 512, 2, 128, 64, 128, jnp.bfloat16)
    ids = jnp.repeat(jnp.asarray([1, 2], jnp.int32), jnp.asarray([128, 384]), total_repeat_length=512)[None]
    o, _, gradients = with_gradients(scaled(mosaic_gpu), dy, arrays, ids)
    for part in (slice(0, 128), slice(128, 512)):
        cut = [x[:, part] for x in (dy, *arrays)]
        alone, _, alone_gradients = with_gradients(scaled(mosaic_gpu), cut[0], cut[1:], None)
        # Not bit-equal: XLA may sum o * do in another order at another length. A leak would be an error near 1.
        assert error_ratio(o[:, part], alone) <= GPU_TOLERANCE
        for name, a, b in zip(NAMES, gradients, alone_gradients, strict=True):
            assert error_ratio(a[:, part], b) <= GPU_TOLERANCE, name
