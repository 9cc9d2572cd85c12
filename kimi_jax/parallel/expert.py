"""Experts on several devices: tokens travel to the devices of their experts and come back as sums.

Each device keeps whole experts and its own tokens. A token goes once to every device that has one of its experts, or to
all where there is room for all, with the numbers and weights of its experts, and one row comes back: the sum of what
they made of it. On the device all rows that arrived are computed, none is dropped; buffers between devices have a fixed
size, and what does not fit is dropped and counted.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from kimi_jax.layers.moe import Addends, Experts, Matrices, mix, run_here, run_sorted
from kimi_jax.layers.router import Routing
from kimi_jax.parallel.rules import spec
from kimi_jax.parallel.weights import gather_rounded, in_turn
from pallas_kernels.grouped_matmul.api import SPARE, place_rows, spread_rows

MATRIX_AXES = Matrices(("experts", "embed", "ffn"), ("experts", "embed", "ffn"), ("experts", "ffn", "embed"))
HOME = "expert"  # the mesh axis over which whole experts are spread


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
    experts: Experts,
    x_BTD: Float[Array, "B T D"],
    routing: Routing,
    beside: Callable[[Float[Array, "B T D"]], Float[Array, "B T D"]],
) -> tuple[Addends, Float[Array, ""]]:
    """Runs the experts on the mesh in use; a dispatcher of `kimi_jax.layers.moe.Moe`.

    Args:
      beside: what is computed while rows come back, and while their gradients leave.

    Returns:
      ((beside(x), sum_k weight_k E_k(x)), number of dropped choices, float32).
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
    if math.prod(mesh.shape[name] for name in free) == 1:
        return run_here(experts, x_BTD, routing, beside)
    matrices = experts.matrices(x_BTD.dtype)
    tokens = spec(("batch", "tokens", None), x_BTD.shape, mesh)
    parts = tuple(jax.tree.leaves(tuple(tokens)))
    cuts = jax.tree.map(lambda axes, w: spec(axes, w.shape, mesh), MATRIX_AXES, matrices, is_leaf=_is_names)
    spread, _, summed = cuts.gate
    travel = HOME in jax.tree.leaves(spread)

    def run_part(matrices: Matrices, x_btD, routing: Routing):
        whole = Matrices(*(_gather(*pair, x_btD.dtype) for pair in zip(matrices, cuts, MATRIX_AXES, strict=True)))
        if travel:  # while the gradients of tokens leave, those of the matrices are computed
            x_btD, whole = in_turn(x_btD, whole)
        flat = (x.reshape(-1, x.shape[-1]) for x in (x_btD, *routing))
        y_sD, slot_mN, dropped = (_mix_away if travel else _mix_at_home)(experts, whole, *flat)
        return y_sD, slot_mN, lax.psum(dropped, parts)

    def bring_back(y_sD, slot_mN):
        y_mD = _bring_back(y_sD, slot_mN) if travel else y_sD
        y_mD = lax.psum(y_mD, summed) if summed else y_mD  # there are more slots than tokens: sums travel last
        return y_mD.reshape(jax.sharding.NamedSharding(mesh, tokens).shard_shape(x_BTD.shape))

    cut = functools.partial(jax.shard_map, axis_names=free, check_vma=False)  # kernels do not say what varies where
    results = P((*parts, *jax.tree.leaves(summed))), P(parts)
    run = cut(run_part, in_specs=(cuts, tokens, tokens), out_specs=(*results, P()))
    y_SD, slot_MN, dropped = run(matrices, x_BTD, routing)
    if travel:  # rows are ready to leave before the rest begins
        x_BTD, y_SD = lax.optimization_barrier((x_BTD, y_SD))
    beside_BTD = beside(x_BTD)
    if travel:  # XLA would have its last product add up what comes back, and so wait for it
        beside_BTD = lax.optimization_barrier(beside_BTD)
    return (beside_BTD, cut(bring_back, in_specs=results, out_specs=tokens)(y_SD, slot_MN)), dropped


def _is_names(x: object) -> bool:
    return type(x) is tuple


# ------------------------------------------------------------------ weights
def _gather(w: Float[Array, "e a b"], cut: P, names: tuple[str, ...], dtype: jnp.dtype) -> Float[Array, "e A B"]:
    """Collects matrices that are cut over other axes than `HOME` and those of sums, rounded to the products' dtype."""
    for dim, name in enumerate(names):
        over = tuple(axis for axis in jax.tree.leaves(cut[dim]) if axis != HOME and name != "ffn")
        w = gather_rounded(w, over, dim, dtype) if over else w
    return w


# ------------------------------------------------------------------ tokens
def _mix_at_home(experts: Experts, matrices: Matrices, x_mD, expert_mk, weight_mk):
    return mix(matrices, x_mD, expert_mk, weight_mk, experts.implementation), None, jnp.zeros(())


def _mix_away(experts: Experts, matrices: Matrices, x_mD, expert_mk, weight_mk):
    """What this device's experts make of all tokens that come here, and the slots of those that went from here.

    Where every token has room on every device there are no slots: all tokens go everywhere.
    """
    devices, own = lax.axis_size(HOME), matrices.gate.shape[0]
    plan = plan_exchange(expert_mk, experts.num_experts, devices, experts.capacity)
    everywhere = plan.tokens == len(x_mD)
    x_sD, expert_sk, weight_sk = (_send_to_all if everywhere else _send)(plan, x_mD, weight_mk, experts.num_experts)
    expert_sk -= lax.axis_index(HOME) * own
    mine_sk = (expert_sk >= 0) & (expert_sk < own)
    expert_sk, weight_sk = jnp.where(mine_sk, expert_sk, own), jnp.where(mine_sk, weight_sk, 0)
    y_sD = _mix_arrived(experts, matrices, x_sD, expert_sk, weight_sk, rows=devices * plan.rows)
    dropped = jnp.sum((plan.kept != expert_mk), dtype=jnp.float32)
    return y_sD, None if everywhere else plan.slot, dropped


def _bring_back(y_sD, slot_mN):
    return from_all(y_sD) if slot_mN is None else sum_slots(_swap(y_sD), slot_mN)


def _send(plan: Plan, x_mD, weight_mk, none: int):
    slots = lax.axis_size(HOME) * plan.tokens
    expert_sk = _spread(plan.kept, plan.slot, slots, none)
    x_sD, weight_sk = (spread_slots(a, plan.slot, slots) for a in (x_mD, weight_mk))
    return _swap(x_sD), _swap(expert_sk), _swap(weight_sk)


def _swap(x_s: Array) -> Array:
    """Sends the n-th part of the slots to the n-th device."""
    return lax.all_to_all(x_s, HOME, split_axis=0, concat_axis=0, tiled=True)


def _send_to_all(plan: Plan, x_mD, weight_mk, none: int):
    copies = (lax.axis_size(HOME), 1)  # XLA would join small all-gathers with those of parameters, which then wait
    return to_all(x_mD), _swap(jnp.tile(plan.kept, copies)), _swap(jnp.tile(weight_mk, copies))


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
    place_sk, sizes = place_rows(expert_sk, matrices.gate.shape[0])
    scale = jnp.zeros(rows, weight_sk.dtype).at[place_sk].set(weight_sk, mode="drop", unique_indices=True)
    how = experts.implementation
    x_rD = fill_rows(x_sD, place_sk, jnp.sum(sizes), rows, how)
    y_rD = run_sorted(matrices, x_rD, scale, sizes, how, clear=False)
    return sum_filled(y_rD, place_sk, jnp.sum(sizes), how)


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


@jax.custom_vjp
def to_all(x_mD: Float[Array, "m D"]) -> Float[Array, "s D"]:
    """The tokens of all devices, one device's behind the other's; the gradient is `from_all`."""
    return lax.all_gather(x_mD, HOME, axis=0, tiled=True)


@jax.custom_vjp
def from_all(y_sD: Float[Array, "s D"]) -> Float[Array, "m D"]:
    """Sums what all devices made of this one's tokens, in float32; the gradient is `to_all`."""
    y_nmD = _swap(y_sD).reshape(lax.axis_size(HOME), -1, *y_sD.shape[1:])
    return jnp.sum(y_nmD, axis=0, dtype=jnp.promote_types(y_sD.dtype, jnp.float32)).astype(y_sD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def fill_rows(
    x_sD: Float[Array, "s D"], place_sk: Int[Array, "s k"], used: Int[Array, ""], rows: int, implementation: str
) -> Float[Array, "r D"]:
    """Copies x[t] to the rows place[t, 0], place[t, 1], ...; the gradient is `sum_filled`.

    Args:
      place_sk: every number from 0 to s k once; those from `rows` on do not exist.
      used: rows that count; of the others those that products may read hold copies, of which nothing comes.
    """
    read = place_sk < used + SPARE
    return spread_rows(x_sD, jnp.where(read, place_sk, place_sk + rows), implementation, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def sum_filled(
    y_rD: Float[Array, "r D"], place_sk: Int[Array, "s k"], used: Int[Array, ""], implementation: str
) -> Float[Array, "s D"]:
    """Sums the rows place[t, 0], place[t, 1], ... that count, in float32; the gradient is `fill_rows`."""
    return sum_slots(y_rD, jnp.where(place_sk < used, place_sk, len(y_rD)))


# Automatic differentiation would turn gathers into sums by scattering, which are slow and of no fixed order.
spread_slots.defvjp(
    lambda x, slot, slots: (spread_slots(x, slot, slots), slot),
    lambda slots, slot, dy: (sum_slots(dy, slot), None),
)
sum_slots.defvjp(
    lambda y, slot: (sum_slots(y, slot), (slot, y.shape[0])),
    lambda saved, dy: (spread_slots(dy, *saved), None),
)
to_all.defvjp(lambda x: (to_all(x), None), lambda _, dy: (from_all(dy),))
from_all.defvjp(lambda y: (from_all(y), None), lambda _, dy: (to_all(dy),))
fill_rows.defvjp(
    lambda x, place, used, rows, implementation: (fill_rows(x, place, used, rows, implementation), (place, used)),
    lambda rows, implementation, saved, dy: (sum_filled(dy, *saved, implementation), None, None),
)
sum_filled.defvjp(
    lambda y, place, used, implementation: (sum_filled(y, place, used, implementation), (place, used, len(y))),
    lambda implementation, saved, dy: (fill_rows(dy, *saved, implementation), None, None),
)
