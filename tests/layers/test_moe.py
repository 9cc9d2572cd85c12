"""The mixture of experts against a loop over tokens in float64; what the balancing bias, padding and extremes do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kimi_jax.config.model import MoeFfn
from kimi_jax.layers.moe import Moe, run_here
from kimi_jax.layers.param import Buffer, normal
from kimi_jax.layers.router import Routing, multiply_exactly

pytestmark = pytest.mark.usefixtures("quick_compilation")
B, T, D, E, K, F = 2, 7, 6, 5, 2, 4
SCALING = 2.446
# Largest difference over the largest magnitude, float32 against float64; measured 2.6e-7 (values), 4.2e-7 (gradients).
TOLERANCE = 3e-6


def build(**settings):
    cfg = MoeFfn(num_experts=E, top_k=K, hidden_dim=F, **settings)
    make = jax.jit(lambda key: nnx.split(Moe(cfg, model_dim=D, std=0.7, rngs=nnx.Rngs(params=key)), nnx.Param, Buffer))
    return make(jax.random.key(0))


GRAPHDEF, PARAMS, BUFFERS = build()


@jax.jit
def run(params, bias, x, valid, cotangent):
    """(y, stats, gradients in params and x)."""
    buffers = nnx.State({"router": {"bias": bias}})

    def apply(params, x):
        addends, stats = nnx.merge(GRAPHDEF, params, buffers)(x, valid)
        return sum(addends), stats

    y, pull, stats = jax.vjp(apply, params, x, has_aux=True)
    return y, stats, pull(cotangent)


def draw(seed, *shape):
    return normal(nnx.Rngs(params=jax.random.key(seed)), shape or (B, T, D), 1.0)


ALL_VALID = jnp.ones((B, T), bool)
NO_BIAS = jnp.zeros(E)


def silu(z):
    return z / (1 + np.exp(-z))


def loop(params, bias, x, valid, swiglu=lambda x, g, u, d: (silu(x @ g) * (x @ u)) @ d):
    """Token by token in float64; also the choices."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(params))
    x, y, chosen = np.asarray(x, np.float64), np.zeros((B, T, D)), np.zeros((B, T, E), bool)
    for b, t in np.ndindex(B, T):
        score = 1 / (1 + np.exp(-x[b, t] @ p["router"]["weight"]))
        best = np.argsort(-(score + np.asarray(bias)), kind="stable")[:K]
        weight = SCALING * score[best] / (score[best].sum() + 1e-20)
        y[b, t] = swiglu(x[b, t], *(p["shared"][n] for n in ("gate", "up", "down")))
        if valid[b, t]:
            chosen[b, t, best] = True
            for w, e in zip(weight, best, strict=True):
                y[b, t] += w * swiglu(x[b, t], *(p["experts"][n][e] for n in ("gate", "up", "down")))
    return y, chosen


def dense(params, chosen, x):
    """The same as every expert on every token, with the choices given: for gradients by automatic differentiation."""
    p = nnx.to_pure_dict(params)
    score = jax.nn.sigmoid(x @ p["router"]["weight"]) * chosen
    weight = SCALING * score / (score.sum(-1, keepdims=True) + 1e-20)

    def swiglu(w, spec):
        hidden = jax.nn.silu(jnp.einsum(f"BTD,{spec}DF->BT{spec}F", x, w["gate"]))
        hidden *= jnp.einsum(f"BTD,{spec}DF->BT{spec}F", x, w["up"])
        return jnp.einsum(f"BT{spec}F,{spec}FD->BT{spec}D", hidden, w["down"])

    return jnp.einsum("BTED,BTE->BTD", swiglu(p["experts"], "E"), weight) + swiglu(p["shared"], "")


def assert_close(got, want, name=""):
    error = np.max(np.abs(np.asarray(got, np.float64) - want)) / np.max(np.abs(want))
    assert error <= TOLERANCE, f"{name}: error {error:.1e}"


def test_values_match_a_loop_over_tokens():
    x, bias = draw(1), 0.3 * draw(2, E)
    want, chosen = loop(PARAMS, bias, x, ALL_VALID)
    y, stats, _ = run(PARAMS, bias, x, ALL_VALID, draw(3))
    assert_close(y, want)
    np.testing.assert_array_equal(stats.load, chosen.sum((0, 1)))


def test_gradients_match_every_expert_on_every_token():
    x, bias, dy = draw(1), 0.3 * draw(2, E), draw(3)
    _, chosen = loop(PARAMS, bias, x, ALL_VALID)
    _, pull = jax.vjp(lambda params, x: dense(params, jnp.asarray(chosen), x), PARAMS, x)
    got, want = run(PARAMS, bias, x, ALL_VALID, dy)[2], pull(dy)
    for path, a in jax.tree.leaves_with_path(got):
        name = jax.tree_util.keystr(path)
        b = dict(jax.tree.leaves_with_path(want))[path]
        assert_close(a, np.asarray(b), name)


def test_bias_moves_the_choice_and_not_the_weights():
    x, bias = draw(1), jnp.asarray([5.0, 5.0, 0.0, 0.0, 0.0])
    y, stats, _ = run(PARAMS, bias, x, ALL_VALID, draw(3))
    np.testing.assert_array_equal(stats.load, [B * T, B * T, 0, 0, 0])
    stronger = run(PARAMS, 3 * bias, x, ALL_VALID, draw(3))[0]
    np.testing.assert_array_equal(y, stronger)
    assert_close(y, loop(PARAMS, bias, x, ALL_VALID)[0])


@pytest.mark.parametrize("valid_tokens", [0, 1, T - 2])
def test_padding_costs_neither_load_nor_nan(valid_tokens):
    valid = jnp.arange(T)[None] < jnp.asarray([[valid_tokens], [T]])
    x = draw(1)
    y, stats, (d_params, d_x) = run(PARAMS, NO_BIAS, x, valid, jnp.where(valid[..., None], draw(3), 0))
    want, chosen = loop(PARAMS, NO_BIAS, x, valid)
    assert_close(y[valid], want[valid])
    np.testing.assert_array_equal(stats.load, chosen.sum((0, 1)))
    other = jnp.where(valid[..., None], x, 100 * draw(9))
    again = run(PARAMS, NO_BIAS, other, valid, jnp.where(valid[..., None], draw(3), 0))
    np.testing.assert_allclose(again[1].balance_loss, stats.balance_loss, rtol=1e-6)
    np.testing.assert_array_equal(again[1].load, stats.load)
    np.testing.assert_array_equal(again[0][valid], y[valid])
    for leaf in jax.tree.leaves((d_params, d_x, again[2])):
        assert np.isfinite(leaf).all()


def test_balance_loss_by_hand():
    x = draw(1)
    valid = np.asarray(jnp.arange(T)[None] < jnp.asarray([[4], [T]]))
    p = np.asarray(nnx.to_pure_dict(PARAMS)["router"]["weight"], np.float64)
    score = 1 / (1 + np.exp(-np.asarray(x, np.float64) @ p))
    _, chosen = loop(PARAMS, NO_BIAS, x, valid)
    rows = []
    for b in range(B):
        f = E / (K * valid[b].sum()) * chosen[b].sum(0)
        share = score[b] / score[b].sum(-1, keepdims=True)
        rows.append(f @ share[valid[b]].mean(0))
    stats = run(PARAMS, NO_BIAS, x, jnp.asarray(valid), draw(3))[1]
    np.testing.assert_allclose(stats.balance_loss, np.mean(rows), rtol=1e-5)


def test_no_shared_expert_and_no_renormalisation():
    graphdef, params, buffers = build(num_shared_experts=0, renormalize=False, routed_scaling=1.5)
    assert "shared" not in nnx.to_pure_dict(params)
    x = draw(1)
    addends, _ = jax.jit(lambda x: nnx.merge(graphdef, params, buffers)(x))(x)
    y = sum(addends)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(params))
    token = np.asarray(x[0, 0], np.float64)
    score = 1 / (1 + np.exp(-token @ p["router"]["weight"]))
    want = 0
    for e in np.argsort(-score)[:K]:
        gate, up, down = (p["experts"][n][e] for n in ("gate", "up", "down"))
        want += 1.5 * score[e] * ((silu(token @ gate) * (token @ up)) @ down)
    assert_close(y[0, 0], want)


def test_another_dispatch_may_run_the_experts():
    """Half of the experts see the choices of their half alone, and sums are added; what it dropped is reported."""
    x = draw(1)

    def in_halves(experts, x_BTD, routing, beside):
        halves = [routing.expert < E // 2, (routing.expert >= E // 2) & (routing.expert < E)]
        routings = [Routing(jnp.where(half, routing.expert, E), routing.weight * half) for half in halves]
        parts = [run_here(experts, x_BTD, routing, jnp.zeros_like)[0] for routing in routings]
        return (*sum(parts, ()), beside(x_BTD)), jnp.float32(3)

    moe = nnx.merge(GRAPHDEF, PARAMS, BUFFERS)
    want, stats = jax.jit(lambda x: moe(x))(x)
    want = sum(want)
    assert stats.dropped == 0
    moe.dispatch = in_halves
    got, stats = jax.jit(lambda x: moe(x))(x)
    assert_close(sum(got), np.asarray(want, np.float64))
    assert stats.dropped == 3


def test_logits_of_bfloat16_activations_are_as_exact_as_float32():
    x, w, dy = draw(1, 2, 64, 256).astype(jnp.bfloat16), draw(2, 256, 16), draw(3, 2, 64, 16)

    @jax.jit
    def run(x, w, dy):
        y, pull = jax.vjp(multiply_exactly, x, w)
        return y, *pull(dy)

    y, dx, dw = (np.asarray(a, np.float64) for a in run(x, w, dy))
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    assert_close(y, x @ w, "logits")  # measured 2.3e-7, and 5.5e-7 of a float32 product
    assert_close(dw, np.einsum("btd,bte->de", x, dy), "dw")  # measured 1.7e-7
    np.testing.assert_allclose(dx, dy @ w.T, rtol=2**-8, atol=1e-4)  # the rounding of the result
