"""Sizes of a model in closed form: parameters, tensors, FLOPs per token, cache bytes; no array is made."""

import dataclasses
import functools
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass

import jax.numpy as jnp

from kimi_jax.config.mixer import (
    ChannelDecay,
    Decay,
    GdnMixer,
    HeadDecay,
    KdaMixer,
    LinearMixer,
    Mamba2Mixer,
    Mixer,
    MlaMixer,
    NoGate,
    ShortConv,
)
from kimi_jax.config.model import DenseFfn, Ffn, ModelConfig
from kimi_jax.models.layout import layer_kinds

FLOP_CHUNK = 64  # tokens per chunk in the FLOP count, whatever chunk the operator runs with


class Additive:
    """Field-wise sums of dataclasses."""

    def __add__(self, other):
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return type(self)(*(a + b for a, b in pairs))

    def __mul__(self, times: int):
        return type(self)(*(times * a for a in dataclasses.astuple(self)))


@dataclass(frozen=True)
class Weights(Additive):
    """What one module holds.

    Args:
      matrix: elements of matrices that every token is multiplied by.
      other: gains, convolution taps, decay parameters.
      buffer: balancing biases of the routers, which no gradient trains.
      unused: elements of the experts that a token does not visit.
      tensors: tensors in the public layout, where each expert has its own and q, k and v are apart.
    """

    matrix: int = 0
    other: int = 0
    buffer: int = 0
    unused: int = 0
    tensors: int = 0

    @property
    def total(self) -> int:
        return self.matrix + self.other + self.buffer + self.unused


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a whole model, balancing biases included.

    Args:
      total: all of them.
      trainable: without the balancing biases.
      active: those that one token meets; the whole embedding and head count.
      active_matrix: of these, the elements of matrices that a token is multiplied by; no embedding, the head included.
      embedding: rows of the input embedding; the head has as many.
      tensors: in the public layout.
    """

    total: int
    trainable: int
    active: int
    active_matrix: int
    embedding: int
    tensors: int

    @property
    def active_without_embeddings(self) -> int:
        """Without the input embedding and without the head."""
        return self.active - 2 * self.embedding


@dataclass(frozen=True)
class TokenFlops(Additive):
    """FLOPs of one token, forward and backward, a multiply-add being two; nothing recomputed, nothing elementwise.

    Args:
      weights: 6 per active matrix element.
      attention: logits and values of the MLA layers over the visible half of the sequence.
      recurrence: the chunkwise form of the linear-attention layers.
    """

    weights: float = 0.0
    attention: float = 0.0
    recurrence: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.attention + self.recurrence


@dataclass(frozen=True)
class CacheBytes(Additive):
    """What generation carries.

    Args:
      state: float32 recurrent states, per sequence.
      conv: last inputs of the short convolutions, per sequence.
      latent: latents and shared keys, per token of room.
      index: int32 document number of each slot, per token of room.
    """

    state: int = 0
    conv: int = 0
    latent: int = 0
    index: int = 0

    @property
    def per_sequence(self) -> int:
        return self.state + self.conv

    @property
    def per_token(self) -> int:
        return self.latent + self.index


# ------------------------------------------------------------------ parameters
def count_parameters(cfg: ModelConfig) -> ParameterCounts:
    """Counts the parameters of a model, router biases included."""
    D, embedding = cfg.model_dim, cfg.vocab_size * cfg.model_dim
    norms = Weights(other=2 * D, tensors=2)
    blocks = [count_mixer(mixer, D) + count_ffn(ffn, D) + norms for mixer, ffn in layer_kinds(cfg)]
    whole = _sum(blocks) + Weights(matrix=embedding, other=D, tensors=3)  # the head; the final norm; both and embedding
    return ParameterCounts(
        total=whole.total + embedding,
        trainable=whole.total - whole.buffer + embedding,
        active=whole.total - whole.unused + embedding,
        active_matrix=whole.matrix,
        embedding=embedding,
        tensors=whole.tensors,
    )


def count_mixer(cfg: Mixer, model_dim: int) -> Weights:
    """Counts one token mixer."""
    return _count_mla(cfg, model_dim) if isinstance(cfg, MlaMixer) else _count_linear(cfg, model_dim)


def count_ffn(cfg: Ffn, model_dim: int) -> Weights:
    """Counts one feed-forward block."""
    if isinstance(cfg, DenseFfn):
        return _count_swiglu(model_dim, cfg.hidden_dim)
    expert, E = _count_swiglu(model_dim, cfg.hidden_dim), cfg.num_experts
    router = Weights(matrix=model_dim * E, buffer=E, tensors=2)
    unused = Weights(unused=expert.matrix * (E - cfg.top_k), tensors=expert.tensors * (E - cfg.top_k))
    shared = _count_swiglu(model_dim, cfg.num_shared_experts * cfg.hidden_dim)
    return router + expert * cfg.top_k + unused + (shared if cfg.num_shared_experts else Weights())


def _count_swiglu(D: int, F: int) -> Weights:
    return Weights(matrix=3 * D * F, tensors=3)


def _count_mla(cfg: MlaMixer, D: int) -> Weights:
    H, R, P, N, V = cfg.num_heads, cfg.latent_dim, cfg.rope_dim, cfg.nope_dim, cfg.value_dim
    matrix = D * H * (N + P) + D * (R + P) + R * H * (N + V) + H * V * D
    return Weights(matrix=matrix, other=R, tensors=5)


def _count_linear(cfg: KdaMixer | GdnMixer | Mamba2Mixer, D: int) -> Weights:
    key, value = cfg.num_heads * cfg.key_dim, cfg.value_heads * cfg.value_dim
    projections = Weights(matrix=D * (2 * key + 2 * value + cfg.value_heads), tensors=5)  # q, k, v, output, beta
    parts = [projections, Weights(other=cfg.value_dim, tensors=1), _count_decay(cfg.decay, cfg, D)]
    if isinstance(cfg.conv, ShortConv):
        parts.append(Weights(other=cfg.conv.width * (2 * key + value), tensors=3))
    if not isinstance(cfg.output_gate, NoGate):
        parts.append(Weights(matrix=cfg.output_gate.rank * (D + value), tensors=2))
    return _sum(parts)


def _count_decay(decay: Decay, cfg: LinearMixer, D: int) -> Weights:
    HV, channels = cfg.value_heads, cfg.value_heads * cfg.key_dim
    if isinstance(decay, ChannelDecay):
        return Weights(matrix=decay.rank * (D + channels), other=HV + channels, tensors=4)
    if isinstance(decay, HeadDecay):
        return Weights(matrix=D * HV, other=2 * HV, tensors=3)
    return Weights()


# ------------------------------------------------------------------ FLOPs
def count_flops(cfg: ModelConfig, seq_len: int) -> TokenFlops:
    """Counts the FLOPs per token of training on sequences of `seq_len` tokens; the backward costs twice the forward.

    Per token, forward: 2 per active matrix element; 2 H (N + P + V) (seq_len + 1) / 2 per MLA layer; per linear layer
    and value head what `_recurrence_flops` says.
    """
    forward = TokenFlops(weights=2 * count_parameters(cfg).active_matrix)
    forward += _sum([_mixer_flops(mixer, seq_len) for mixer, _ in layer_kinds(cfg)])
    return forward * 3


def _mixer_flops(cfg: Mixer, seq_len: int) -> TokenFlops:
    if isinstance(cfg, MlaMixer):
        return TokenFlops(attention=2 * cfg.num_heads * (cfg.query_dim + cfg.value_dim) * (seq_len + 1) / 2)
    return TokenFlops(recurrence=cfg.value_heads * _recurrence_flops(cfg))


def _recurrence_flops(cfg: KdaMixer | GdnMixer | Mamba2Mixer) -> int:
    """Per token and head, with chunks of C: the delta rule forms K K^T, Q K^T, T K (2 C K each), T V, A V (2 C V each)
    and W S, Q S, K^T V (2 K V each); without its correction Q K^T, A V, Q S and K^T V remain."""
    C, K, V = FLOP_CHUNK, cfg.key_dim, cfg.value_dim
    if isinstance(cfg, Mamba2Mixer):
        return C * (2 * K + 2 * V) + 4 * K * V
    return C * (6 * K + 4 * V) + 6 * K * V


# ------------------------------------------------------------------ caches
def count_cache_bytes(cfg: ModelConfig) -> CacheBytes:
    """Counts the bytes of `Decoder.init_caches`, but for a few counters per layer."""
    item = jnp.dtype(cfg.dtype).itemsize
    return _sum([_mixer_cache_bytes(mixer, item) for mixer, _ in layer_kinds(cfg)])


def _mixer_cache_bytes(cfg: Mixer, item: int) -> CacheBytes:
    if isinstance(cfg, MlaMixer):
        return CacheBytes(latent=item * (cfg.latent_dim + cfg.rope_dim), index=4)
    channels = 2 * cfg.num_heads * cfg.key_dim + cfg.value_heads * cfg.value_dim
    kept = cfg.conv.width - 1 if isinstance(cfg.conv, ShortConv) else 0
    state = 4 * math.prod((cfg.value_heads, cfg.value_dim, cfg.key_dim))
    return CacheBytes(state=state, conv=item * kept * channels)


def _sum[T: Additive](parts: Iterable[T]) -> T:
    return functools.reduce(operator.add, parts)
