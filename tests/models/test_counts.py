"""Closed-form counts against the arrays themselves, and the released model's figures to the unit."""

import functools
import math
from pathlib import Path

import jax
import pytest

from kimi_jax.config.load import load
from kimi_jax.config.mixer import GdnMixer, KdaMixer, Mamba2Mixer, MlaMixer, Rope
from kimi_jax.config.model import DenseFfn, ModelConfig, MoeFfn
from kimi_jax.config.train import RunConfig
from kimi_jax.models.counts import count_cache_bytes, count_ffn, count_flops, count_mixer, count_parameters
from kimi_jax.models.decoder import abstract, logical_axes, merge

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SIZES = {path.stem: path for path in sorted(EXPERIMENTS.glob("sizes/*.yaml"))}
KDA = {"num_heads": 2, "key_dim": 8, "value_dim": 6}
VARIANTS = {
    "kda": KdaMixer(**KDA, num_value_heads=6, conv={"kind": "none"}, output_gate={"kind": "none"}),
    "bounded": KdaMixer(**KDA, decay={"kind": "channel", "rank": 3, "gate": {"kind": "lower_bound"}}),
    "head": KdaMixer(**KDA, decay={"kind": "head"}, output_gate={"kind": "swish", "rank": 5}),
    "undecayed": KdaMixer(**KDA, decay={"kind": "none"}, conv={"kind": "short", "width": 3}),
    "gdn": GdnMixer(**KDA, num_value_heads=4),
    "mamba2": Mamba2Mixer(**KDA),
    "mla": MlaMixer(num_heads=2, nope_dim=6, rope_dim=4, value_dim=5, latent_dim=7, position=Rope()),
}
LADDER = {"653m": 653e6, "878m": 878e6, "1.1b": 1.1e9, "1.4b": 1.4e9, "1.7b": 1.7e9}


def size(name):
    return load(SIZES[name], [], RunConfig).model


def variants_model(ffn, dtype="bfloat16"):
    pattern = tuple(VARIANTS)
    sizes = {"vocab_size": 11, "model_dim": 12, "num_layers": len(pattern), "pattern": pattern}
    return ModelConfig(**sizes, mixers=VARIANTS, ffn=ffn, first_k_dense=1, dense_hidden_dim=9, dtype=dtype)


MODELS = {name: size(name) for name in ("debug", "bench", "ladder-878m", "kimi-linear-48b-a3b")} | {
    "variants_moe": variants_model(MoeFfn(num_experts=3, top_k=2, hidden_dim=5, num_shared_experts=2)),
    "variants_unshared": variants_model(MoeFfn(num_experts=3, top_k=3, hidden_dim=5, num_shared_experts=0)),
    "variants_dense": variants_model(DenseFfn(hidden_dim=5)),
}


@functools.cache
def shapes(name):
    """(graphdef, params, buffers) without memory."""
    return abstract(MODELS[name])


def elements(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", MODELS)
def test_closed_form_equals_the_arrays(name):
    _, params, buffers = shapes(name)
    counts = count_parameters(MODELS[name])
    assert (counts.trainable, counts.total) == (elements(params), elements((params, buffers)))
    assert 0 < counts.active_matrix < counts.active <= counts.total


@pytest.mark.parametrize("name", ["debug", "variants_moe", "kimi-linear-48b-a3b"])
def test_every_parameter_names_its_axes(name):
    known = {"vocab", "embed", "heads", "head_dim", "rank", "latent", "ffn", "experts", "conv", "layers"}
    _, params, _ = shapes(name)
    axes = logical_axes(MODELS[name])
    leaves = dict(jax.tree.leaves_with_path(params))
    named = dict(jax.tree.leaves_with_path(axes, is_leaf=lambda x: isinstance(x, tuple)))
    assert leaves.keys() == named.keys()
    for path, names in named.items():
        assert len(names) == leaves[path].ndim and set(names) <= known, jax.tree_util.keystr(path)
        assert ("layers" in names) == (path[0].key == "groups")


@pytest.mark.parametrize("name", ["debug", "variants_moe", "kimi-linear-48b-a3b"])
def test_cache_bytes_equal_the_arrays(name):
    batch, room = 3, 40
    parts = shapes(name)
    caches = jax.eval_shape(lambda p, b: merge(parts[0], p, b).init_caches(batch, room), *parts[1:])
    got = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))
    counts, num_mla = count_cache_bytes(MODELS[name]), MODELS[name].mixer_names.count("mla")
    counters = num_mla * 4 * (1 + 2 * batch)
    assert got == batch * (counts.per_sequence + room * counts.per_token) + counters


def test_released_model():
    cfg = size("kimi-linear-48b-a3b")
    counts, cache = count_parameters(cfg), count_cache_bytes(cfg)
    assert counts.total == 49_122_681_728
    assert counts.tensors == 20_493
    assert counts.active == 3_484_459_904
    assert counts.active_without_embeddings == 2_729_485_184
    assert count_mixer(cfg.mixers["kda"], cfg.model_dim).total == 39_514_272
    assert count_mixer(cfg.mixers["mla"], cfg.model_dim).total == 29_114_880
    assert count_ffn(cfg.ffn, cfg.model_dim).total == 1_819_607_296
    assert count_ffn(cfg.ffn_of_layer(0), cfg.model_dim).total == 63_700_992
    assert (cache.state, cache.conv, cache.latent) == (41_943_040, 1_474_560, 8_064)


def test_bench_model():
    counts, flops = count_parameters(size("bench")), count_flops(size("bench"), 4096)
    assert (counts.trainable, counts.active_matrix) == (828_850_992, 178_634_752)
    assert (flops.weights, flops.attention, flops.recurrence) == (1_071_808_512, 62_929_920, 25_952_256)
    assert round(flops.total / 1e6, 1) == 1160.7


@pytest.mark.parametrize("name", LADDER)
def test_ladder_has_the_papers_active_parameters(name):
    assert count_parameters(size(f"ladder-{name}")).active_without_embeddings == pytest.approx(LADDER[name], rel=0.01)


def test_flops_of_mamba2_and_of_no_mixers_grow_as_stated():
    mamba = variants_model(DenseFfn(hidden_dim=5)).model_copy(update={"pattern": ("mamba2",)})
    per_head = 64 * (2 * 8 + 2 * 6) + 4 * 8 * 6
    assert count_flops(mamba, 128).recurrence == 3 * mamba.num_layers * 2 * per_head
    assert count_flops(mamba, 128).attention == 0
    assert count_flops(mamba, 128) == count_flops(mamba, 4096)
