"""Operators over several devices: what is cut, what stays whole, and that kernels compile for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.config import mesh as config
from kimi_jax.config.load import load
from kimi_jax.config.train import RunConfig
from kimi_jax.parallel.mesh import build_mesh
from kimi_jax.parallel.rules import batch_sharding
from kimi_jax.train.state import Recipe
from kimi_jax.train.step import build_train_step
from pallas_kernels import dispatch, hopper
from pallas_kernels.logits import api as logits
from pallas_kernels.logits import relative, xla
from pallas_kernels.mla.api import mla_attention
from pallas_kernels.partition import Axes, partition

multi_device = pytest.mark.multi_device
SEEN = Axes(("B-H", "H", ""), ("B-H", "B"), {"ids": "B"})


def _see(x, weight, number, *, ids, factor):
    """Needs whole rows and heads; the second result says how large a part was."""
    shape = jnp.asarray([*x.shape, *weight.shape, *ids.shape], jnp.int32)
    return factor * (x * weight[None, None] + number), jnp.broadcast_to(shape[None], (x.shape[0], shape.size))


@multi_device
@pytest.mark.parametrize(
    "sizes, rows, heads, part",
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, 8, 4, (2, 2)),
        ({"data": 2, "expert": 4}, 8, 4, (1, 4)),
        ({"data": 2, "fsdp": 4}, 6, 4, (3, 4)),  # four parts of three rows there are not
        ({"data": 1, "tensor": 8}, 8, 4, (8, 4)),  # nor eight parts of four heads
    ],
    ids=str,
)
def test_rows_and_heads_are_cut_where_they_divide(sizes, rows, heads, part):
    x = jnp.arange(rows * 3 * heads, dtype=jnp.float32).reshape(rows, 3, heads)
    weight, ids = jnp.arange(1.0, heads + 1), jnp.ones((rows, 3), jnp.int32)

    def run(x, weight, number):
        return partition(_see, SEEN, (x, weight, number), {"ids": ids, "factor": 2.0})

    def loss(*arguments):
        return jnp.sum(jnp.sin(run(*arguments)[0]))

    arguments = (x, weight, jnp.float32(3))
    want, gradients = jax.jit(run)(*arguments)[0], jax.grad(loss, argnums=(0, 1, 2))(*arguments)
    with jax.set_mesh(build_mesh(config.Mesh(**sizes))):
        got, shape = jax.jit(run)(*arguments)
        for one, many in zip(gradients, jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arguments), strict=True):
            np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-4)  # sums of 72 terms up to 2 x 8
    np.testing.assert_array_equal(got, want)
    assert tuple(np.asarray(shape)[0]) == (part[0], 3, part[1], part[1], part[0], 3)


@multi_device
def test_the_largest_logit_of_a_head_is_that_of_all_rows():
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = {"q_nope": (8, 16, 4, 8), "q_shared": (8, 16, 4, 4), "k_nope": (8, 16, 4, 8), "k_shared": (8, 16, 4)}
    arrays = [jax.random.normal(k, s) for k, s in zip(keys, [*shapes.values(), (8, 16, 4, 8)], strict=True)]
    attend = jax.jit(functools.partial(mla_attention, implementation="xla"))
    want = attend(*arrays)
    with jax.set_mesh(build_mesh(config.Mesh(data=2, fsdp=2, tensor=2))):
        got = attend(*arrays)
    for one, many in zip(want, got, strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-6, atol=1e-6)


def _relative(*arguments, z_weight, cut_over):
    """The kernel's form with exponentials in plain JAX."""

    def exponentials(x, weight, reference):
        powers = jnp.exp(jnp.einsum("MD,DA->MA", x, weight) - reference[:, None])
        return powers, jnp.sum(powers, 1)

    return relative.cross_entropy_gradients(exponentials, *arguments, z_weight, cut_over)


@multi_device
@pytest.mark.parametrize("form", [xla.cross_entropy_gradients, _relative])
def test_gradients_of_a_vocabulary_in_parts(monkeypatch, form):
    monkeypatch.setattr(logits, "IMPLEMENTATIONS", {"form": dispatch.Implementation(form)})
    keys = jax.random.split(jax.random.key(0), 3)
    x, weight = jax.random.normal(keys[0], (12, 8)), jax.random.normal(keys[1], (8, 32))
    targets, scale = jax.random.randint(keys[2], (12,), 0, 32), jnp.arange(12.0) / 12
    run = jax.jit(functools.partial(logits.cross_entropy_gradients, z_weight=0.1))
    want = run(x, weight, targets, scale)
    with jax.set_mesh(build_mesh(config.Mesh(data=2, tensor=4))):
        got = run(x, weight, targets, scale)
    for one, many in zip(want, got, strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-6)  # measured 3.6e-6 of values up to 4.8


KERNELS = [  # sizes that the Hopper kernels take; bfloat16
    "model.num_layers=2",
    "model.pattern=[kda, mla]",
    "model.model_dim=256",
    "model.vocab_size=512",
    "model.mixers.kda={kind: kda, num_heads: 2, implementation: mosaic_gpu}",
    "model.mixers.mla={kind: mla, num_heads: 2, implementation: mosaic_gpu}",
    "model.ffn={kind: moe, num_experts: 32, top_k: 2, hidden_dim: 256, implementation: mosaic_gpu}",
    "model.dense_hidden_dim=256",
    "train.batch_size=8",
    "data.seq_len=1024",
]


@multi_device
@pytest.mark.parametrize("sizes", [{"fsdp": 2, "expert": 2, "tensor": 2}, {"data": 2, "fsdp": 4}], ids=str)
def test_kernels_lower_for_several_gpus(monkeypatch, caplog, sizes):
    """A kernel outside `shard_map` would be refused: XLA cannot cut it."""
    monkeypatch.setattr(dispatch, "_told", set())
    cfg = load("experiments/sizes/bench.yaml", [*KERNELS, *(f"mesh.{k}={v}" for k, v in sizes.items())], RunConfig)
    mesh = build_mesh(cfg.mesh)
    recipe, sharding = Recipe(cfg), batch_sharding(mesh)
    dtypes = {"inputs": jnp.int32, "targets": jnp.int32, "segment_ids": jnp.int32, "loss_mask": jnp.bool_}
    batch = {name: jax.ShapeDtypeStruct((8, 1024), dtype, sharding=sharding) for name, dtype in dtypes.items()}
    with jax.set_mesh(mesh), hopper.compiling_for("9.0"):
        traced = jax.jit(build_train_step(recipe)).trace(recipe.abstract_state(mesh), batch)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 12, "attention, recurrence, convolution, norm, experts and their gradients"
    assert not caplog.messages, "nothing slower runs in place of a kernel"
