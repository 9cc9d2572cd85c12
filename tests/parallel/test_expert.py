"""Experts on several devices make what one device makes of the same tokens, and say what did not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kimi_jax.config import mesh as config
from kimi_jax.config.model import MoeFfn
from kimi_jax.experiments.plan_collectives import read_collectives
from kimi_jax.layers.moe import Moe
from kimi_jax.parallel.expert import plan_exchange, run_on_mesh
from kimi_jax.parallel.mesh import build_mesh

B, T, D, E = 8, 16, 32, 8
TOLERANCE = 1e-5  # of the largest element; measured 3.6e-7
X = jax.random.normal(jax.random.key(0), (B, T, D))
VALID = jnp.arange(T)[None] < jnp.arange(B)[:, None] + 9  # the shortest row has 9 tokens
MESHES = [
    {"expert": 4, "data": 2},
    {"expert": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 4, "context": 2},
    {"expert": 2, "context": 4},
]
PACKED = (3.5, {"expert": 8})  # not all tokens have room everywhere, yet all that are sent have


def _build(capacity: float):
    """The loss's value and gradients for parameters and inputs, and the parameters."""
    cfg = MoeFfn(num_experts=E, top_k=2, hidden_dim=16, capacity=capacity)
    moe = Moe(cfg, model_dim=D, std=0.1, rngs=nnx.Rngs(params=jax.random.key(1)), dispatch=run_on_mesh)
    graphdef, params, rest = nnx.split(moe, nnx.Param, ...)

    def loss(params, x):
        addends, stats = nnx.merge(graphdef, params, rest)(x, VALID)
        y = sum(addends)
        return jnp.sum(y**2) + stats.balance_loss, (y, stats)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)), params


def _run(capacity: float, sizes: dict[str, int] | None = None):
    step, params = _build(capacity)
    if sizes is None:
        return jax.device_get(step(params, X))
    with jax.set_mesh(build_mesh(config.Mesh(**sizes))):
        return jax.device_get(step(params, X))


@pytest.fixture(scope="module")
def one_device():
    return _run(float(E))


@pytest.mark.multi_device
@pytest.mark.parametrize(("capacity", "sizes"), [*((float(E), sizes) for sizes in MESHES), PACKED], ids=str)
def test_values_and_gradients_equal_those_of_one_device(one_device, capacity, sizes):
    got = _run(capacity, sizes)
    worst = 0.0
    for one, many in zip(jax.tree.leaves(one_device), jax.tree.leaves(got), strict=True):
        worst = max(worst, np.abs(many - one).max() / max(np.abs(one).max(), 1))
    print(f"{sizes}: {worst:.1e}")
    assert worst < TOLERANCE
    assert got[0][1][1].dropped == 0


@pytest.mark.multi_device
def test_sums_over_parts_of_experts_are_of_tokens_not_of_slots():
    step, params = _build(float(E))
    mesh = build_mesh(config.Mesh(expert=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        text = step.lower(params, X).compile().as_text()
    sent = {found.axes: found.sent_bytes for found in read_collectives(text, dict(mesh.shape))}
    tokens = B * T // 4
    routed, shared = 3 * D + 2, 2 * D  # results, their gradients, those of tokens and of weights; results, gradients
    assert sent["tensor",] == 4 * tokens * (routed + shared)


@pytest.mark.multi_device
def test_what_does_not_fit_is_counted_and_left_out(one_device):
    """The tokens of which nothing was dropped are as on one device."""
    (_, (y, stats)), _ = _run(1.0, {"expert": 4, "data": 2})
    want = one_device[0][1][0]
    same = np.abs(y - want).max(axis=-1) < TOLERANCE * np.abs(want).max()
    changed = int((~same).sum())
    assert 0 < changed <= stats.dropped < 0.2 * stats.load.sum()
    assert same[~np.asarray(VALID)].all()


# ------------------------------------------------------------------ the plan, without devices
def _draw(seed: int, m: int, k: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    expert = np.stack([random.permutation(E)[:k] for _ in range(m)]).astype(np.int32)
    expert[random.random(m) < 0.2] = E  # padding
    return expert


@pytest.mark.parametrize("devices, capacity", [(2, 1.0), (4, 1.25), (4, 4.0)])
def test_a_token_has_one_slot_on_each_device_that_it_goes_to(devices, capacity):
    expert = _draw(0, 24, 3)
    plan = plan_exchange(jnp.asarray(expert), E, devices, capacity)
    slot, kept, own = np.asarray(plan.slot), np.asarray(plan.kept), E // devices
    sent = slot < devices * plan.tokens
    assert len(np.unique(slot)) == slot.size, "no slot twice"
    np.testing.assert_array_equal((slot // plan.tokens)[sent], np.broadcast_to(np.arange(devices), slot.shape)[sent])
    goes = np.stack([((kept // own == n) & (kept < E)).any(1) for n in range(devices)], 1)
    np.testing.assert_array_equal(sent, goes)
    assert ((kept == expert) | (kept == E)).all()
    for n in range(devices):
        wanted, arrived = (np.sum((e // own == n) & (e < E)) for e in (expert, kept))
        assert arrived == min(wanted, plan.rows), "as many choices as fit"
    if capacity >= devices:
        np.testing.assert_array_equal(kept, expert)
