"""From a model's config to what config.json says of it, and back; a line for each value it has no words for."""

from collections.abc import Sequence
from typing import Any

from kimi_jax.config.mixer import (
    ChannelDecay,
    GdnMixer,
    HeadDecay,
    KdaMixer,
    LinearMixer,
    MlaMixer,
    ShortConv,
    SigmoidGate,
)
from kimi_jax.config.model import DenseFfn, ModelConfig, MoeFfn
from kimi_jax.errors import UserError
from kimi_jax.interop.public_config import LinearAttention, PublicConfig
from kimi_jax.interop.public_form import LATENT_NORM_EPS, no_public_form


# ------------------------------------------------------------------ to the public form
def to_public(
    cfg: ModelConfig,
    *,
    dtype: str,
    max_length: int | None,
    bos: int | None = None,
    eos: int | tuple[int, ...] | None,
    pad: int | None,
) -> PublicConfig:
    """Writes a model as config.json; `json_fields` gives the text's content.

    Args:
      cfg: the model.
      dtype: of the tensors, "float32" or "bfloat16".
      max_length: longest sequence in tokens that users should feed, None where nobody knows; no layer depends on it.
      bos, eos, pad: ids of special tokens, None where there is none; generation ends at any of several `eos`.

    Raises:
      UserError: one line for each config value that the public form cannot hold.
    """
    problems = list(no_public_form(cfg))
    if problems:
        raise UserError([f"export: model.{problem}" for problem in problems])
    mla, linear = _first(cfg, MlaMixer), _first(cfg, LinearMixer)
    heads = (mla or linear).num_heads
    return PublicConfig(
        architectures=["KimiLinearForCausalLM"],
        model_type="kimi_linear",
        dtype=dtype,
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.model_dim,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=cfg.model_dim // heads,
        hidden_act="silu",
        rms_norm_eps=cfg.norm_eps,
        initializer_range=cfg.init_std,
        linear_attn_config=_linear_attention(cfg, linear),
        **_mla_fields(mla),
        **_ffn_fields(cfg),
        num_nextn_predict_layers=0,
        **({} if max_length is None else {"model_max_length": max_length}),
        tie_word_embeddings=False,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
        use_cache=True,
    )


def _first(cfg: ModelConfig, kind: type) -> Any:
    return next((cfg.mixers[name] for name in cfg.mixer_names if isinstance(cfg.mixers[name], kind)), None)


def _linear_attention(cfg: ModelConfig, linear: LinearMixer | None) -> LinearAttention:
    """The lists are always written: without them transformers assumes a pattern of its own."""
    mixers = [(layer, cfg.mixers[name]) for layer, name in enumerate(cfg.mixer_names, start=1)]
    kda = tuple(layer for layer, mixer in mixers if isinstance(mixer, LinearMixer))
    per_head = tuple(layer for layer, mixer in mixers if layer in kda and isinstance(mixer.decay, HeadDecay))
    fields = {"kda_layers": kda, "full_attn_layers": tuple(layer for layer, _ in mixers if layer not in kda)}
    if per_head:
        fields["head_decay_layers"] = per_head
    if linear:
        fields |= {"num_heads": linear.num_heads, "head_dim": linear.key_dim}
        fields["short_conv_kernel_size"] = linear.conv.width
    return LinearAttention(**fields)


def _mla_fields(mla: MlaMixer | None) -> dict[str, Any]:
    if mla is None:
        return {}
    return {
        "kv_lora_rank": mla.latent_dim,
        "q_lora_rank": None,
        "qk_nope_head_dim": mla.nope_dim,
        "qk_rope_head_dim": mla.rope_dim,
        "v_head_dim": mla.value_dim,
        "mla_use_nope": True,
        "rope_theta": 10000.0,
        "rope_scaling": None,
    }


def _ffn_fields(cfg: ModelConfig) -> dict[str, Any]:
    if isinstance(cfg.ffn, DenseFfn):
        return {"intermediate_size": cfg.ffn.hidden_dim, "first_k_dense_replace": cfg.num_layers}
    return {
        "intermediate_size": cfg.dense_hidden_dim or cfg.ffn.hidden_dim,
        "first_k_dense_replace": cfg.first_k_dense,
        "moe_layer_freq": 1,
        "num_experts": cfg.ffn.num_experts,
        "num_experts_per_token": cfg.ffn.top_k,
        "num_shared_experts": cfg.ffn.num_shared_experts,
        "moe_intermediate_size": cfg.ffn.hidden_dim,
        "moe_router_activation_func": "sigmoid",
        "moe_renormalize": cfg.ffn.renormalize,
        "routed_scaling_factor": cfg.ffn.routed_scaling,
        "use_grouped_topk": True,
        "num_expert_group": 1,
        "topk_group": 1,
    }


# ------------------------------------------------------------------ from the public form
def from_public(public: PublicConfig) -> ModelConfig:
    """Reads the model out of a config.json; what only training needs takes its default."""
    linear = public.linear_attn_config
    kinds = dict.fromkeys(linear.full_attn_layers, "mla")
    kinds |= dict.fromkeys(linear.kda_layers, "kda") | dict.fromkeys(linear.head_decay_layers, "gdn")
    names = tuple(kinds[layer] for layer in range(1, public.num_hidden_layers + 1))
    pattern, tail = find_pattern(names)
    return ModelConfig(
        vocab_size=public.vocab_size,
        model_dim=public.hidden_size,
        num_layers=public.num_hidden_layers,
        pattern=pattern,
        tail=tail,
        mixers={name: MIXERS[name](public) for name in dict.fromkeys(names)},
        norm_eps=public.rms_norm_eps,
        init_std=public.initializer_range,
        dtype=public.dtype,
        **_ffn_settings(public),
    )


MIN_REPEATS = 4  # of a pattern before a tail that is longer than itself: fewer layers are not worth a scan


def find_pattern(names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Finds the pattern and the tail behind it of the fewest layers together.

    The pattern comes twice at least, or `MIN_REPEATS` times: three linear layers and one of MLA stay one pattern.
    """
    best = tuple(names), ()
    for period in range(1, len(names) // 2 + 1):
        end = next((i for i in range(period, len(names)) if names[i] != names[i - period]), len(names))
        repeats, tail = end // period, len(names) - end // period * period
        enough = repeats >= (2 if tail < period else MIN_REPEATS)
        if enough and period + tail < len(best[0] + best[1]):
            best = tuple(names[:period]), tuple(names[len(names) - tail :])
    return best


def _linear_fields(public: PublicConfig) -> dict[str, Any]:
    linear = public.linear_attn_config
    return {
        "num_heads": linear.num_heads,
        "key_dim": linear.head_dim,
        "value_dim": linear.head_dim,
        "conv": ShortConv(width=linear.short_conv_kernel_size),
        "output_gate": SigmoidGate(rank=linear.head_dim),
        "norm_eps": public.rms_norm_eps,
    }


def _kda_mixer(public: PublicConfig) -> KdaMixer:
    return KdaMixer(**_linear_fields(public), decay=ChannelDecay(rank=public.linear_attn_config.head_dim))


def _gdn_mixer(public: PublicConfig) -> GdnMixer:
    return GdnMixer(**_linear_fields(public))


def _mla_mixer(public: PublicConfig) -> MlaMixer:
    return MlaMixer(
        num_heads=public.num_attention_heads,
        nope_dim=public.qk_nope_head_dim,
        rope_dim=public.qk_rope_head_dim,
        value_dim=public.v_head_dim,
        latent_dim=public.kv_lora_rank,
        latent_norm_eps=LATENT_NORM_EPS,
    )


MIXERS = {"kda": _kda_mixer, "gdn": _gdn_mixer, "mla": _mla_mixer}


def _ffn_settings(public: PublicConfig) -> dict[str, Any]:
    if public.first_k_dense_replace >= public.num_hidden_layers:
        return {"ffn": DenseFfn(hidden_dim=public.intermediate_size)}
    moe = MoeFfn(
        num_experts=public.num_experts,
        top_k=public.num_experts_per_token,
        hidden_dim=public.moe_intermediate_size,
        num_shared_experts=public.num_shared_experts,
        routed_scaling=public.routed_scaling_factor,
        renormalize=public.moe_renormalize,
    )
    if not public.first_k_dense_replace:
        return {"ffn": moe}
    dense = {"first_k_dense": public.first_k_dense_replace, "dense_hidden_dim": public.intermediate_size}
    return {"ffn": moe, **dense}
