"""What a training step sends over each axis of the mesh, in closed form, in bytes per device (docs/scaling.md)."""

import collections
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kimi_jax.config.mixer import MlaMixer, ShortConv
from kimi_jax.config.model import MoeFfn
from kimi_jax.config.train import NoRemat, RunConfig
from kimi_jax.experiments.plan_hardware import Hardware
from kimi_jax.models.layout import layer_kinds
from kimi_jax.parallel.expert import HOME
from kimi_jax.parallel.matrices import Layout, layout_of, sharers
from kimi_jax.parallel.rules import RULES, spec
from kimi_jax.train.muon import map_stacks
from kimi_jax.train.state import Recipe
from kimi_jax.types import PyTree

GRADIENT_AXES = RULES["batch"] + RULES["tokens"]  # over which parts of a batch lie, so that gradients are summed


@dataclass(frozen=True)
class Traffic:
    """One reason to send.

    Args:
      axes: of the mesh.
      what: travels.
      sent_bytes: by each device per step.
      direct: to every other device something else (all-to-all), not round a ring.
    """

    axes: tuple[str, ...]
    what: str
    sent_bytes: float
    direct: bool = False


def count_traffic(recipe: Recipe, params: PyTree, mesh: jax.sharding.AbstractMesh) -> list[Traffic]:
    """Counts all axes; exchanges of a few numbers per token or per step are left out.

    Args:
      params: shapes and dtypes, as in `recipe.abstract_state()`.
    """
    cfg, sums = recipe.cfg, collections.defaultdict(float)
    kinds = [*_parameters(recipe, params, mesh), *_tensor(cfg, mesh), *_experts(cfg, mesh), *_context(cfg, mesh)]
    for traffic in [*kinds, *_muon(recipe, mesh)]:
        sums[traffic.axes, traffic.what, traffic.direct] += traffic.sent_bytes
    return [Traffic(axes, what, size, direct) for (axes, what, direct), size in sums.items() if size]


def seconds(traffic: Traffic, hardware: Hardware, mesh_shape: Mapping[str, int]) -> float:
    """At the rate of the links that the axes lie over; the last axes are neighbours."""
    names = list(mesh_shape)
    size = math.prod(mesh_shape[axis] for axis in traffic.axes)
    last = max(names.index(axis) for axis in traffic.axes)
    stride = math.prod(mesh_shape[axis] for axis in names[last + 1 :])
    if not traffic.direct:
        return traffic.sent_bytes / hardware.ring_bytes_per_s(size, stride)
    near = hardware.neighbours(size, stride)
    outside = (size - near) / max(size - 1, 1)
    gpu = hardware.gpu
    return traffic.sent_bytes * max((1 - outside) / gpu.link_bytes_per_s, outside / gpu.network_bytes_per_s)


def activation_bytes(cfg: RunConfig) -> int:
    """Per element that travels."""
    return jnp.dtype(cfg.model.dtype).itemsize


def recomputes(cfg: RunConfig) -> bool:
    """Whether the backward pass runs blocks forward once more."""
    return not isinstance(cfg.train.remat, NoRemat)


# ------------------------------------------------------------------ parameters
def _parameters(recipe: Recipe, params: PyTree, mesh) -> Iterator[Traffic]:
    """Gathered once, and once more where blocks are recomputed; gradients are summed where the parameter lies.

    Over axes that cut the batch but not the parameter its gradient is summed on all devices.
    """
    times, gathers = recipe.cfg.train.grad_accum, 1 + recomputes(recipe.cfg)
    is_axes = lambda x: isinstance(x, tuple)
    for leaf, axes in zip(jax.tree.leaves(params), jax.tree.leaves(recipe.logical_axes, is_leaf=is_axes), strict=True):
        cuts = spec(axes, leaf.shape, mesh)
        cut = {name for part in cuts for name in jax.tree.leaves(part)}
        at_home = {a for name, part in zip(axes, cuts, strict=True) if name == "experts" for a in jax.tree.leaves(part)}
        gathered = [a for a in GRADIENT_AXES if a in cut and not (a == HOME and a in at_home)]
        whole = leaf.size / math.prod(mesh.shape[a] for a in cut if a not in gathered)
        item = min(leaf.dtype.itemsize, activation_bytes(recipe.cfg)) if leaf.ndim > 1 else leaf.dtype.itemsize
        n = math.prod(mesh.shape[a] for a in gathered)
        if n > 1:
            share = whole * (n - 1) / n
            yield Traffic(tuple(gathered), "parameters, gathered", times * gathers * share * item)
            yield Traffic(tuple(gathered), "gradients, scattered", times * share * leaf.dtype.itemsize)
        copies = tuple(a for a in GRADIENT_AXES if a not in cut and mesh.shape[a] > 1)
        c = math.prod(mesh.shape[a] for a in copies)
        if c > 1:
            yield Traffic(copies, "gradients, summed", times * 2 * whole / n * (c - 1) / c * leaf.dtype.itemsize)


def _muon(recipe: Recipe, mesh) -> Iterator[Traffic]:
    """Once per step each matrix is put together on one device and given back (`kimi_jax.parallel.matrices`)."""
    several = [name for name in mesh.axis_names if mesh.shape[name] > 1]
    size = lambda names: math.prod(mesh.shape[name] for name in names)
    parts, matrices, layouts = {}, {}, {}
    for path, assigned in recipe.assignments.items():
        if kind := assigned.matrix:
            cuts = spec(assigned.axes, assigned.shape, mesh)
            shape = [whole // size(jax.tree.leaves(part)) for whole, part in zip(assigned.shape, cuts, strict=True)]
            parts[path], matrices[path] = jax.ShapeDtypeStruct(shape, jnp.float16), kind
            layouts[path] = layout_of(cuts, kind.batch, kind.rows, several)
    stacks: list[tuple[tuple[int, ...], Layout]] = []

    def note(stack, layout: Layout):
        stacks.append((stack.shape, layout))
        return stack

    jax.eval_shape(lambda tree: map_stacks(note, tree, matrices, layouts), parts)
    for (number, rows, columns), layout in stacks:
        copies = sharers(layout, number, size)
        devices = size(layout.cuts + copies)
        held = 2 * -(-number // devices) * devices * rows * columns
        for names in (layout.rows, layout.columns):
            sent = 2 * held / size(copies) * (1 - 1 / size(names))
            yield Traffic(names, "matrices, put together and given back", sent, direct=True)
        yield Traffic(copies, "updates, gathered", held * (1 - 1 / size(copies)))


# ------------------------------------------------------------------ activations
def local_tokens(cfg: RunConfig, mesh) -> float:
    """Of one microbatch on one device."""
    rows = cfg.train.batch_size // cfg.train.grad_accum
    cuts = spec(("batch", "tokens"), (rows, cfg.data.seq_len), mesh)
    parts = math.prod(mesh.shape[name] for part in cuts for name in jax.tree.leaves(part))
    return rows * cfg.data.seq_len / parts


def _tensor(cfg: RunConfig, mesh) -> Iterator[Traffic]:
    """Each block sums the results of its mixer and of its feed-forward part; backward the gradients of their inputs.

    Embedding and head are cut over the vocabulary: a sum forward, and one backward.
    """
    n = mesh.shape["tensor"]
    if n == 1:
        return
    sums = 2 * cfg.model.num_layers * (2 + recomputes(cfg)) + 2
    size = local_tokens(cfg, mesh) * cfg.model.model_dim * activation_bytes(cfg)
    yield Traffic(("tensor",), "activations, summed", cfg.train.grad_accum * sums * 2 * size * (n - 1) / n)


def _experts(cfg: RunConfig, mesh) -> Iterator[Traffic]:
    """Tokens go to the devices of their experts and one row comes back, backward their gradients.

    What is recomputed sends the tokens once more, but needs no results.
    """
    n = mesh.shape["expert"]
    if n == 1 or not isinstance(cfg.model.ffn, MoeFfn):
        return
    ffn, m = cfg.model.ffn, local_tokens(cfg, mesh)
    slots = n * min(m, ffn.capacity * m * ffn.top_k / n)
    row = activation_bytes(cfg) * cfg.model.model_dim
    numbers = ffn.top_k * (4 + 4)  # of experts and their weights
    layers = sum(isinstance(kind, MoeFfn) for _, kind in layer_kinds(cfg.model))
    sent = slots * (n - 1) / n * (4 * row + 1.5 * numbers + recomputes(cfg) * (row + numbers))
    yield Traffic(("expert",), "tokens, to their experts and back", cfg.train.grad_accum * layers * sent, direct=True)


def _context(cfg: RunConfig, mesh) -> Iterator[Traffic]:
    """See `kimi_jax.parallel.context`; the backward pass sends as much as the forward pass, and what attention reads
    once more where it is recomputed."""
    c = mesh.shape["context"]
    if c == 1:
        return
    tokens = local_tokens(cfg, mesh)
    rows = tokens * c / cfg.data.seq_len
    times = cfg.train.grad_accum * 2
    for mixer, _ in layer_kinds(cfg.model):
        heads = lambda number: number / (mesh.shape["tensor"] if number % mesh.shape["tensor"] == 0 else 1)
        if isinstance(mixer, MlaMixer):
            share = times * activation_bytes(cfg) * (c - 1) / c * (1 + recomputes(cfg) / 2)
            latents = tokens * c * (mixer.latent_dim + mixer.rope_dim)
            queries = tokens * heads(mixer.num_heads) * (mixer.query_dim + mixer.value_dim)
            yield Traffic(("context",), "latents", share * latents)
            yield Traffic(("context",), "queries and results", share * queries, direct=True)
            continue
        H, HV, K, V = heads(mixer.num_heads), heads(mixer.value_heads), mixer.key_dim, mixer.value_dim
        sent = 4 * (c - 1) * HV * K * (K + V)
        if isinstance(mixer.conv, ShortConv):
            channels = 2 * H * K + HV * V
            sent += activation_bytes(cfg) * (c - 1) * (mixer.conv.width - 1) * channels
        yield Traffic(("context",), "states and last inputs", times * rows * sent)
