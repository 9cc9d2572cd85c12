"""Where layers live: every layer exactly once, the longest scan that the pattern allows."""

import pytest

from kimi_jax.config.mixer import KdaMixer, MlaMixer
from kimi_jax.config.model import DenseFfn, ModelConfig, MoeFfn
from kimi_jax.models.layout import Layout, layer_kinds, plan_layout, unrolled

MIXERS = {"kda": KdaMixer(num_heads=2), "mla": MlaMixer(num_heads=2)}
HYBRID, PURE = ("kda", "kda", "kda", "mla"), ("kda",)


def make(num_layers, pattern, dense=0, tail=(), ffn=None):
    ffn = ffn or MoeFfn(num_experts=4, top_k=2, hidden_dim=8)
    sizes = {"vocab_size": 8, "model_dim": 8, "num_layers": num_layers}
    settings = {"mixers": MIXERS, "ffn": ffn, "first_k_dense": dense, "dense_hidden_dim": 8}
    return ModelConfig(**sizes, pattern=pattern, tail=tail, **settings)


CASES = {
    "released": (make(27, HYBRID, 1, ("kda", "kda", "mla")), Layout(1, 4, 6, 2)),
    "whole_groups": (make(12, HYBRID), Layout(0, 4, 3, 0)),
    "dense_first": (make(12, HYBRID, 1), Layout(1, 4, 2, 3)),
    "too_short_to_scan": (make(8, HYBRID, 1), Layout(8, 0, 0, 0)),
    "one_group": (make(4, HYBRID), Layout(4, 0, 0, 0)),
    "long_group": (make(16, ("kda",) * 15 + ("mla",)), Layout(16, 0, 0, 0)),
    "long_group_as_tail": (make(16, PURE, tail=("mla",)), Layout(0, 1, 15, 1)),
    "pure": (make(6, PURE, 2), Layout(2, 1, 4, 0)),
    "all_dense": (make(6, PURE, 2, ffn=DenseFfn(hidden_dim=8)), Layout(0, 1, 6, 0)),
    "all_layers_dense_first": (make(3, PURE, 3), Layout(0, 1, 3, 0)),
    "one_layer": (make(1, PURE), Layout(1, 0, 0, 0)),
}


@pytest.mark.parametrize("cfg, layout", CASES.values(), ids=CASES)
def test_plan(cfg, layout):
    assert plan_layout(cfg) == layout
    assert plan_layout(cfg.model_copy(update={"scan_layers": False})) == unrolled(cfg)


@pytest.mark.parametrize("cfg", [cfg for cfg, _ in CASES.values()], ids=CASES)
@pytest.mark.parametrize("plan", [plan_layout, unrolled])
def test_every_layer_lives_at_one_place_of_its_kind(cfg, plan):
    layout, kinds = plan(cfg), layer_kinds(cfg)
    places = [layout.locate(layer) for layer in range(cfg.num_layers)]
    assert len(set(places)) == cfg.num_layers
    for layer, place in enumerate(places):
        assert kinds[layer] == kinds[layout.first_layer(place.part, int(place.index))]
        assert (place.repeat is None) == (place.part != "groups")
    with pytest.raises(ValueError, match="must be in 0"):
        layout.locate(cfg.num_layers)
