"""Sequences cut in time over simulated devices give what one device gives: operators, mixers, whole models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from kimi_jax.config import mesh as config
from kimi_jax.config.load import load
from kimi_jax.config.train import RunConfig
from kimi_jax.errors import UserError
from kimi_jax.experiments.plan_collectives import read_collectives
from kimi_jax.layers.cache import place_tokens
from kimi_jax.parallel.mesh import abstract_mesh, build_mesh, check_run
from kimi_jax.parallel.rules import batch_sharding
from kimi_jax.train.state import Recipe
from kimi_jax.train.step import build_gradients
from pallas_kernels.kda import SoftplusGate, mirror, mirror_vjp, mosaic_gpu
from pallas_kernels.kda.api import AXES, chunk_kda
from pallas_kernels.mla.api import mla_latent_attention
from pallas_kernels.partition import _choose_parts, partition
from pallas_kernels.short_conv.api import short_conv
from pallas_kernels.ssd.api import chunk_ssd

multi_device = pytest.mark.multi_device
# Largest error over the largest magnitude on one device, of values and every gradient.
OPERATOR_TOLERANCE = 3e-6  # measured 9.4e-7
KERNEL_TOLERANCE = 1e-2  # operands are float16, and states come another way; measured 6.2e-3
MODEL_TOLERANCE = 1e-5  # measured 3.5e-6
LOSS_TOLERANCE = 1e-6  # measured 8.5e-8


def _mesh(**sizes):
    return build_mesh(config.Mesh(**sizes), jax.devices()[: int(np.prod(list(sizes.values())))])


def _worst(got, want) -> dict[str, float]:
    def error(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape and np.all(np.isfinite(a))
        return np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)

    leaves, paths = jax.tree.leaves(got), jax.tree_util.tree_leaves_with_path(want)
    return {
        jax.tree_util.keystr(path): error(a, b) for a, (path, b) in zip(leaves, paths, strict=True) if np.abs(b).max()
    }


# ------------------------------------------------------------------ operators
B, H, HV, K, V = 3, 1, 2, 8, 16
T = {"chunk_kda": 256, "chunk_ssd": 256, "short_conv": 64, "kernels": 1024}


def _segments(kind: str, rows: int, length: int) -> np.ndarray | None:
    """Documents of up to three rows: none; boundaries inside, at and across eighths; random ones with much padding."""
    if kind == "none":
        return None
    if kind == "random":
        rng = np.random.default_rng(5)
        ids = np.cumsum(rng.random((rows, length)) < 6 / length, axis=1) + 1
        return np.where(rng.random((rows, length)) < 0.6, 0, ids).astype(np.int32)
    eighth, ids = length // 8, np.ones((3, length), np.int32)
    ids[0] = (
        1 + (np.arange(length) >= eighth) + (np.arange(length) >= 5 * eighth // 2) + (np.arange(length) > length - 3)
    )
    ids[1] = np.where(np.arange(length) // eighth % 3 == 1, 0, 7)  # whole spans of padding inside a document
    ids[2, : 2 * eighth] = 3
    ids[2, -3 * eighth // 2 :] = 0
    return ids[:rows]


def _inputs(op: str):
    rng, length = np.random.default_rng(0), T[op]
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    if op == "short_conv":
        return draw(B, length, 8), draw(8, 4)
    q, k, v = draw(B, length, H, K), draw(B, length, H, K), draw(B, length, HV, V)
    beta, raw = jax.nn.sigmoid(draw(B, length, HV)), draw(B, length, HV, K)
    if op == "chunk_ssd":
        return q, k, v, -jnp.abs(raw[..., 0]) / 30, beta
    return q, k, v, raw, beta, SoftplusGate(draw(HV) - 1.5, draw(HV, K) - 3)  # far tokens still matter


def _apply(op: str, inputs, ids):
    """(result, what the sequence leaves behind); `kernels`: the mirrors of the Hopper kernels."""
    if op == "short_conv":
        return short_conv(*inputs, segment_ids=ids)
    if op == "chunk_ssd":
        return chunk_ssd(*inputs, segment_ids=ids, implementation="chunked")
    *arrays, gate = inputs
    if op == "chunk_kda":
        return chunk_kda(*arrays, gate=gate, segment_ids=ids, normalize_qk=True, implementation="chunked")

    def kernels(*arrays, gate, segment_ids, axis=None):
        passes = mirror.prepare, mirror.recur, mirror_vjp.backward
        options = mosaic_gpu.Options(0.3, True, *passes, count_segments=lambda *_, **__: 2, axis=axis)
        return mosaic_gpu.padded(options, *(x.astype(jnp.bfloat16) for x in arrays), gate, None, segment_ids)

    return partition(kernels, AXES, tuple(arrays), {"gate": gate, "segment_ids": ids})


@functools.partial(jax.jit, static_argnums=0)
def _values_and_gradients(op: str, inputs, ids):
    out, pull = jax.vjp(lambda inputs: _apply(op, inputs, ids), inputs)
    draw = lambda key, x: jax.random.normal(key, x.shape, x.dtype)
    return out, pull(tuple(map(draw, jax.random.split(jax.random.key(1)), out)))


CASES = [
    (op, segments) for op in T for segments in ("none", "edges", "random") if (op, segments) != ("kernels", "none")
]


@multi_device
@pytest.mark.parametrize(("op", "segments"), CASES)
def test_operators_hand_states_and_inputs_on(op, segments):
    """Values, last state and gradients of every input, on 2, 4 and 8 devices."""
    inputs, ids = _inputs(op), _segments(segments, B, T[op])
    want = _values_and_gradients(op, inputs, ids)
    for devices in (8,) if op == "kernels" else (2, 4, 8):
        with jax.set_mesh(_mesh(context=devices)):
            errors = _worst(_values_and_gradients(op, inputs, ids), want)
        print(f"{op} {segments} {devices}: {max(errors.values()):.1e}")
        assert max(errors.values()) < (KERNEL_TOLERANCE if op == "kernels" else OPERATOR_TOLERANCE), errors


def _sent(run, *inputs) -> dict[str, int]:
    """Bytes that each of eight devices sends, by kind of collective."""
    mesh = _mesh(context=8)
    with jax.set_mesh(mesh):
        text = jax.jit(run).lower(*inputs).compile().as_text()
    return {found.kind: found.sent_bytes for found in read_collectives(text, dict(mesh.shape))}


@multi_device
def test_what_recurrent_layers_send_does_not_depend_on_the_length():
    *arrays, gate = _inputs("chunk_kda")
    run = lambda *a: chunk_kda(*a, gate=gate, normalize_qk=True, implementation="chunked")[0]
    for length in (128, 256):
        assert _sent(run, *(x[:, :length] for x in arrays)) == {"all-gather": 4 * 7 * B * HV * K * (K + V)}


@multi_device
def test_attention_sends_latents_queries_and_results():
    length, heads, latent, shared, nope, value = 128, 8, 12, 4, 6, 10
    zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
    queries = zeros(B, length, heads, nope), zeros(B, length, heads, shared)
    keys = zeros(B, length, latent), zeros(B, length, shared), zeros(latent, heads, nope + value)
    run = lambda *a: mla_latent_attention(*a, expand=functools.partial(jnp.einsum, "BTR,RHK->BTHK"))[0]
    assert _sent(run, *queries, *keys) == {
        "all-gather": 4 * 7 * B * length * (latent + shared) // 8,
        "all-to-all": 4 * 7 * B * length // 8 * heads * (nope + shared + value) // 8,
    }


# ------------------------------------------------------------------ models
SIZES = {
    "kda": ["model.pattern=[kda]"],
    "gdn": ["model.pattern=[kda]", "model.mixers.kda={kind: gdn, num_heads: 2, key_dim: 16, value_dim: 16}"],
    "mamba2": ["model.pattern=[kda]", "model.mixers.kda={kind: mamba2, num_heads: 2, key_dim: 16, value_dim: 16}"],
    "mla": ["model.pattern=[mla]"],
    "mla-rope": ["model.pattern=[mla]", "model.mixers.mla.position={kind: rope}"],
    "hybrid": ["model.pattern=[kda, mla]", "model.num_layers=4", "train.remat={kind: named}"],
}


def _config(model: str, length: int) -> RunConfig:
    common = ["model.num_layers=1", "train.batch_size=3", f"data.seq_len={length}", "model.mixers.mla.num_heads=8"]
    return load("experiments/sizes/debug.yaml", [*common, *SIZES[model]], RunConfig)


def _gradients(cfg: RunConfig, mesh):
    """(gradient, sums) of one batch with documents and padding."""
    rows, length = cfg.train.batch_size, cfg.data.seq_len
    tokens = np.random.default_rng(2).integers(0, 256, (rows, length + 1), dtype=np.int32)
    ids = _segments("edges", rows, length)
    scored = (ids > 0) & (np.arange(length) < length - 1)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": ids, "loss_mask": scored}
    recipe = Recipe(cfg)
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda x: x.sharding, recipe.abstract_state(mesh))
        state = jax.jit(recipe.init_state, out_shardings=shardings)(jax.random.key(1))
        placed = {name: jax.device_put(x, batch_sharding(mesh)) for name, x in batch.items()}
        gradients = jax.jit(build_gradients(recipe), out_shardings=(shardings["params"], None))
        return jax.device_get(gradients(state["params"], state["buffers"], placed))


def _check_model(cfg: RunConfig, *meshes: dict[str, int]) -> None:
    want, want_sums = _gradients(cfg, _mesh(context=1))
    for sizes in meshes:
        mesh = _mesh(**sizes)
        check_run(mesh, cfg)
        got, sums = _gradients(cfg, mesh)
        errors = _worst(flatten_dict(got, sep="/"), flatten_dict(want, sep="/"))
        print(f"{sizes}: {max(errors.values()):.1e}, loss {abs(float(sums.loss) / float(want_sums.loss) - 1):.1e}")
        assert float(sums.loss) == pytest.approx(float(want_sums.loss), rel=LOSS_TOLERANCE)
        assert max(errors.values()) < MODEL_TOLERANCE, errors


@multi_device
@pytest.mark.parametrize("model", ["kda", "gdn", "mamba2", "mla", "mla-rope"])
def test_each_mixer_in_a_model(model):
    _check_model(_config(model, 512), {"context": 8})


@multi_device
def test_a_hybrid_with_experts():
    meshes = {"context": 2}, {"context": 4}, {"context": 8}, {"context": 2, "tensor": 2}, {"fsdp": 3, "context": 2}
    _check_model(_config("hybrid", 512), *meshes)


@multi_device
@pytest.mark.slow
def test_128k_tokens_over_eight_devices():
    """Recurrent layers at full length; attention, whose exchange has no numerics of its own, at 8192 tokens."""
    if jax.device_count() < 8:
        pytest.skip("needs eight simulated devices: make test-multi-device")
    small = [
        "train.batch_size=1",
        "model.model_dim=16",
        "model.dense_hidden_dim=16",
        "model.ffn={kind: dense, hidden_dim: 16}",
    ]
    for length, pattern in ((131072, "[kda]"), (8192, "[kda, mla]")):
        overrides = [f"data.seq_len={length}", f"model.pattern={pattern}", "model.num_layers=2", *small]
        overrides += ["model.mixers.mla.num_heads=8", "train.remat={kind: block}"]
        _check_model(load("experiments/sizes/debug.yaml", overrides, RunConfig), {"context": 8})


# ------------------------------------------------------------------ without devices
def test_what_does_not_divide_is_named():
    cfg = _config("hybrid", 512)
    with pytest.raises(UserError, match=r"data.seq_len=512: not a multiple of mesh.context=16 x 64 tokens of a chunk"):
        check_run(abstract_mesh(config.Mesh(context=16), 16), cfg)
    with pytest.raises(UserError, match=r"mla.num_heads=8: not a multiple of mesh.tensor=2 x mesh.context=8: 16"):
        check_run(abstract_mesh(config.Mesh(context=8, tensor=2), 16), cfg)
    check_run(abstract_mesh(config.Mesh(context=8), 8), cfg)


def test_an_axis_of_one_device_cuts_nothing():
    """Else states would travel, and every recurrence run twice, on meshes without context parallelism."""
    mesh = abstract_mesh(config.Mesh(data=2), 2)
    parts = _choose_parts(mesh, mesh.axis_names, [((4, 128, 2), "BTH")])
    assert parts["T"] == () and parts["B"] == ("data",)


@multi_device
def test_documents_are_numbered_by_one_gather():
    """A count over a cut axis, left to XLA, goes from device to device, and on a GPU from token to token."""
    ids = jnp.asarray(_segments("random", 2, 512))
    arguments = ids, jnp.ones(2, jnp.int32), jnp.zeros(2, jnp.int32)
    want, mesh = place_tokens(*arguments), _mesh(context=8)
    with jax.set_mesh(mesh):
        here = jax.device_put(ids, batch_sharding(mesh))
        compiled = jax.jit(place_tokens).lower(here, *arguments[1:]).compile()
        jax.tree.map(np.testing.assert_array_equal, compiled(here, *arguments[1:]), want)
    (found,) = read_collectives(compiled.as_text(), dict(mesh.shape))
    assert (found.kind, found.count) == ("all-gather", 1) and "while(" not in compiled.as_text()
