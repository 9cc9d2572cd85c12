"""The grouped products against loops over groups: values and gradients; the Hopper kernels in the interpreter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tiles_mosaic_gpu
from pallas_kernels.grouped_matmul import mosaic_gpu
from pallas_kernels.grouped_matmul.api import IMPLEMENTATIONS, grouped_matmul, grouped_swiglu
from pallas_kernels.grouped_matmul.tiles import ALIGNMENT, SPARE, TileConfig, choose_width, plan_tiles
from pallas_kernels.tiles_mosaic_gpu import ROWS

pytestmark = pytest.mark.usefixtures("quick_compilation")
# Largest error over the largest magnitude of the float64 loop; measured 5.7e-7, 7.3e-3 (8.0e-3 by the kernels on an
# H100), 8.7e-4 (the kernels alone): a SwiGLU rounds five times on the way to the gradient of its matrices.
TOLERANCE = {"float32": 2e-6, "bfloat16": 1.2e-2, "float16": 2e-3}
SUM_TOLERANCE = 2e-5  # of sums of 16-bit products in float32 that are not rounded at the end; measured 2.1e-7 on a CPU
ON_CPU = [name for name in IMPLEMENTATIONS if name != "mosaic_gpu"]
SIZES = {  # rows per group; the array has 150 rows
    "even": (30, 30, 30, 30, 30),
    "empty_groups": (0, 100, 0, 50, 0),
    "one_takes_all": (0, 0, 0, 0, 150),
    "rows_left_over": (64, 1, 0, 65, 3),
    "all_empty": (0, 0, 0, 0, 0),
}
M, D, F = 150, 12, 20


def groups(sizes):
    """(group, its rows) of every group."""
    return [(e, slice(end - sizes[e], end)) for e, end in enumerate(np.cumsum(sizes))]


def loop_matmul(x, w, dy, sizes):
    """y, dx and dw in float64."""
    y, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
    for e, rows in groups(sizes):
        y[rows], dx[rows], dw[e] = x[rows] @ w[e], dy[rows] @ w[e].T, x[rows].T @ dy[rows]
    return y, dx, dw


def loop_swiglu(x, gate, up, down, scale, dy, sizes):
    """y and the gradients of x, gate, up, down, scale in float64."""
    y, dx, d_gate, d_up, d_down, d_scale = (np.zeros(a.shape) for a in (dy, x, gate, up, down, scale))
    for e, rows in groups(sizes):
        g, u, s = x[rows] @ gate[e], x[rows] @ up[e], scale[rows, None]
        sigmoid = 1 / (1 + np.exp(-g))
        hidden, d_hidden = g * sigmoid * u, dy[rows] @ down[e].T
        dg, du = d_hidden * s * u * sigmoid * (1 + g * (1 - sigmoid)), d_hidden * s * g * sigmoid
        y[rows], dx[rows] = (s * hidden) @ down[e], dg @ gate[e].T + du @ up[e].T
        d_gate[e], d_up[e], d_down[e] = x[rows].T @ dg, x[rows].T @ du, (s * hidden).T @ dy[rows]
        d_scale[rows] = (d_hidden * hidden).sum(1)
    return y, dx, d_gate, d_up, d_down, d_scale


OPERATORS = {"matmul": (grouped_matmul, loop_matmul), "swiglu": (grouped_swiglu, loop_swiglu)}


def shapes(op, num_groups, dtype, weight_dtype, rows=M, inner=D, outer=F):
    """Of the arguments before the sizes, with the cotangent of the result as the last."""
    first, second = (num_groups, inner, outer), (num_groups, outer, inner)
    matmul = [(rows, inner), first, (rows, outer)]
    swiglu = [(rows, inner), first, first, second, (rows,), (rows, inner)]
    dtypes = {1: "float32", 2: dtype, 3: weight_dtype}
    return [jax.ShapeDtypeStruct(shape, dtypes[len(shape)]) for shape in (swiglu if op == "swiglu" else matmul)]


def draw(*args, **shape):
    """Arrays of these shapes; products of them have a variance near 1."""
    rng = np.random.default_rng(0)
    scale = lambda s: s.shape[1] ** -0.5 if s.ndim == 3 else 1.0
    return [jnp.asarray(scale(s) * rng.standard_normal(s.shape), s.dtype) for s in shapes(*args, **shape)]


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(run, arguments, group_sizes):
    *arguments, dy = arguments
    y, pull = jax.vjp(lambda *arrays: run(*arrays, group_sizes), *arguments)
    return y, *pull(dy)


def check(op, run, sizes, dtype, weight_dtype, call=value_and_gradients, **shape):
    """Values and gradients of `run` against the loop."""
    arguments = draw(op, len(sizes), dtype, weight_dtype, **shape)
    got = call(run, arguments, jnp.asarray(sizes, jnp.int32))
    seen = [np.asarray(a.astype(dtype) if a.ndim == 3 else a, np.float64) for a in arguments]
    want = OPERATORS[op][1](*seen, sizes)
    for i, (a, b, like) in enumerate(zip(got, want, [arguments[-1], *arguments[:-1]], strict=True)):
        assert a.dtype == like.dtype and a.shape == like.shape
        error = np.max(np.abs(np.asarray(a, np.float64) - b)) / max(np.max(np.abs(b)), 1.0)
        tolerance = SUM_TOLERANCE if op == "matmul" and a.dtype != dtype else TOLERANCE[dtype]
        assert error <= tolerance, f"result {i}: error {error:.2e}"
    return got


@functools.cache
def named(op, implementation):
    return functools.partial(OPERATORS[op][0], implementation=implementation)


@pytest.mark.parametrize("implementation", ON_CPU)
@pytest.mark.parametrize("dtypes", [("float32",) * 2, ("bfloat16",) * 2, ("bfloat16", "float32")], ids="-".join)
@pytest.mark.parametrize("op", OPERATORS)
def test_matches_a_loop_over_groups(op, dtypes, implementation):
    for sizes in SIZES.values():
        check(op, named(op, implementation), sizes, *dtypes)


def test_sums_of_narrow_group_sizes_do_not_overflow():
    sizes = SIZES["rows_left_over"]
    x, w, _ = draw("matmul", len(sizes), "float32", "float32")
    got = [grouped_matmul(x, w, jnp.asarray(sizes, dtype), implementation="reference") for dtype in ("int8", "int32")]
    np.testing.assert_array_equal(*got)


def test_wrong_arguments_are_named():
    x, w = jnp.zeros((4, 3)), jnp.zeros((2, 5, 6))
    with pytest.raises(ValueError, match=r"w has shape \(2, 5, 6\), must be \(2, 3, 6\)"):
        grouped_matmul(x, w, jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match="group_sizes is float32, must be integer"):
        grouped_matmul(x, jnp.zeros((2, 3, 6)), jnp.zeros(2))
    with pytest.raises(ValueError, match="w must be float32, the dtype of x"):
        grouped_matmul(x, jnp.zeros((2, 3, 6), jnp.bfloat16), jnp.zeros(2, jnp.int32))
    arguments = draw("swiglu", 2, "float32", "float32")[:5]
    with pytest.raises(ValueError, match=r"down has shape \(2, 12, 20\), must be \(2, 20, 12\)"):
        grouped_swiglu(*arguments[:3], arguments[1], arguments[4], jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match=r"group_sizes has shape \(3,\), must be \(2,\)"):
        grouped_swiglu(*arguments, jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match="M=0 must be at least 1; E=0 must be at least 1"):
        grouped_matmul(x[:0], jnp.zeros((0, 3, 6)), jnp.zeros(0, jnp.int32))


def test_the_kernels_say_what_they_do_not_serve():
    x, w = jnp.zeros((8, 128), jnp.bfloat16), jnp.zeros((2, 128, 200), jnp.bfloat16)
    assert "got float32" in mosaic_gpu.unserved(x.astype(jnp.float32), w)
    assert mosaic_gpu.unserved(x, w) is None
    if jax.default_backend() == "cpu":
        with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
            grouped_matmul(x, w, jnp.zeros(2, jnp.int32), implementation="mosaic_gpu")


def test_tiles_cover_the_columns_with_little_waste():
    widths = [choose_width(columns, (128, 192, 256)) for columns in (128, 384, 960, 1024, 1216)]
    assert widths == [128, 192, 192, 256, 256]
    with pytest.raises(AssertionError, match="columns=64"):
        choose_width(64, (128, 192, 256))


@pytest.mark.parametrize(
    ("widths", "filled"), [((64, 352), (128, 384)), ((1216, 928), (1216, 960)), ((8, 8), (128, 128))]
)
def test_the_kernels_see_at_least_a_tile_of_columns(widths, filled, monkeypatch):
    shapes = []

    def multiply_rows(plan, pairs, **_):
        (x, w), *_ = pairs
        shapes.append((x.shape, w.shape))
        return x @ w[0]

    monkeypatch.setattr(mosaic_gpu, "multiply_rows", multiply_rows)
    x, w = jnp.ones((200, widths[0]), jnp.bfloat16), jnp.ones((2, *widths), jnp.float32)
    y = mosaic_gpu.grouped_matmul(x, w, jnp.array([120, 80]))
    assert shapes == [((200, filled[0]), (2, *filled))]
    np.testing.assert_array_equal(y, np.full((200, widths[1]), widths[0]))  # what fills up is zero and cut off again


@pytest.mark.parametrize("clear", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_tiles_hold_every_row_once_or_with_the_same_bits(seed, clear):
    rng = np.random.default_rng(seed)
    num_rows = 8 * int(rng.integers(16, 200))
    sizes = rng.multinomial(int(num_rows * rng.choice([0.5, 1.0])), rng.dirichlet(np.full(7, 0.3)))
    sizes[rng.integers(7)] = 0
    tiles, used = plan_tiles(jnp.asarray(sizes[rng.permutation(7)]), num_rows, clear)
    tiles = np.asarray(tiles)[: int(used[0])]
    held = np.zeros(num_rows, bool)
    for group, row, start, end in tiles:
        assert row % ALIGNMENT == 0 and 0 <= row <= num_rows - ROWS
        rows = slice(max(row, start), min(row + ROWS, end))
        assert rows.start < rows.stop, f"a tile of group {group} holds none of its rows"
        held[rows] = True
    last = num_rows if clear else min(num_rows, sizes.sum() + SPARE)
    np.testing.assert_array_equal(held, np.arange(num_rows) < last)


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels on a CPU, one at a time: two in one program can wait for each other's threads."""
    monkeypatch.setattr(tiles_mosaic_gpu, "MULTIPROCESSORS", 2)
    monkeypatch.setattr(mosaic_gpu, "CONFIG", TileConfig(columns=128, stages=2))
    for name in ("multiply_rows", "multiply_transposed", "swiglu_rows", "swiglu_gradients"):
        kernel = getattr(mosaic_gpu, name)
        blocking = lambda *args, kernel=kernel, **settings: jax.block_until_ready(kernel(*args, **settings))
        monkeypatch.setattr(mosaic_gpu, name, blocking)
    with plgpu.force_gpu_interpret_mode():
        yield


@pytest.mark.parametrize(
    ("op", "case", "inner", "outer"),
    [
        ("matmul", "empty_groups", 128, 256),
        ("swiglu", "rows_left_over", 72, 160),  # filled up to 128 and 192; the last tiles reach beyond that
        pytest.param("matmul", "rows_left_over", 224, 96, marks=pytest.mark.slow),
        pytest.param("matmul", "one_takes_all", 128, 256, marks=pytest.mark.slow),
        pytest.param("swiglu", "rows_left_over", 128, 256, marks=pytest.mark.slow),
        pytest.param("swiglu", "empty_groups", 128, 256, marks=pytest.mark.slow),
        pytest.param("swiglu", "all_empty", 128, 256, marks=pytest.mark.slow),
    ],
)
def test_the_kernels_in_the_interpreter(op, case, inner, outer, interpreted):
    run = getattr(mosaic_gpu, f"grouped_{op}")
    check(op, run, SIZES[case], "bfloat16", "float32", call=value_and_gradients.__wrapped__, inner=inner, outer=outer)


LOWERED = [  # groups, D, F, dtypes of rows and matrices
    (256, 2304, 1024, "bfloat16", "float32"),  # the 48B model
    pytest.param((64, 1216, 928, "bfloat16", "bfloat16"), marks=pytest.mark.slow),
    pytest.param((64, 1024, 512, "float16", "float16"), marks=pytest.mark.slow),
    pytest.param((8, 384, 384, "bfloat16", "bfloat16"), marks=pytest.mark.slow),  # tiles of 192 and 128 columns
]


@pytest.mark.parametrize("config", LOWERED, ids=str)
def test_every_configuration_lowers_for_cuda(config):
    num_groups, inner, outer, *dtypes = config
    arguments = shapes("swiglu", num_groups, *dtypes, rows=8192, inner=inner, outer=outer)
    sizes = jax.ShapeDtypeStruct((num_groups,), jnp.int32)
    traced = value_and_gradients.trace(mosaic_gpu.grouped_swiglu, arguments, sizes)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 7  # two products forward, two back, three gradients of matrices


@pytest.mark.parametrize(("names", "number"), [((), 0), (("operators",), 3)], ids=["nothing", "operators"])
def test_rematerialisation_keeps_what_the_first_kernel_made_by_name(names, number):
    *arguments, _ = shapes("swiglu", 4, "bfloat16", "bfloat16", rows=512, inner=128, outer=192)
    policy, sizes = jax.checkpoint_policies.save_only_these_names(*names), jnp.full(4, 128, jnp.int32)
    run = jax.checkpoint(lambda *x: mosaic_gpu.grouped_swiglu(*x, sizes), policy=policy)
    kept = jax.eval_shape(lambda *x: jax.tree.leaves(jax.vjp(run, *x)[1]), *arguments)
    assert [x.shape for x in kept].count((512, 192)) == number  # gate and up of the rows, and SwiGLU of them


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("bfloat16",) * 2, ("float16",) * 2], ids="-".join)
@pytest.mark.parametrize("op", OPERATORS)
def test_the_kernels_on_the_card(op, dtypes):
    rng = np.random.default_rng(0)
    rows, num_groups = 2048, 9
    cases = [rng.multinomial(rows - spare, rng.dirichlet(np.full(num_groups, 0.5))) for spare in (0, 0, 0, 1, 300)]
    cases += [np.eye(num_groups, dtype=int)[4] * rows, np.zeros(num_groups, int), np.arange(num_groups)]
    for sizes in cases:
        shape = {"rows": rows, "inner": 256, "outer": 384}
        results = [check(op, named(op, "mosaic_gpu"), tuple(sizes), *dtypes, **shape) for _ in range(2)]
        for a, b in zip(*results, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("widths", [(1216, 928), (64, 352), (224, 1024)], ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_widths_that_tiles_do_not_divide_on_the_card(op, widths):
    sizes = tuple(np.random.default_rng(1).multinomial(1000, np.random.default_rng(2).dirichlet(np.full(7, 0.5))))
    shape = {"rows": 1024, "inner": widths[0], "outer": widths[1]}
    for weight_dtype in ("float32", "bfloat16"):
        check(op, named(op, "mosaic_gpu"), sizes, "bfloat16", weight_dtype, **shape)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 150])
def test_few_rows_on_the_card(rows):
    sizes = np.random.default_rng(0).multinomial(rows, np.full(9, 1 / 9))
    check("swiglu", named("swiglu", "auto"), tuple(sizes), "bfloat16", "float32", rows=rows, inner=128, outer=128)


@pytest.mark.gpu
def test_rows_that_are_not_cleared_reach_nothing_on_the_card():
    """What is behind the spare rows is not a number, in arguments and maybe in results; the rest has the same bits."""
    rows, sizes = 2048, (300, 0, 500, 401)
    used, behind = sum(sizes), np.arange(rows) >= sum(sizes) + SPARE
    spoil = lambda a: jnp.where(behind.reshape(-1, *(1,) * (a.ndim - 1)), jnp.nan, a) if len(a) == rows else a
    arguments = draw("swiglu", len(sizes), "bfloat16", "float32", rows=rows, inner=256, outer=384)
    run, group_sizes = named("swiglu", "mosaic_gpu"), jnp.asarray(sizes, jnp.int32)
    want = value_and_gradients(run, arguments, group_sizes)
    got = value_and_gradients(functools.partial(run, clear=False), [spoil(a) for a in arguments], group_sizes)
    for a, b in zip(want, got, strict=True):
        part = slice(used) if len(a) == rows else slice(None)
        np.testing.assert_array_equal(a[part], b[part])
