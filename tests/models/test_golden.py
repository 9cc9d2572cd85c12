"""The released architecture in small, against an independent float64 forward pass that can make each known mistake."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_kimi_linear import MISTAKES, forward

from kimi_jax.config.model import ModelConfig
from kimi_jax.models.decoder import abstract, merge
from kimi_jax.models.layout import plan_layout

pytestmark = pytest.mark.usefixtures("quick_compilation")
LOW = {"rank": 6}
CFG = ModelConfig.model_validate(
    {
        "vocab_size": 40,
        "model_dim": 24,
        "num_layers": 8,
        "pattern": ["kda", "kda", "mla"],
        "tail": ["kda", "mla"],
        "mixers": {
            "kda": {
                **{"kind": "kda", "num_heads": 2, "key_dim": 8, "value_dim": 8, "chunk_size": 16},
                **{"decay": {"kind": "channel", **LOW}, "output_gate": {"kind": "sigmoid", **LOW}},
            },
            "mla": {"kind": "mla", "num_heads": 2, "nope_dim": 6, "rope_dim": 4, "value_dim": 8, "latent_dim": 10},
        },
        "ffn": {"kind": "moe", "num_experts": 6, "top_k": 2, "hidden_dim": 8},
        "first_k_dense": 1,
        "dense_hidden_dim": 32,
        "dtype": "float32",
    }
)
# Largest logit difference over the RMS of the logits: the model measures 4.6e-5, the smallest mistake 1.06.
TOLERANCE = 1e-4
MISTAKE = 0.5
T = 37


@functools.cache
def variables():
    """(graphdef, params, buffers) with weights of unit gain, small latents, strong gates and biases that matter."""
    graphdef, params, buffers = abstract(CFG)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name, stacked = path[-1].key, path[0].key == "groups"
        noise = rng.standard_normal(leaf.shape)
        ranks = {"latent_down": 4e-3, "value": 3e-3, "up": 0.6, "query": 1.0, "a_log": 0.5, "dt_bias": 1.0, "bias": 0.2}
        if leaf.ndim - stacked == 1 and name not in ranks:
            return jnp.asarray(1 + 0.3 * noise, jnp.float32)
        fan_in = leaf.shape[-1] if path[0].key == "embed" else leaf.shape[1 if stacked else 0]
        default = 1.0 if leaf.ndim - stacked == 1 else fan_in**-0.5
        return jnp.asarray(ranks.get(name, default) * noise, jnp.float32)

    return graphdef, jax.tree.map_with_path(draw, params), jax.tree.map_with_path(draw, buffers)


@functools.cache
def as_layers():
    _, params, buffers = variables()
    params, buffers = (jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree) for tree in (params, buffers))

    def pick(tree, where):
        block = tree.get(where.part, {}).get(where.index, {})
        return block if where.repeat is None else jax.tree.map(lambda leaf: leaf[where.repeat], block)

    places = [plan_layout(CFG).locate(layer) for layer in range(CFG.num_layers)]
    layers = [pick(params, where) for where in places]
    biases = [pick(buffers, where).get("ffn", {}).get("router", {}).get("bias") for where in places]
    outside = {"embed": params["embed"]["weight"], "norm": params["norm"]["weight"], "head": params["head"]["weight"]}
    return layers, biases, outside


def tokens():
    return np.random.default_rng(1).integers(0, CFG.vocab_size, (2, T))


@functools.cache
def model_logits():
    graphdef, params, buffers = variables()

    @jax.jit
    def run(params, buffers, tokens):
        model = merge(graphdef, params, buffers)
        return model.logits(model(tokens)[0])

    return np.asarray(run(params, buffers, jnp.asarray(tokens(), jnp.int32)), np.float64)


@functools.cache
def numpy_logits(mistake=None):
    return np.stack([forward(CFG, *as_layers(), row, mistake) for row in tokens()])


def error(got, want):
    return np.max(np.abs(got - want)) / np.sqrt(np.mean(want**2))


def test_logits_match_the_specification():
    assert plan_layout(CFG).repeats == 2  # the scan is part of what is compared
    measured = error(model_logits(), numpy_logits())
    assert measured <= TOLERANCE, f"{measured:.1e}"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_known_mistake_would_show(mistake):
    measured = error(numpy_logits(mistake), numpy_logits())
    assert measured >= MISTAKE, f"{mistake}: moves the logits by {measured:.1e} only"
