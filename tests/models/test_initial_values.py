"""How parameters start: distributions per kind, no two alike, the same for the same key."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kimi_jax.config.load import validate
from kimi_jax.config.mixer import GdnMixer, KdaMixer, Mamba2Mixer, MlaMixer, Softplus
from kimi_jax.config.model import ModelConfig, MoeFfn
from kimi_jax.errors import UserError
from kimi_jax.layers import param
from kimi_jax.layers.decay import SoftplusParams
from kimi_jax.layers.param import normal, uniform
from kimi_jax.models.block import MIXERS
from kimi_jax.models.decoder import init

pytestmark = pytest.mark.usefixtures("quick_compilation")
KDA = {"num_heads": 8, "key_dim": 32, "value_dim": 16}
CFG = ModelConfig(
    vocab_size=96,
    model_dim=64,
    num_layers=4,
    pattern=("soft", "bounded"),
    mixers={
        "soft": KdaMixer(**KDA),
        "bounded": KdaMixer(**KDA, decay={"kind": "channel", "gate": {"kind": "lower_bound", "bound": -5.0}}),
        "mla": MlaMixer(num_heads=2),
    },
    ffn=MoeFfn(num_experts=4, top_k=2, hidden_dim=32),
    init_std=0.02,
)


@functools.cache
def params(seed=0):
    return jax.device_get(jax.jit(functools.partial(init, CFG))(jax.random.key(seed))[1:])


def leaves():
    return [(path[-2].key + "/" + path[-1].key, x) for path, x in jax.tree.leaves_with_path(params()[0])]


def test_matrices_are_normal_with_the_configured_deviation():
    ones, special = ("norm/weight", "norm"), ("a_log", "dt_bias", "bias", "conv/weight")
    for name, x in leaves():
        if name.endswith(special):
            continue
        if name.endswith(ones):
            np.testing.assert_array_equal(x, 1)
            continue
        deviations = 5 / np.sqrt(x.size)
        assert abs(x.mean() / 0.02) < deviations, name
        assert abs(x.std() / 0.02 - 1) < deviations, name
        assert abs((x**4).mean() / 0.02**4 - 3) < 25 * deviations, name


def test_softplus_decay_starts_as_in_mamba2():
    gate = params()[0]["groups"]["0"]["mixer"]["decay"]["gate"]
    rate, dt = np.exp(gate["a_log"]), np.logaddexp(0, gate["dt_bias"].astype(np.float64))
    assert rate.min() >= 1 and rate.max() <= 16 and rate.max() > 8
    assert dt.min() >= 0.999e-3 and dt.max() <= 0.1001
    assert np.log(dt).mean() == pytest.approx(np.log(1e-2), abs=0.3)  # log-uniform: the mean is the middle
    assert np.log(dt).std() == pytest.approx(np.log(100) / np.sqrt(12), rel=0.15)


def test_a_softplus_gate_starts_with_the_time_steps_of_its_config():
    gate = SoftplusParams(Softplus(time_step=(1e-5, 1e-3)), shape=(8, 32), rngs=nnx.Rngs(0))
    dt = np.logaddexp(0, np.asarray(gate.dt_bias[...], np.float64))
    assert 1e-5 * 0.99 < dt.min() < 2e-5 and 5e-4 < dt.max() < 1e-3 * 1.01  # of 256 draws; rounding moves 1e-5 by 1e-3
    with pytest.raises(UserError, match=r"0\.1 is more than 0\.01"):
        validate({"time_step": [0.1, 0.01]}, Softplus, source="gate")


@pytest.mark.parametrize("kind", [KdaMixer, GdnMixer, Mamba2Mixer])
def test_every_mixer_with_decays_starts_with_the_time_steps_of_its_config(kind):
    decay = {"kind": "head", "gate": {"kind": "softplus", "time_step": [1e-5, 1e-3]}}
    cfg = kind(num_heads=2, key_dim=2, value_dim=2, decay=decay)
    build = jax.jit(lambda: nnx.state(MIXERS[kind](cfg, model_dim=2, std=0.1, rngs=nnx.Rngs(0)).decay.gate, nnx.Param))
    dt = np.logaddexp(0, np.asarray(build()["dt_bias"][...], np.float64))
    assert dt.shape == (2, 1) and dt.min() > 0.99e-5 and dt.max() < 1.01e-3  # those of language models: at least 1e-3


def test_bounded_decay_starts_in_the_same_range():
    gate = params()[0]["groups"]["1"]["mixer"]["decay"]["gate"]
    np.testing.assert_array_equal(gate["a_log"], 0)
    g = -5.0 / (1 + np.exp(-gate["dt_bias"].astype(np.float64)))
    assert g.min() >= -1.61 and g.max() <= -0.99e-3 and np.median(-g) == pytest.approx(0.07, rel=0.5)


def test_convolution_taps_and_router_bias():
    taps = params()[0]["groups"]["0"]["mixer"]["qkv"]["key_conv"]["weight"]
    assert taps.min() >= -0.5 and taps.max() <= 0.5
    assert taps.std() == pytest.approx(1 / np.sqrt(12), rel=0.05)
    np.testing.assert_array_equal(params()[1]["groups"]["0"]["ffn"]["router"]["bias"], 0)


def test_draws_differ_between_parameters_layers_and_keys_and_repeat():
    query = params()[0]["groups"]["0"]["mixer"]["qkv"]["query"]
    others = (
        query[1],
        params()[0]["groups"]["0"]["mixer"]["qkv"]["key"][0],
        params(1)[0]["groups"]["0"]["mixer"]["qkv"]["query"][0],
    )
    for other in others:
        correlation = np.corrcoef(query[0].ravel(), other.ravel())[0, 1]
        assert abs(correlation) < 5 / np.sqrt(other.size)
    again = jax.jit(lambda key: init(CFG, key)[1])(jax.random.key(0))
    np.testing.assert_array_equal(again["groups"]["0"]["mixer"]["qkv"]["query"], query)


def test_draws_are_independent_along_every_axis():
    x = np.asarray(normal(nnx.Rngs(params=jax.random.key(3)), (4, 300, 300), 1.0))
    for axis in range(3):
        for lag in (1, 2):
            other = np.roll(x, lag, axis)
            assert abs((x * other).mean()) < 5 / np.sqrt(x.size)
            assert abs(((x**2 - 1) * (other**2 - 1)).mean()) < 5 * 2 / np.sqrt(x.size)
    largest = np.linalg.svd(x[0], compute_uv=False)[0]
    assert largest == pytest.approx(2 * np.sqrt(300), rel=0.05)  # a random matrix has no direction of its own
    u = np.asarray(uniform(nnx.Rngs(params=jax.random.key(4)), (100_000,), -1.0, 3.0))
    counts = np.histogram(u, 20, (-1, 3))[0]
    assert counts.sum() == u.size and np.abs(counts - 5000).max() < 5 * np.sqrt(5000)


def test_no_draw_is_infinite(monkeypatch):
    """A model of more than 2^24 parameters meets the largest and the smallest hash."""
    extremes = jnp.array([0, 2**32 - 256, 2**32 - 1], jnp.uint32)
    monkeypatch.setattr(param, "random_bits", lambda rngs, shape: extremes)
    rngs = nnx.Rngs(params=jax.random.key(0))
    assert np.all(np.isfinite(normal(rngs, (3,), 1.0)))
    drawn = np.asarray(uniform(rngs, (3,), -1.0, 3.0))
    assert drawn.min() > -1.0 and drawn.max() < 3.0
