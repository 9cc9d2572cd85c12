"""Every token mixer and variant: causal, deaf to padding and to other documents, trainable in every parameter."""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pydantic import TypeAdapter

from kimi_jax.config.mixer import GdnMixer, KdaMixer, Mamba2Mixer, Mixer, MlaMixer
from kimi_jax.config.model import MoeFfn
from kimi_jax.layers import qkv
from kimi_jax.layers.param import normal
from kimi_jax.layers.qkv import ConvolvedQkv
from kimi_jax.models.block import MIXERS
from pallas_kernels.grouped_matmul import api as grouped_matmul_api
from pallas_kernels.kda import api as kda_api
from pallas_kernels.mla import api as mla_api
from pallas_kernels.ssd import api as ssd_api

pytestmark = pytest.mark.usefixtures("quick_compilation")
D, T = 12, 19
LINEAR = {"num_heads": 2, "key_dim": 8, "value_dim": 6, "chunk_size": 16}
DEFINITION = LINEAR | {"implementation": "reference"}  # compiles in half the time; operators have tests of their own
LATENT = {"kind": "mla", "num_heads": 2, "nope_dim": 6, "rope_dim": 4, "value_dim": 8, "latent_dim": 10}
LOW = {"rank": 3}
VARIANTS = {
    "kda": {"kind": "kda", **LINEAR, "decay": {"kind": "channel", **LOW}, "output_gate": {"kind": "sigmoid", **LOW}},
    "kda_bounded_swish_grouped": {
        "kind": "kda",
        **DEFINITION,
        "num_value_heads": 4,
        "decay": {"kind": "channel", **LOW, "gate": {"kind": "lower_bound", "bound": -5.0}},
        "output_gate": {"kind": "swish", **LOW},
        "conv": {"kind": "short", "width": 3},
    },
    "kda_head_ungated_unconvolved": {
        "kind": "kda",
        **DEFINITION,
        "decay": {"kind": "head", "gate": {"kind": "lower_bound", "bound": -2.0}},
        "output_gate": {"kind": "none"},
        "conv": {"kind": "none"},
    },
    "kda_undecayed": {"kind": "kda", **DEFINITION, "decay": {"kind": "none"}, "output_gate": {"kind": "none"}},
    "gdn": {"kind": "gdn", **LINEAR, "output_gate": {"kind": "sigmoid", **LOW}},
    "mamba2": {"kind": "mamba2", **DEFINITION, "num_value_heads": 4, "output_gate": {"kind": "sigmoid", **LOW}},
    "mla": LATENT,
    "mla_rope": LATENT | {"position": {"kind": "rope", "theta": 100.0}},
}
# Operators whose implementations a config may name.
OPERATORS = {
    KdaMixer: kda_api.IMPLEMENTATIONS,
    GdnMixer: kda_api.IMPLEMENTATIONS,
    Mamba2Mixer: ssd_api.IMPLEMENTATIONS,
    MlaMixer: mla_api.IMPLEMENTATIONS,
    MoeFfn: grouped_matmul_api.IMPLEMENTATIONS,
}
# Largest difference over the largest magnitude, float32; measured 2.4e-7.
TOLERANCE = 2e-6


@functools.cache
def build(variant):
    """(run, params): run(params, x, segment_ids, cotangent) -> (y, gradients of sum(y * cotangent) in params and x)."""
    cfg = TypeAdapter(Mixer).validate_python(VARIANTS[variant])
    make = jax.jit(lambda key: nnx.split(MIXERS[type(cfg)](cfg, model_dim=D, std=0.5, rngs=nnx.Rngs(params=key))))
    graphdef, params = make(jax.random.key(0))

    @jax.jit
    def run(params, x, segment_ids, cotangent):
        y, pull = jax.vjp(lambda params, x: nnx.merge(graphdef, params)(x, None, segment_ids)[0], params, x)
        return y, pull(cotangent)

    return run, params


def draw(seed, batch=3):
    return normal(nnx.Rngs(params=jax.random.key(seed)), (batch, T, D), 1.0)


def relative(got, want):
    return np.max(np.abs(np.asarray(got) - np.asarray(want))) / np.max(np.abs(want))


@pytest.fixture(params=VARIANTS)
def mixer(request):
    return build(request.param)


def test_every_parameter_gets_a_finite_gradient(mixer):
    run, params = mixer
    y, (d_params, d_x) = run(params, draw(1), jnp.ones((3, T), jnp.int32), draw(2))
    assert y.shape == d_x.shape == (3, T, D) and y.dtype == jnp.float32
    for path, leaf in jax.tree.leaves_with_path((d_params, d_x)):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_no_token_sees_the_future(mixer):
    run, params = mixer
    x, at, ones = draw(1), 11, jnp.ones((3, T), jnp.int32)
    changed = jnp.where((jnp.arange(T) >= at)[None, :, None], draw(5), x)
    first, second = run(params, x, ones, draw(2))[0], run(params, changed, ones, draw(2))[0]
    np.testing.assert_array_equal(first[:, :at], second[:, :at])
    assert np.abs(first[:, at:] - second[:, at:]).max(-1).min() > 0


def test_documents_and_padding_do_not_leak(mixer):
    """Two documents in one row, each on its own at the row's end, and at its beginning: same outputs and gradients."""
    run, params = mixer
    cut = 8
    first, second = draw(1, 1)[0, :cut], draw(2, 1)[0, cut:]
    noise = draw(3, 1)[0]
    x = jnp.stack(
        [
            jnp.concatenate([first, second]),
            jnp.concatenate([first, noise[cut:]]),
            jnp.concatenate([noise[:cut], second]),
        ]
    )
    position = np.arange(T)
    left = position < cut
    segment_ids = jnp.asarray(np.stack([np.where(left, 3, 1), np.where(left, 7, 0), np.where(left, 0, 2)]), jnp.int32)
    y, (_, d_x) = run(params, x, segment_ids, jnp.broadcast_to(draw(4, 1), x.shape))
    for got in (y, d_x):
        assert relative(got[1, :cut], got[0, :cut]) <= TOLERANCE
        assert relative(got[2, cut:], got[0, cut:]) <= TOLERANCE
        np.testing.assert_array_equal(got[1, cut:], 0)
        np.testing.assert_array_equal(got[2, :cut], 0)
    whole = run(params, x, jnp.ones((3, T), jnp.int32), draw(4))[0]
    assert relative(whole[0, cut:], y[0, cut:]) > 0.01  # without segment ids the second document does see the first


def test_left_padding_equals_a_shift(mixer):
    run, params = mixer
    x, shift = draw(1), 5
    padded = jnp.roll(x, shift, axis=1)
    segment_ids = jnp.broadcast_to((jnp.arange(T) >= shift).astype(jnp.int32)[None], (3, T))
    y = run(params, x, jnp.ones((3, T), jnp.int32), draw(2))[0]
    shifted = run(params, padded, segment_ids, draw(2))[0]
    assert relative(shifted[:, shift:], y[:, :-shift]) <= TOLERANCE


@pytest.mark.parametrize("config", OPERATORS, ids=lambda config: config.__name__)
def test_configs_name_only_implementations_that_exist(config):
    names = set(typing.get_args(config.model_fields["implementation"].annotation))
    assert "auto" in names and names - {"auto"} <= set(OPERATORS[config])


@pytest.mark.parametrize("variant", ["kda_bounded_swish_grouped", "kda_head_ungated_unconvolved"])
def test_joined_projections_are_those_of_each_stream(variant, monkeypatch):
    """Queries, keys and values of several widths, with caches and padding, and their gradients."""
    cfg = TypeAdapter(Mixer).validate_python(VARIANTS[variant])
    graphdef, params = nnx.split(ConvolvedQkv(cfg, model_dim=D, std=0.5, rngs=nnx.Rngs(params=0)))
    x, ids = draw(1), np.sort(np.arange(3 * T).reshape(3, T) % 4, axis=1).astype(np.int32)
    cache = jax.tree.map(jnp.cos, nnx.merge(graphdef, params).init_cache(3, jnp.float32))

    def results():
        def run(params, x, cache):
            y, pull = jax.vjp(lambda *arrays: nnx.merge(graphdef, arrays[0])(*arrays[1:], ids), params, x, cache)
            return y, pull(jax.tree.map(jnp.sin, y))

        return jax.tree.leaves(jax.jit(run)(params, x, cache))

    joined = results()
    monkeypatch.setattr(qkv, "is_longer", lambda *_: False)
    for got, want in zip(joined, results(), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * np.abs(want).max())
