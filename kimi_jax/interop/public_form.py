"""Which models the public form can say: every config value that it cannot hold, named."""

from collections.abc import Iterator, Sequence
from typing import Any

from kimi_jax.config.mixer import (
    ChannelDecay,
    GdnMixer,
    HeadDecay,
    KdaMixer,
    LinearMixer,
    MlaMixer,
    NoDecay,
    NoPosition,
    ShortConv,
    SigmoidGate,
    Softplus,
)
from kimi_jax.config.model import DenseFfn, ModelConfig, MoeFfn

LATENT_NORM_EPS = 1e-6  # no field of config.json: the public implementations build this norm with their default
# Of a mixer: how it is computed, not what; and what the layer lists say of each layer.
LOCAL_FIELDS = {"kind", "chunk_size", "implementation", "decay"}


def no_public_form(cfg: ModelConfig) -> Iterator[str]:
    """Yields a line for each config value that kimi_linear cannot hold, beginning with its path under `model`."""
    names = list(dict.fromkeys(cfg.mixer_names))
    for name in names:
        match cfg.mixers[name]:
            case KdaMixer() | GdnMixer() as mixer:
                found = _linear_problems(mixer, cfg)
            case MlaMixer() as mixer:
                found = _mla_problems(mixer)
            case mixer:
                found = [("kind", mixer.kind, "kimi_linear holds 'kda', 'gdn' and 'mla' alone")]
        yield from (f"mixers.{name}.{_without(*problem)}" for problem in found)
    for kind in (LinearMixer, MlaMixer):
        yield from _differences(cfg, [name for name in names if isinstance(cfg.mixers[name], kind)])
    if isinstance(cfg.ffn, MoeFfn) and not cfg.ffn.num_shared_experts:
        yield _without("ffn.num_shared_experts", 0, "must be at least 1")
    if isinstance(cfg.ffn, DenseFfn) and cfg.first_k_dense and cfg.dense_hidden_dim != cfg.ffn.hidden_dim:
        yield _without("dense_hidden_dim", cfg.dense_hidden_dim, f"must be ffn.hidden_dim={cfg.ffn.hidden_dim}")


def _without(field: str, value: Any, rule: str) -> str:
    return f"{field}: {value!r} has no public form; {rule}"


def _linear_problems(mixer: KdaMixer | GdnMixer, cfg: ModelConfig) -> Iterator[tuple[str, Any, str]]:
    decay, gate = mixer.decay, mixer.output_gate
    size = f"must be key_dim={mixer.key_dim}"
    if mixer.value_heads != mixer.num_heads:
        yield "num_value_heads", mixer.value_heads, f"must be num_heads={mixer.num_heads}"
    if mixer.value_dim != mixer.key_dim:
        yield "value_dim", mixer.value_dim, size
    if not isinstance(mixer.conv, ShortConv):
        yield "conv.kind", mixer.conv.kind, "must be 'short'"
    if isinstance(decay, NoDecay):
        yield "decay.kind", decay.kind, "must be 'channel' or 'head'"
    elif not isinstance(decay.gate, Softplus):
        yield "decay.gate.kind", decay.gate.kind, "must be 'softplus'"
    elif isinstance(decay, ChannelDecay) and decay.rank != mixer.key_dim:
        yield "decay.rank", decay.rank, size
    elif isinstance(decay, HeadDecay) and mixer.num_heads > mixer.key_dim:
        yield "num_heads", mixer.num_heads, f"one decay per head needs at most key_dim={mixer.key_dim} heads"
    if not isinstance(gate, SigmoidGate):
        yield "output_gate.kind", gate.kind, "must be 'sigmoid'"
    elif gate.rank != mixer.key_dim:
        yield "output_gate.rank", gate.rank, size
    if mixer.norm_eps != cfg.norm_eps:
        yield "norm_eps", mixer.norm_eps, f"must be the model's norm_eps={cfg.norm_eps}"


def _mla_problems(mixer: MlaMixer) -> Iterator[tuple[str, Any, str]]:
    if not isinstance(mixer.position, NoPosition):
        yield "position.kind", mixer.position.kind, "must be 'none'"
    if mixer.latent_norm_eps != LATENT_NORM_EPS:
        yield "latent_norm_eps", mixer.latent_norm_eps, f"must be {LATENT_NORM_EPS}"


def _differences(cfg: ModelConfig, names: Sequence[str]) -> Iterator[str]:
    for name in names[1:]:
        a, b = cfg.mixers[names[0]], cfg.mixers[name]
        for field in sorted(type(a).model_fields.keys() & type(b).model_fields.keys()):
            if field not in LOCAL_FIELDS and getattr(a, field) != getattr(b, field):
                yield f"mixers.{name}.{field}: differs from mixers.{names[0]}.{field}; kimi_linear has one for both"
