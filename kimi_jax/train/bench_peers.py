"""Times the training step of PyTorch's kimi_linear on random tokens: transformers as it comes, and with fla, compiled.

`python -m kimi_jax.train.bench_peers` reads a request (JSON) from standard input and writes a measurement (JSON), in a
process of its own, since two frameworks in one would share the memory of the device.
"""

import dataclasses
import itertools
import json
import os
import sys
import time
from typing import Any

from kimi_jax.train.bench import BATCHES, FIRST_TOKEN, Measurement

OPTIMIZER = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "fused": True}
IGNORED = -100  # target that PyTorch's losses leave out
WARPS = 4


@dataclasses.dataclass(frozen=True)
class PeerRequest:
    """What to measure.

    Args:
      peer: a name of `PEERS`.
      config: config.json of the model.
      rows, length: sequences per step and their tokens.
      steps, warmup: timed steps, and steps before them, in which Triton and torch.compile do their work.
    """

    peer: str
    config: dict
    rows: int
    length: int
    steps: int = 20
    warmup: int = 3


class Transformers:
    """The model as it comes: bfloat16 parameters, SDPA, grouped experts, its own loss; fla's kernels for KDA."""

    def __init__(self, config: dict):
        import torch
        from transformers import AutoModelForCausalLM, KimiLinearConfig

        torch.manual_seed(0)
        options = {"attn_implementation": "sdpa", "experts_implementation": "grouped_mm", "dtype": torch.bfloat16}
        with torch.device("cuda"):
            self.model = AutoModelForCausalLM.from_config(KimiLinearConfig.from_dict(config), **options)
        self.model.train()

    def loss(self, tokens: Any) -> Any:
        return self.model(input_ids=tokens, labels=tokens, use_cache=False).loss


class Fla(Transformers):
    """The same with fla's KDA layer, norms and fused loss, each decoder layer under torch.compile."""

    def __init__(self, config: dict):
        super().__init__(config)
        import torch
        from fla.modules import FusedLinearCrossEntropyLoss

        decoder = self.model.model
        for index, layer in enumerate(decoder.layers):
            if layer.block_type == "linear_attention":
                layer.self_attn = _fla_mixer(config, index)
            else:
                layer.self_attn.kv_a_layernorm = _fla_norm(layer.self_attn.kv_a_layernorm)
            layer.input_layernorm = _fla_norm(layer.input_layernorm)
            layer.post_attention_layernorm = _fla_norm(layer.post_attention_layernorm)
        decoder.norm = _fla_norm(decoder.norm)
        self.model.train()
        self.cross_entropy = FusedLinearCrossEntropyLoss()
        torch._dynamo.config.cache_size_limit = 8 * len(decoder.layers)
        for layer in decoder.layers:
            layer.compile()

    def loss(self, tokens: Any) -> Any:
        import torch

        hidden = self.model.model(input_ids=tokens, use_cache=False).last_hidden_state
        targets = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=IGNORED)
        return self.cross_entropy(hidden, targets, self.model.lm_head.weight)


def _fla_norm(norm: Any) -> Any:
    import torch
    from fla.modules import RMSNorm

    return RMSNorm(norm.weight.numel(), eps=norm.variance_epsilon, dtype=torch.bfloat16).cuda()


def _fla_mixer(config: dict, index: int) -> Any:
    """fla's layer behind the signature of transformers' one."""
    import torch
    from fla.layers.kda import KimiDeltaAttention

    linear = config["linear_attn_config"]
    layer = KimiDeltaAttention(
        hidden_size=config["hidden_size"],
        head_dim=linear["head_dim"],
        num_heads=linear["num_heads"],
        conv_size=linear["short_conv_kernel_size"],
        norm_eps=config["rms_norm_eps"],
        layer_idx=index,
    )
    for module in layer.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=config["initializer_range"])

    class Mixer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, hidden_states, **_):
            return self.layer(hidden_states)[0]

    return Mixer().to("cuda", torch.bfloat16)


PEERS = {"transformers": Transformers, "fla": Fla}


def pin_autotuners() -> None:
    """Leaves each tunable Triton kernel one configuration, the middle one of those with `WARPS` warps.

    Tuning takes minutes per kernel. At 4 x 4096 tokens it gains the whole step 0.6% (H100, 2026-11-21). Settings that
    fla reads from files (`pallas_kernels.peers.pin_fla`) go before. Counts for kernels that are imported afterwards.
    """
    from triton.runtime.autotuner import Autotuner

    initialize = Autotuner.__init__

    def initialize_pinned(self, *args, **kwargs):
        initialize(self, *args, **kwargs)
        usual = [config for config in self.configs if config.num_warps == WARPS] or self.configs
        self.configs = [usual[len(usual) // 2]]

    Autotuner.__init__ = initialize_pinned


def measure(request: PeerRequest) -> Measurement:
    """Takes steps with fused AdamW, unclipped, all in bfloat16 as is usual there, without checkpointing."""
    if os.environ.get("FLA_CACHE_MODE") != "disabled":
        pin_autotuners()
    import torch

    start = time.perf_counter()
    peer = PEERS[request.peer](request.config)
    optimizer = torch.optim.AdamW(peer.model.parameters(), **OPTIMIZER)
    shape = (BATCHES, request.rows, request.length)
    tokens = torch.randint(FIRST_TOKEN, request.config["vocab_size"], shape, device="cuda")
    losses = []

    def step(index: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = peer.loss(tokens[index % BATCHES])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())

    for index in range(request.warmup):
        step(index)
    torch.cuda.synchronize()
    compile_s = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(request.steps + 1)]
    marks[0].record()
    for index, mark in enumerate(marks[1:], start=request.warmup):
        step(index)
        mark.record()
    torch.cuda.synchronize()
    return Measurement(
        device=torch.cuda.get_device_name(),
        tokens=request.rows * request.length,
        step_ms=[before.elapsed_time(after) for before, after in itertools.pairwise(marks)],
        compile_s=compile_s,
        losses=[float(loss) for loss in losses],
        peak_bytes=torch.cuda.max_memory_allocated(),
    )


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(measure(PeerRequest(**json.load(sys.stdin))))))
