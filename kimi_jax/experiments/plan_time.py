"""How long a training step should take: its work at the rates that docs/performance.md measured, and what it sends."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kimi_jax.config.mixer import MlaMixer
from kimi_jax.config.model import MoeFfn
from kimi_jax.config.train import BlockRemat, NoRemat, RunConfig
from kimi_jax.experiments.plan_hardware import Hardware
from kimi_jax.experiments.plan_traffic import Traffic, local_tokens, seconds
from kimi_jax.models.counts import count_flops, count_parameters
from kimi_jax.models.layout import layer_kinds
from kimi_jax.train.devices import peak_flops

# On one H100, 2026-11-22 (docs/performance.md); FLOP/s unless said otherwise.
DENSE, GROUPED, ATTENTION = 650e12, 550e12, 382e12
KDA_S = 4.9e-9 / (2 * 128 * 128)  # seconds per token, head and state element K V 2, forward and backward
OPTIMIZER_BYTES = 7  # moved per byte of parameter: read and written it is, and two moments; its gradient is read
ELEMENTWISE_BYTES = 285  # moved per token, layer and channel: what the other figures leave of bench.yaml's 102.1 ms
SLOWER = 1.15  # than these rates: the upper end of the range


@dataclass(frozen=True)
class StepTime:
    """A range: everything that is sent hides behind the work, or nothing does.

    Args:
      work_s: of one device, without waiting for others.
      sending_s: of one device.
      mfu: (lowest, highest) share of the peak that the counted FLOPs take; None: the peak is unknown.
    """

    work_s: float
    sending_s: float
    mfu: tuple[float, float] | None

    @property
    def best_s(self) -> float:
        return max(self.work_s, self.sending_s)

    @property
    def worst_s(self) -> float:
        return SLOWER * self.work_s + self.sending_s


def estimate_step(
    cfg: RunConfig, hardware: Hardware, mesh, traffic: Sequence[Traffic], parameter_bytes: float
) -> StepTime:
    """Estimates one step.

    Args:
      mesh: with every axis of `kimi_jax.parallel.mesh.AXES`.
      traffic: of `count_traffic`.
      parameter_bytes: that one device updates.
    """
    shape: Mapping[str, int] = dict(mesh.shape)
    tokens = cfg.train.grad_accum * local_tokens(cfg, mesh) / shape["tensor"]
    scale = hardware.gpu.copy_bytes_per_s / 2.94e12
    moved = (_elementwise_bytes(cfg) * tokens + OPTIMIZER_BYTES * parameter_bytes) / hardware.gpu.copy_bytes_per_s
    work = _compute_seconds(cfg) * tokens + moved + _recurrence_seconds(cfg) * tokens / scale
    sending = sum(seconds(t, hardware, shape) for t in traffic)
    time, peak = StepTime(work, sending, None), peak_flops(hardware.gpu.kind)
    if peak is None:
        return time
    flops = count_flops(cfg.model, cfg.data.seq_len).total * cfg.train.batch_size * cfg.data.seq_len
    mfu = tuple(flops / s / peak / hardware.count for s in (time.worst_s, time.best_s))
    return StepTime(work, sending, mfu)


def _recomputed(cfg: RunConfig) -> float:
    """Work on the blocks, relative to forward and backward alone."""
    return 4 / 3 if isinstance(cfg.train.remat, BlockRemat) else 1.0


def _compute_seconds(cfg: RunConfig) -> float:
    """Products and attention, per token."""
    model = cfg.model
    flops, experts = count_flops(model, cfg.data.seq_len), _expert_flops(cfg)
    head = 6 * model.vocab_size * model.model_dim
    blocks = experts / GROUPED + (flops.weights - experts - head) / DENSE + flops.attention / ATTENTION
    return _recomputed(cfg) * blocks + head / DENSE


def _expert_flops(cfg: RunConfig) -> float:
    layers = [ffn for _, ffn in layer_kinds(cfg.model) if isinstance(ffn, MoeFfn)]
    return sum(6 * 3 * ffn.top_k * ffn.hidden_dim * cfg.model.model_dim for ffn in layers)


def _recurrence_seconds(cfg: RunConfig) -> float:
    """Per token; bound by memory."""
    mixers = [mixer for mixer, _ in layer_kinds(cfg.model) if not isinstance(mixer, MlaMixer)]
    elements = sum(2 * mixer.value_heads * mixer.key_dim * mixer.value_dim for mixer in mixers)
    return _recomputed(cfg) * KDA_S * elements


def _elementwise_bytes(cfg: RunConfig) -> float:
    """Per token; recomputed wherever anything is."""
    again = 1.0 if isinstance(cfg.train.remat, NoRemat) else 4 / 3
    return again * ELEMENTWISE_BYTES * cfg.model.num_layers * cfg.model.model_dim


def describe_model(cfg: RunConfig) -> str:
    """Parameters and FLOPs in one line."""
    counted, flops = count_parameters(cfg.model), count_flops(cfg.model, cfg.data.seq_len)
    tokens = cfg.train.batch_size * cfg.data.seq_len
    return (
        f"{counted.total:,} parameters, {counted.active:,} active; {tokens:,} tokens per step, "
        f"{flops.total / 1e6:,.1f} MFLOP per token, {flops.total * tokens / 1e15:,.2f} PFLOP per step"
    )
