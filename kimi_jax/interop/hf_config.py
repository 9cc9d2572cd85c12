"""What a config.json can say of a model: its schema, ModelConfig to it and back, a refusal for each value it lacks."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from kimi_jax.config.base import Config
from kimi_jax.config.load import validate
from kimi_jax.config.mixer import (
    ChannelDecay,
    KdaMixer,
    MlaMixer,
    PositiveInt,
    ShortConv,
    SigmoidGate,
)
from kimi_jax.config.model import DenseFfn, ModelConfig, MoeFfn
from kimi_jax.errors import UserError
from kimi_jax.interop.public_form import LATENT_NORM_EPS, no_public_form

type Count = Annotated[int, Field(ge=0)]
type Positive = Annotated[float, Field(gt=0)]
type TokenId = Annotated[int, Field(ge=0)]


# ------------------------------------------------------------------ the schema of config.json
class LinearAttention(Config):
    """`linear_attn_config`; the layer lists count from 1."""

    kda_layers: tuple[PositiveInt, ...]
    full_attn_layers: tuple[PositiveInt, ...]
    num_heads: PositiveInt = 32
    head_dim: PositiveInt = 128
    short_conv_kernel_size: Annotated[int, Field(ge=2, le=8)] = 4


class PublicConfig(Config):
    """config.json of `KimiLinearForCausalLM`. A literal is the one supported value; `Any`: no layer reads it."""

    architectures: Any = None
    auto_map: Any = None
    model_type: Literal["kimi_linear"]
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    head_dim: Any = None
    hidden_act: Literal["silu"] = "silu"
    rms_norm_eps: Positive = 1e-5
    initializer_range: Positive = 0.02
    kv_lora_rank: PositiveInt = 512
    q_lora_rank: None = None
    qk_nope_head_dim: PositiveInt = 128
    qk_rope_head_dim: PositiveInt = 64
    qk_head_dim: Any = None
    v_head_dim: PositiveInt = 128
    mla_use_nope: Literal[True] = True
    rope_theta: Any = None
    rope_scaling: Any = None
    rope_parameters: Any = None
    attention_bias: Literal[False] = False
    attention_dropout: Any = None
    linear_attn_config: LinearAttention
    intermediate_size: PositiveInt
    first_k_dense_replace: Count = 1
    moe_layer_freq: Literal[1] = 1
    num_experts: PositiveInt = 256
    num_experts_per_token: PositiveInt = 8
    num_shared_experts: PositiveInt = 1
    moe_intermediate_size: PositiveInt = 1024
    moe_router_activation_func: Literal["sigmoid"] = "sigmoid"
    moe_renormalize: bool = True
    routed_scaling_factor: Positive = 2.446
    use_grouped_topk: Any = None
    num_expert_group: Literal[1] = 1
    topk_group: Literal[1] = 1
    num_nextn_predict_layers: Literal[0] = 0
    output_router_logits: Any = None
    model_max_length: PositiveInt | None = None
    tie_word_embeddings: Literal[False] = False
    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | tuple[TokenId, ...] | None = None
    pad_token_id: TokenId | None = None
    use_cache: Any = None
    pretraining_tp: Any = None
    transformers_version: Any = None

    def problems(self) -> Iterator[tuple[str, str]]:
        lists = self.linear_attn_config
        if sorted(lists.kda_layers + lists.full_attn_layers) != list(range(1, self.num_hidden_layers + 1)):
            rule = f"must together hold each of 1 to num_hidden_layers={self.num_hidden_layers} once"
            yield "linear_attn_config", f"kda_layers and full_attn_layers {rule}"
        if self.num_key_value_heads not in (None, self.num_attention_heads):
            rule = f"must be num_attention_heads={self.num_attention_heads}"
            yield "num_key_value_heads", f"got {self.num_key_value_heads}, {rule}"
        if self.num_experts_per_token > self.num_experts:
            yield "num_experts_per_token", f"{self.num_experts_per_token} is larger than num_experts={self.num_experts}"


# ------------------------------------------------------------------ to the public form
def to_public(
    cfg: ModelConfig, *, dtype: str, max_length: int, bos: int | None = None, eos: int | None, pad: int | None
) -> PublicConfig:
    """Writes a model as config.json; `json_fields` gives the text's content.

    Args:
      cfg: the model.
      dtype: of the tensors, "float32" or "bfloat16".
      max_length: longest sequence in tokens that users should feed; no layer depends on it.
      bos, eos, pad: ids of special tokens, None where there is none.

    Raises:
      UserError: one line for each config value that the public form cannot hold.
    """
    problems = list(no_public_form(cfg))
    if problems:
        raise UserError([f"export: model.{problem}" for problem in problems])
    mla, kda = _first(cfg, MlaMixer), _first(cfg, KdaMixer)
    heads = (mla or kda).num_heads
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
        linear_attn_config=_linear_attention(cfg, kda),
        **_mla_fields(mla),
        **_ffn_fields(cfg),
        num_nextn_predict_layers=0,
        model_max_length=max_length,
        tie_word_embeddings=False,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
        use_cache=True,
    )


def json_fields(public: PublicConfig) -> dict[str, Any]:
    """What to write into config.json: the fields that were set, in the order of the schema."""
    return public.model_dump(mode="json", exclude_unset=True)


def _first(cfg: ModelConfig, kind: type) -> Any:
    return next((cfg.mixers[name] for name in cfg.mixer_names if isinstance(cfg.mixers[name], kind)), None)


def _linear_attention(cfg: ModelConfig, kda: KdaMixer | None) -> LinearAttention:
    """The lists are always written: without them transformers assumes a pattern of its own."""
    numbered = [(layer, type(cfg.mixers[name])) for layer, name in enumerate(cfg.mixer_names, start=1)]
    sizes = (
        {"num_heads": kda.num_heads, "head_dim": kda.key_dim, "short_conv_kernel_size": kda.conv.width} if kda else {}
    )
    return LinearAttention(
        kda_layers=tuple(layer for layer, kind in numbered if kind is KdaMixer),
        full_attn_layers=tuple(layer for layer, kind in numbered if kind is MlaMixer),
        **sizes,
    )


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
def read_public(data: Mapping[str, Any], *, source: str) -> PublicConfig:
    """Checks a parsed config.json, as released or as transformers writes it.

    Args:
      data: the parsed file.
      source: opens each line of the error.

    Raises:
      UserError: one line for each missing, unknown or unsupported value.
    """
    return validate(_released_names(data), PublicConfig, source=source)


def _released_names(data: Mapping[str, Any]) -> dict[str, Any]:
    """Renames what transformers writes for a model of its own making: lists of layer types instead of numbers."""
    data = dict(data)
    dtype, kinds = (data.pop(name, None) for name in ("torch_dtype", "layer_types"))
    ffns = data.get("mlp_layer_types")
    sizes = {"linear_num_heads": "num_heads", "linear_head_dim": "head_dim"}
    sizes["linear_conv_kernel_dim"] = "short_conv_kernel_size"
    linear = {ours: data.pop(theirs) for theirs, ours in sizes.items() if theirs in data}
    if dtype:
        data.setdefault("dtype", dtype)
    if isinstance(kinds, list) and "linear_attn_config" not in data:
        numbered = list(enumerate(kinds, start=1))
        linear["kda_layers"] = [layer for layer, kind in numbered if kind == "linear_attention"]
        linear["full_attn_layers"] = [layer for layer, kind in numbered if kind == "full_attention"]
        data["linear_attn_config"] = linear
    if isinstance(ffns, list) and ffns == sorted(ffns, key=str):
        # "dense" before "sparse"; any other order stays, and is refused as an unknown key.
        del data["mlp_layer_types"]
        data.setdefault("first_k_dense_replace", ffns.count("dense"))
    return data


def from_public(public: PublicConfig) -> ModelConfig:
    """Reads the model out of a config.json; what only training needs takes its default."""
    linear = public.linear_attn_config
    kda_layers = set(linear.kda_layers)
    names = tuple("kda" if layer in kda_layers else "mla" for layer in range(1, public.num_hidden_layers + 1))
    pattern, tail = find_pattern(names)
    mixers = {"kda": lambda: _kda_mixer(linear, public.rms_norm_eps), "mla": lambda: _mla_mixer(public)}
    return ModelConfig(
        vocab_size=public.vocab_size,
        model_dim=public.hidden_size,
        num_layers=public.num_hidden_layers,
        pattern=pattern,
        tail=tail,
        mixers={name: mixers[name]() for name in dict.fromkeys(names)},
        norm_eps=public.rms_norm_eps,
        init_std=public.initializer_range,
        dtype=public.dtype,
        **_ffn_settings(public),
    )


def find_pattern(names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Finds the shortest pattern that gives the layers when it is repeated, with a tail of fewer layers than itself."""
    for period in range(1, len(names) // 2 + 1):
        whole = len(names) // period * period
        if all(names[i] == names[i - period] for i in range(period, whole)):
            return tuple(names[:period]), tuple(names[whole:])
    return tuple(names), ()


def _kda_mixer(linear: LinearAttention, norm_eps: float) -> KdaMixer:
    dim = linear.head_dim
    return KdaMixer(
        num_heads=linear.num_heads,
        key_dim=dim,
        value_dim=dim,
        conv=ShortConv(width=linear.short_conv_kernel_size),
        decay=ChannelDecay(rank=dim),
        output_gate=SigmoidGate(rank=dim),
        norm_eps=norm_eps,
    )


def _mla_mixer(public: PublicConfig) -> MlaMixer:
    return MlaMixer(
        num_heads=public.num_attention_heads,
        nope_dim=public.qk_nope_head_dim,
        rope_dim=public.qk_rope_head_dim,
        value_dim=public.v_head_dim,
        latent_dim=public.kv_lora_rank,
        latent_norm_eps=LATENT_NORM_EPS,
    )


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
