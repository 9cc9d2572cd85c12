"""`jax.vmap` over the operators and their weights, as when small models train together: equals separate calls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.batching import by_rows
from pallas_kernels.dispatch import Implementation
from pallas_kernels.gated_norm import api as gated_norm
from pallas_kernels.grouped_matmul import api as grouped_matmul
from pallas_kernels.grouped_matmul import rows
from pallas_kernels.kda import LowerBoundGate, SoftplusGate, mirror, mirror_vjp, mosaic_gpu, step_kda
from pallas_kernels.kda import api as kda
from pallas_kernels.mla import api as mla
from pallas_kernels.short_conv import api as short_conv
from pallas_kernels.ssd import api as ssd
from pallas_kernels.symmetric_matmul import mosaic_gpu as symmetric_matmul
from pallas_kernels.testing import assert_all_close, generator

MODELS = 3
SEGMENTS = np.array([[1] * 40 + [0] * 10 + [2] * 78, [1] * 128], np.int32)
TOLERANCE = 1e-3  # measured 0 on a CPU: a model's results do not depend on how many others there are
CARD_TOLERANCE = 5e-3  # measured 2.1e-3, latent attention: XLA rounds a 16-bit cotangent of o or leaves it, by program


def _draw(name, *shape, dtype=jnp.bfloat16):
    return jnp.asarray(generator(0, name).standard_normal((MODELS, *shape)), dtype)


def _kda_arrays():
    wide = {"state": (2, 2, 128, 128), "a_log": (2,), "dt_bias": (2, 128)}
    arrays = {name: _draw(name, 2, 128, 2, 128) for name in ("q", "k", "v", "g")}
    arrays |= {name: _draw(name, *shape, dtype="float32") for name, shape in wide.items()}
    return arrays | {"beta": jax.nn.sigmoid(_draw("beta", 2, 128, 2))}


def _conv_arrays():
    return {"x": _draw("x", 2, 128, 128), "weight": _draw("weight", 128, 4)}


def _norm_arrays():
    return {"x": _draw("x", 2080, 128), "logits": _draw("logits", 2080, 128), "weight": _draw("weight", 128)}


def _kda(implementation, x, segment_ids=None, gate=SoftplusGate):
    return kda.chunk_kda(
        *(x[name] for name in ("q", "k", "v", "g", "beta")),
        gate=gate(x["a_log"], x["dt_bias"]),
        initial_state=x["state"],
        segment_ids=segment_ids,
        normalize_qk=True,
        implementation=implementation,
    )


def _conv(implementation, x, segment_ids=None):
    return short_conv.short_conv(x["x"], x["weight"], segment_ids=segment_ids, implementation=implementation)


def _norm(implementation, x):
    return gated_norm.gated_rms_norm(x["x"], x["logits"], x["weight"], eps=1e-5, implementation=implementation)


def _mla(implementation, x, segment_ids=None):
    parts = (x[name] for name in ("q", "q_shared", "k", "k_shared", "v"))
    return mla.mla_attention(*parts, segment_ids=segment_ids, implementation=implementation)[0]


def _matmul(implementation, x):
    return grouped_matmul.grouped_matmul(x["x"], x["gate"], x["sizes"], implementation=implementation)


def _swiglu(implementation, x):
    arrays = (x[name] for name in ("x", "gate", "up", "down", "scale", "sizes"))
    return grouped_matmul.grouped_swiglu(*arrays, implementation=implementation)


def _spread(implementation, x):
    return rows.spread_rows(x["x"], x["row"], implementation)


def _ssd(implementation, x):
    decay = -jnp.exp(x["a_log"])[None, None] * x["beta"].astype(jnp.float32)
    arrays = (x["q"], x["k"], x["v"], decay, x["beta"])
    return ssd.chunk_ssd(*arrays, initial_state=x["state"], implementation=implementation)


def _mla_arrays():
    shapes = {"q": (2, 128, 2, 64), "q_shared": (2, 128, 2, 64), "k": (2, 128, 2, 64), "k_shared": (2, 128, 64)}
    return {name: _draw(name, *shape) for name, shape in (shapes | {"v": (2, 128, 2, 64)}).items()}


def _group_arrays():
    shapes = {"x": (150, 128), "gate": (3, 128, 128), "up": (3, 128, 128), "down": (3, 128, 128)}
    sizes = jnp.asarray([[30, 0, 120], [64, 1, 65], [0, 0, 0]], jnp.int32)  # all rows, some left over, none
    return {name: _draw(name, *shape) for name, shape in shapes.items()} | {
        "scale": _draw("scale", 150, dtype="float32"),
        "sizes": sizes,
    }


def _spread_arrays():
    order = [generator(0, f"row{m}").permutation(128).reshape(64, 2) for m in range(MODELS)]
    return {"x": _draw("x", 64, 128), "row": jnp.asarray(np.stack(order), jnp.int32)}


OPERATORS = {  # function of (implementation, arrays of a model, what all models share), arrays, shared, implementations
    "kda": (_kda, _kda_arrays, (), kda.IMPLEMENTATIONS),
    "kda-packed": (functools.partial(_kda, gate=LowerBoundGate), _kda_arrays, (SEGMENTS,), kda.IMPLEMENTATIONS),
    "conv": (_conv, _conv_arrays, (), short_conv.IMPLEMENTATIONS),
    "conv-packed": (_conv, _conv_arrays, (SEGMENTS,), short_conv.IMPLEMENTATIONS),
    "norm": (_norm, _norm_arrays, (), gated_norm.IMPLEMENTATIONS),
    "mla": (_mla, _mla_arrays, (), mla.IMPLEMENTATIONS),
    "mla-packed": (_mla, _mla_arrays, (SEGMENTS,), mla.IMPLEMENTATIONS),
    "matmul": (_matmul, _group_arrays, (), grouped_matmul.IMPLEMENTATIONS),
    "swiglu": (_swiglu, _group_arrays, (), grouped_matmul.SWIGLU_IMPLEMENTATIONS),
    "spread": (_spread, _spread_arrays, (), rows.IMPLEMENTATIONS),
    "ssd": (_ssd, _kda_arrays, (), ssd.IMPLEMENTATIONS),
}
KERNELS = [name for name in OPERATORS if name != "ssd"]
PLAIN = [
    (name, implementation)
    for name, (*_, implementations) in OPERATORS.items()
    for implementation in implementations
    if implementation not in ("mosaic_gpu", "cudnn")
]


def _step(name, implementation):
    """Values and gradients of one model."""
    function = OPERATORS[name][0]

    def step(arrays, *shared):
        floats = {name: x for name, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}

        def loss(floats):
            results = jax.tree.leaves(function(implementation, arrays | floats, *shared))
            return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in results), results

        (_, results), gradients = jax.value_and_grad(loss, has_aux=True)(floats)
        return {f"result{i}": x for i, x in enumerate(results)} | {f"d_{name}": x for name, x in gradients.items()}

    return step


def _together_and_apart(name, implementation):
    _, draw, shared, _ = OPERATORS[name]
    step, arrays = _step(name, implementation), draw()
    together = jax.jit(jax.vmap(step, in_axes=(0, *[None] * len(shared))))(arrays, *shared)
    one = jax.jit(step)
    apart = [one({name: x[m] for name, x in arrays.items()}, *shared) for m in range(MODELS)]
    return together, jax.tree.map(lambda *x: jnp.stack(x), *apart)


def test_rows_of_members_join_and_part_again():
    calls = []

    @by_rows
    def call(x, scale):  # two rows of x for each of the scale
        calls.append(x.shape[0])
        return {"y": x * jnp.repeat(scale, 2, axis=0), "z": scale + 1}

    x, scale = jnp.arange(24.0).reshape(2, 3, 4, 1), jnp.arange(1.0, 5.0).reshape(2, 2, 1)
    got = jax.vmap(jax.vmap(call, in_axes=(0, None)))(x, scale)
    np.testing.assert_array_equal(got["y"], x * jnp.repeat(scale, 2, axis=1)[:, None])
    np.testing.assert_array_equal(got["z"], jnp.broadcast_to(scale[:, None] + 1, (2, 3, 2, 1)))
    assert calls[-1] == 24


def test_models_together_equal_models_apart():
    assert_all_close(*_together_and_apart("norm", "reference"), TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "implementation"), PLAIN)
def test_models_together_equal_models_apart_in_every_implementation(name, implementation):
    assert_all_close(*_together_and_apart(name, implementation), TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kda", "kda-packed"])
def test_the_mirrored_kernels_map_as_they_do(name, monkeypatch):
    mirrored = functools.partial(
        mosaic_gpu.Options, prepare=mirror.prepare, recur=mirror.recur, backward=mirror_vjp.backward
    )
    monkeypatch.setattr(mosaic_gpu, "Options", mirrored)
    monkeypatch.setitem(kda.IMPLEMENTATIONS, "mosaic_gpu", Implementation(mosaic_gpu.chunk_kda))
    assert_all_close(*_together_and_apart(name, "mosaic_gpu"), TOLERANCE)


@pytest.mark.parametrize(
    "name", [name if name in ("conv", "norm") else pytest.param(name, marks=pytest.mark.slow) for name in KERNELS]
)
def test_one_launch_of_each_kernel_serves_all_models(name, monkeypatch):
    _, draw, shared, implementations = OPERATORS[name]
    kernel = Implementation(implementations["mosaic_gpu"].run)
    monkeypatch.setitem(implementations, "mosaic_gpu", kernel)
    step, arrays = _step(name, "mosaic_gpu"), draw()
    one = jax.jit(step).trace({name: x[0] for name, x in arrays.items()}, *shared)
    all_models = jax.jit(jax.vmap(step, in_axes=(0, *[None] * len(shared)))).trace(arrays, *shared)
    counts = [x.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") for x in (one, all_models)]
    assert counts[0] == counts[1] > 0


def _decode(implementation, x, gate=SoftplusGate):
    arrays = (x[name][:, 0] for name in ("q", "k", "v", "g", "beta"))
    settings = {"gate": gate(x["a_log"], x["dt_bias"]), "slots": x["slots"], "implementation": implementation}
    o, state = step_kda(*arrays, x["pool"], normalize_qk=True, **settings)
    return {"o": o, "state": state}


def _check_decoding(implementation):
    """Every model has a pool of three rows for two sequences, of which one may be inactive."""
    arrays = _kda_arrays() | {"pool": _draw("pool", 3, 2, 128, 128, dtype="float32")}
    arrays["slots"] = jnp.asarray([[2, 0], [1, -1], [0, 1]], jnp.int32)
    step = functools.partial(_decode, implementation)
    together = jax.jit(jax.vmap(step))(arrays)
    apart = [jax.jit(step)({name: x[m] for name, x in arrays.items()}) for m in range(MODELS)]
    assert_all_close(together, jax.tree.map(lambda *x: jnp.stack(x), *apart), 1e-6)


def test_models_decode_together():
    _check_decoding("reference")


@pytest.mark.parametrize("shape", [(128, 192), (192, 128)])
def test_stacks_of_matrices_of_all_models_are_one_stack(shape):
    x = jax.ShapeDtypeStruct((MODELS, 2, *shape), jnp.bfloat16)
    gram = jax.jit(jax.vmap(symmetric_matmul.gram)).trace(x).lower(lowering_platforms=("cuda",))
    assert gram.as_text().count("@mosaic_gpu") == 1


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNELS)
def test_models_together_equal_models_apart_on_the_card(name):
    assert_all_close(*_together_and_apart(name, "mosaic_gpu"), CARD_TOLERANCE)


@pytest.mark.gpu
def test_models_decode_together_on_the_card():
    _check_decoding("mosaic_gpu")
