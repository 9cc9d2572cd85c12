"""config.json in both directions, and a line for everything that one side cannot say."""

import json
from pathlib import Path

import pytest
from lively_models import GDN, KDA, MLA, SPECS, build_config
from released import CONFIG, FULL_ATTENTION

from kimi_jax.config.load import load
from kimi_jax.config.model import ModelConfig
from kimi_jax.config.train import RunConfig
from kimi_jax.errors import UserError
from kimi_jax.interop.hf_config import find_pattern, from_public, to_public
from kimi_jax.interop.public_config import json_fields, read_public

SOURCE = "config.json"
EXPERIMENTS = Path(__file__).parents[2] / "experiments"
NARROW = {"key_dim": 2, "value_dim": 2, "output_gate": {"kind": "sigmoid", "rank": 2}}
IDS = {"bos": 163584, "eos": 163586, "pad": 163839}


def test_the_released_config_round_trips():
    cfg = from_public(read_public(CONFIG, source=SOURCE))
    assert (cfg.pattern, cfg.tail) == (("kda", "kda", "kda", "mla"), ("kda", "kda", "mla"))
    assert (cfg.first_k_dense, cfg.dense_hidden_dim, cfg.ffn.top_k) == (1, 9216, 8)
    assert (cfg.mixers["mla"].latent_norm_eps, cfg.mixers["kda"].norm_eps) == (1e-6, 1e-5)
    back = json_fields(to_public(cfg, dtype="bfloat16", max_length=1048576, **IDS))
    assert json.loads(json.dumps(back)) == {k: v for k, v in CONFIG.items() if k != "transformers_version"}


@pytest.mark.parametrize("name", SPECS)
def test_our_configs_round_trip(name):
    cfg = build_config(name)
    written = json.loads(json.dumps(json_fields(to_public(cfg, dtype="float32", max_length=9, eos=1, pad=2))))
    assert from_public(read_public(written, source=SOURCE)) == cfg
    lists = written["linear_attn_config"]
    assert sorted(lists["kda_layers"] + lists["full_attn_layers"]) == list(range(1, cfg.num_layers + 1))


def test_the_names_that_transformers_gives_a_model_of_its_own():
    native = {key: value for key, value in CONFIG.items() if key not in ("linear_attn_config", "first_k_dense_replace")}
    native |= {
        "linear_num_heads": 32,
        "linear_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "output_router_logits": False,
    }
    native["layer_types"] = [
        "full_attention" if layer in FULL_ATTENTION else "linear_attention" for layer in range(1, 28)
    ]
    native["mlp_layer_types"] = ["dense"] + ["sparse"] * 26
    native["torch_dtype"] = native.pop("dtype")
    assert read_public(native, source=SOURCE).first_k_dense_replace == 1
    assert from_public(read_public(native, source=SOURCE)) == from_public(read_public(CONFIG, source=SOURCE))


@pytest.mark.parametrize(
    ("layers", "pattern", "tail"),
    [
        ("ABABA", "AB", "A"),
        ("AAAB" * 2 + "AAB", "AAAB", "AAB"),
        ("AAAA", "A", ""),
        ("A", "A", ""),
        ("AB", "AB", ""),
        ("ABBA", "ABBA", ""),
        ("A" * 15 + "B", "A", "B"),
        (("A" * 15 + "B") * 2, "A" * 15 + "B", ""),
        ("AAAB", "AAAB", ""),
        ("AABABB", "AABABB", ""),
    ],
)
def test_patterns(layers, pattern, tail):
    assert find_pattern(layers) == (tuple(pattern), tuple(tail))


@pytest.mark.parametrize(
    "path", [*EXPERIMENTS.glob("sizes/*.yaml"), EXPERIMENTS / "quickstart.yaml"], ids=lambda p: p.stem
)
def test_exported_models_start_the_experiments_they_come_from(path):
    """`train.init_from` compares parameters by their place, so the layers must be read as the file writes them."""
    cfg = load(path, [], RunConfig).model
    assert find_pattern(cfg.mixer_names) == (cfg.pattern, cfg.tail)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen3_next"}, "config.json: model_type: got 'qwen3_next'; known: kimi_linear"),
        ({"q_lora_rank": 1536}, "config.json: q_lora_rank: got 1536, must be None"),
        ({"mla_use_nope": False}, "config.json: mla_use_nope: got False"),
        ({"num_expert_group": 8}, "config.json: num_expert_group: got 8"),
        ({"tie_word_embeddings": True}, "config.json: tie_word_embeddings: got True"),
        ({"moe_router_activation_func": "softmax"}, "config.json: moe_router_activation_func: got 'softmax'"),
        ({"hidden_size": "wide"}, "config.json: hidden_size: got 'wide', must be a valid integer"),
        ({"dtype": "float16"}, "config.json: dtype: got 'float16'"),
        ({"gate_lower_bound": -5.0}, "config.json: gate_lower_bound: unknown key"),
        ({"num_experts_per_token": 300}, "config.json: num_experts_per_token: 300 is larger than num_experts=256"),
        ({"num_key_value_heads": 4}, "config.json: num_key_value_heads: got 4, must be num_attention_heads=32"),
        ({"num_hidden_layers": 28}, "config.json: linear_attn_config: kda_layers and full_attn_layers must together"),
        ({"pad_token_id": 163840}, "config.json: pad_token_id: 163840 is outside the vocabulary of 163840"),
        ({"eos_token_id": [1, 170000]}, "config.json: eos_token_id: 170000 is outside the vocabulary of 163840"),
        ({"num_experts": 10**9}, "config.json: num_experts: got 1000000000, must be less than or equal to 16777216"),
        # What transformers says of its own model beside the released names; it would follow its own.
        ({"layer_types": ["full_attention"] * 27}, "config.json: layer_types: contradicts the layer lists of"),
        ({"layer_types": ["sliding_attention"]}, "config.json: layer_types.0: got 'sliding_attention'; did you mean"),
        ({"linear_head_dim": 64}, "config.json: linear_head_dim: 64 contradicts linear_attn_config.head_dim=128"),
        ({"mlp_layer_types": ["sparse"] * 27}, "config.json: mlp_layer_types: must be 'dense' for the first 1 layers"),
        ({"mlp_layer_types": ["dense", "sparse"]}, "config.json: mlp_layer_types: must be 'dense' for the first 1"),
        ({"mlp_layer_types": ["wide"] * 27}, "config.json: mlp_layer_types.0: got 'wide'; known: dense, sparse"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_unsupported_public_values(change, message):
    with pytest.raises(UserError) as caught:
        read_public(CONFIG | change, source=SOURCE)
    assert caught.value.problems[0].startswith(message)
    assert len(caught.value.problems) == (27 if "types.0: got 'wide'" in message else 1)


@pytest.mark.parametrize("layers", [[4], [28], [0]])
def test_decays_per_head_are_of_kda_layers(layers):
    lists = CONFIG["linear_attn_config"] | {"head_decay_layers": layers}
    with pytest.raises(UserError, match="head_decay_layers"):
        read_public(CONFIG | {"linear_attn_config": lists}, source=SOURCE)


def test_a_decay_per_head_comes_back_as_gated_delta_net():
    kda = KDA | {"decay": {"kind": "head"}}
    cfg = ModelConfig(**build_config("all_kda_dense").model_dump() | {"mixers": {"kda": kda}})
    written = json_fields(to_public(cfg, dtype="float32", max_length=9, eos=1, pad=2))
    assert written["linear_attn_config"]["head_decay_layers"] == [1, 2]
    assert from_public(read_public(json.loads(json.dumps(written)), source=SOURCE)).mixers["gdn"].kind == "gdn"


def test_an_unknown_length_and_several_end_tokens():
    cfg = build_config("all_kda_dense")
    written = json_fields(to_public(cfg, dtype="float32", max_length=None, eos=(1, 5), pad=None))
    assert "model_max_length" not in written
    assert json.loads(json.dumps(written))["eos_token_id"] == [1, 5]
    assert read_public(json.loads(json.dumps(written)), source=SOURCE).eos_token_id == (1, 5)


def test_all_problems_at_once():
    broken = {key: value for key, value in CONFIG.items() if key != "vocab_size"} | {"hidden_act": "gelu", "new": 1}
    with pytest.raises(UserError) as caught:
        read_public(broken, source=SOURCE)
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        (
            GDN | {"key_dim": 2, "value_dim": 2, "output_gate": {"kind": "sigmoid", "rank": 2}},
            "mixers.x.num_heads: 3 has",
        ),
        ({"kind": "mamba2", "num_heads": 2}, "mixers.x.kind: 'mamba2' has no public form"),
        (KDA | {"num_value_heads": 6}, "mixers.x.num_value_heads: 6 has no public form; must be num_heads=3"),
        (KDA | {"value_dim": 8}, "mixers.x.value_dim: 8 has no public form; must be key_dim=16"),
        (KDA | {"conv": {"kind": "none"}}, "mixers.x.conv.kind: 'none' has no public form"),
        (KDA | {"decay": {"kind": "none"}}, "mixers.x.decay.kind: 'none' has no public form"),
        (
            KDA | {"decay": {"kind": "channel", "rank": 16, "gate": {"kind": "lower_bound"}}},
            "mixers.x.decay.gate.kind: 'lower_bound' has no public form",
        ),
        (KDA | {"decay": {"kind": "channel", "rank": 8}}, "mixers.x.decay.rank: 8 has no public form"),
        (KDA | {"output_gate": {"kind": "swish", "rank": 16}}, "mixers.x.output_gate.kind: 'swish' has no public"),
        (KDA | {"output_gate": {"kind": "sigmoid", "rank": 8}}, "mixers.x.output_gate.rank: 8 has no public form"),
        (KDA | {"norm_eps": 1e-6}, "mixers.x.norm_eps: 1e-06 has no public form"),
        (MLA | {"position": {"kind": "rope"}}, "mixers.x.position.kind: 'rope' has no public form"),
        (MLA | {"latent_norm_eps": 1e-5}, "mixers.x.latent_norm_eps: 1e-05 has no public form; must be 1e-06"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_mixers_without_a_public_form(mixer, message):
    cfg = build_config("all_kda_dense").model_dump() | {"pattern": ("x",), "mixers": {"x": mixer}}
    with pytest.raises(UserError) as caught:
        to_public(ModelConfig(**cfg), dtype="float32", max_length=8, eos=0, pad=0)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(f"export: model.{message}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"ffn": {"kind": "moe", "num_experts": 4, "top_k": 2, "hidden_dim": 8, "num_shared_experts": 0}},
            "ffn.num_sh",
        ),
        ({"first_k_dense": 1, "dense_hidden_dim": 8}, "dense_hidden_dim: 8 has no public form; must be ffn"),
        (
            {"pattern": ("kda", "other"), "mixers": {"kda": KDA, "other": KDA | {"num_heads": 4, "chunk_size": 16}}},
            "mixers.other.num_heads: differs from mixers.kda.num_heads",
        ),
    ],
    ids=["no_shared_expert", "two_dense_widths", "two_kdas"],
)
def test_models_without_a_public_form(change, message):
    cfg = ModelConfig(**build_config("all_kda_dense").model_dump() | change)
    with pytest.raises(UserError) as caught:
        to_public(cfg, dtype="float32", max_length=8, eos=0, pad=0)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(f"export: model.{message}")


def test_a_mixer_that_no_layer_uses_does_not_matter():
    base = build_config("all_kda_dense").model_dump()
    cfg = ModelConfig(**base | {"mixers": {"kda": KDA, "unused": {"kind": "gdn", "num_heads": 2}}})
    assert to_public(cfg, dtype="float32", max_length=8, eos=0, pad=0).vocab_size == 258
