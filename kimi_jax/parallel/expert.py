"""Experts on several devices: tokens travel to the devices of their experts and come back as sums.

Each device keeps whole experts and its own tokens. A token goes once to every device that has one of its experts, with
the numbers and weights of these, and one row comes back: the sum of what they made of it. On the device all rows that
arrived are computed, none is dropped; buffers between devices have a fixed size, and what does not fit is dropped and
counted.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from kimi_jax.layers.moe import Experts, Matrices, mix, run_here, run_sorted
from kimi_jax.layers.router import Routing
from kimi_jax.parallel.rules import spec
from pallas_kernels.grouped_matmul.api import place_rows

MATRIX_AXES = Matrices(("experts", "embed", "ffn"), ("experts", "embed", "ffn"), ("experts", "ffn", "embed"))
HOME = "expert"  # the mesh axis over which whole experts are spread
GATHERED = "gathered weights"  # their name for rematerialisation


class Plan(NamedTuple):
    """Where a device's tokens go; lowercase letters count the tokens and experts of one device."""

    slot: Int[Array, "m N"]
    """The slot of each token in the buffers of N devices, counted through all of them; beyond the last: not sent."""
    kept: Int[Array, "m k"]
    """The expert of each choice; one beyond the last for what is dropped, and for padding."""
    tokens: int
    """Slots per device."""
    rows: int
    """Choices per device."""


def run_on_mesh(
    experts: Experts, x_BTD: Float[Array, "B T D"], routing: Routing
) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
    """Runs the experts on the mesh in use; a dispatcher of `kimi_jax.layers.moe.Moe`.

    Returns:
      (sum_k weight_k E_k(x), number of dropped choices, float32).
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
    if math.prod(mesh.shape[name] for name in free) == 1:
        return run_here(experts, x_BTD, routing)
    matrices = experts.matrices(x_BTD.dtype)
    tokens = spec(("batch", "tokens", None), x_BTD.shape, mesh)
    cuts = jax.tree.map(lambda axes, w: spec(axes, w.shape, mesh), MATRIX_AXES, matrices, is_leaf=_is_names)
    spread, _, summed = cuts.gate

    def run_part(matrices: Matrices, x_btD, routing: Routing):
        b, t, D = x_btD.shape
        whole = Matrices(*(_gather(*pair, x_btD.dtype) for pair in zip(matrices, cuts, MATRIX_AXES, strict=True)))
        expert_mk, weight_mk = (x.reshape(b * t, -1) for x in routing)
        run = _exchange if spread else _stay
        y_mD, dropped = run(experts, whole, x_btD.reshape(b * t, D), expert_mk, weight_mk)
        y_mD = lax.psum(y_mD, summed) if summed else y_mD
        return y_mD.reshape(b, t, D), lax.psum(dropped, tuple(jax.tree.leaves(tuple(tokens))))

    keep_shards = jax.checkpoint_policies.save_anything_except_these_names(GATHERED)
    return jax.shard_map(
        jax.checkpoint(run_part, policy=keep_shards),
        in_specs=(cuts, tokens, tokens),
        out_specs=(tokens, P()),
        axis_names=free,
        check_vma=False,  # kernels do not say over which axes their results vary
    )(matrices, x_BTD, routing)


def _is_names(x: object) -> bool:
    return type(x) is tuple


# ------------------------------------------------------------------ weights
def _gather(w: Float[Array, "e a b"], cut: P, names: tuple[str, ...], dtype: jnp.dtype) -> Float[Array, "e A B"]:
    """Collects matrices whose width is cut, rounded to the dtype of the products."""
    dim = names.index("embed")
    if not cut[dim]:
        return w
    return jax.ad_checkpoint.checkpoint_name(_gather_rounded(w, cut[dim], dim, dtype), GATHERED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather_rounded(w, over: str | tuple[str, ...], dim: int, dtype: jnp.dtype):
    """In the dtype of w, whose gradients are summed without rounding, though `dtype` is what travels."""
    return lax.all_gather(w.astype(dtype), over, axis=dim, tiled=True).astype(w.dtype)


_gather_rounded.defvjp(
    lambda w, over, dim, dtype: (_gather_rounded(w, over, dim, dtype), None),
    lambda over, dim, dtype, saved, dw: (lax.psum_scatter(dw, over, scatter_dimension=dim, tiled=True),),
)


# ------------------------------------------------------------------ tokens
def _stay(experts: Experts, matrices: Matrices, x_mD, expert_mk, weight_mk):
    return mix(matrices, x_mD, expert_mk, weight_mk, experts.implementation), jnp.zeros(())


def _exchange(experts: Experts, matrices: Matrices, x_mD, expert_mk, weight_mk):
    devices, own = lax.axis_size(HOME), matrices.gate.shape[0]
    plan = plan_exchange(expert_mk, experts.num_experts, devices, experts.capacity)
    slots = devices * plan.tokens
    home = jnp.arange(slots) // plan.tokens * own  # first expert of the device that a slot goes to
    expert_sk = _spread(plan.kept, plan.slot, slots, experts.num_experts) - home[:, None]
    mine_sk = (expert_sk >= 0) & (expert_sk < own)
    expert_sk = jnp.where(mine_sk, expert_sk, own)
    weight_sk = jnp.where(mine_sk, spread_slots(weight_mk, plan.slot, slots), 0)
    arrived = (_swap(a) for a in (spread_slots(x_mD, plan.slot, slots), expert_sk, weight_sk))
    y_sD = _mix_arrived(experts, matrices, *arrived, rows=devices * plan.rows)
    dropped = jnp.sum((plan.kept != expert_mk), dtype=jnp.float32)
    return sum_slots(_swap(y_sD), plan.slot), dropped


def _swap(x_s: Array) -> Array:
    """Sends the n-th part of the slots to the n-th device."""
    return lax.all_to_all(x_s, HOME, split_axis=0, concat_axis=0, tiled=True)


def plan_exchange(expert_mk: Int[Array, "m k"], num_experts: int, devices: int, capacity: float) -> Plan:
    """Finds a slot for every token on every device that it goes to.

    A device takes from another one at most `capacity` times an even share of its choices, the first ones, and hence of
    its tokens.

    Args:
      expert_mk: int32; `num_experts` is none.
      num_experts: over all devices, a multiple of `devices`.
      capacity: at least 1; from `devices` on nothing is dropped.
    """
    m, k = expert_mk.shape
    rows = min(math.ceil(capacity * m * k / devices), m * k)
    tokens = min(m, rows)
    device_mk = jnp.where(expert_mk < num_experts, expert_mk // (num_experts // devices), devices)
    row_mk, sizes_N = place_rows(device_mk, devices)
    before = jnp.cumsum(jnp.append(sizes_N, 0)) - jnp.append(sizes_N, 0)
    kept_mk = (device_mk < devices) & (row_mk - before[device_mk] < rows)
    sent_mN = jnp.any(jax.nn.one_hot(jnp.where(kept_mk, device_mk, devices), devices, dtype=bool), axis=1)
    place_mN = jnp.cumsum(sent_mN, axis=0, dtype=jnp.int32) - 1 + tokens * jnp.arange(devices, dtype=jnp.int32)[None]
    slot_mN = jnp.where(sent_mN, place_mN, _beyond(devices * tokens, sent_mN))
    return Plan(slot_mN, jnp.where(kept_mk, expert_mk, num_experts), tokens, rows)


def _mix_arrived(experts: Experts, matrices: Matrices, x_sD, expert_sk, weight_sk, *, rows: int):
    """`mix` for tokens most of whose choices are not here: at most `rows` are."""
    own = matrices.gate.shape[0]
    row_sk, sizes = place_rows(expert_sk, own)
    row_sk = jnp.where(expert_sk < own, row_sk, _beyond(rows, row_sk))
    scale = jnp.zeros(rows, weight_sk.dtype).at[row_sk].set(weight_sk, mode="drop", unique_indices=True)
    y = run_sorted(matrices, spread_slots(x_sD, row_sk, rows), scale, sizes, experts.implementation)
    return sum_slots(y, row_sk)


def _beyond(end: int, like: Array) -> Int[Array, "m k"]:
    """Places that do not exist, a different one for each entry."""
    return end + jnp.arange(like.size, dtype=jnp.int32).reshape(like.shape)


# ------------------------------------------------------------------ slots
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def spread_slots(x_mD: Float[Array, "m D"], slot_mk: Int[Array, "m k"], slots: int) -> Float[Array, "s D"]:
    """Copies x[t] to the slots slot[t, 0], slot[t, 1], ...; the others are zero. The gradient is `sum_slots`.

    Args:
      slot_mk: no number twice; those from `slots` on do not exist.
    """
    return _spread(x_mD, slot_mk, slots, 0)


def _spread(x_mD, slot_mk, slots: int, missing: int):
    m = x_mD.shape[0]
    token = jnp.full(slots, m, jnp.int32)
    token = token.at[slot_mk].set(jnp.arange(m, dtype=jnp.int32)[:, None], mode="drop", unique_indices=True)
    return x_mD.at[token].get(mode="fill", fill_value=missing)


@jax.custom_vjp
def sum_slots(y_sD: Float[Array, "s D"], slot_mk: Int[Array, "m k"]) -> Float[Array, "m D"]:
    """Sums the slots slot[t, 0], slot[t, 1], ... that exist, in float32; the gradient is `spread_slots`."""
    rows = y_sD.at[slot_mk].get(mode="fill", fill_value=0)
    return jnp.sum(rows, axis=1, dtype=jnp.promote_types(y_sD.dtype, jnp.float32)).astype(y_sD.dtype)


# Automatic differentiation would turn gathers into sums by scattering, which are slow and of no fixed order.
spread_slots.defvjp(
    lambda x, slot, slots: (spread_slots(x, slot, slots), slot),
    lambda slots, slot, dy: (sum_slots(dy, slot), None),
)
sum_slots.defvjp(
    lambda y, slot: (sum_slots(y, slot), (slot, y.shape[0])),
    lambda saved, dy: (spread_slots(dy, *saved), None),
)
