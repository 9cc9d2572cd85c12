"""KDA of other projects, for benches: PyTorch packages, each imported only when its time is asked for."""

import statistics
from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.kda.cases import Case, Inputs


class OutOfMemory(RuntimeError):
    """A peer did not fit beside our arrays."""


class _Peer:
    """Inputs of a case as tensors. A subclass calls its package: values, and one training step if it can."""

    def __init__(self, case: Case, inputs: Inputs, bound: float):
        import torch

        self.torch: ModuleType = torch
        self.case, self.bound = case, bound
        self.q, self.k, self.v, self.g, self.d_o = map(
            self._tensor, (inputs.q, inputs.k, inputs.v, inputs.g, inputs.d_o)
        )
        beta = inputs.beta.astype(jnp.float32)
        self.logit = self._tensor((jnp.log(beta) - jnp.log1p(-beta)).astype(inputs.beta.dtype))
        self.a_log, self.dt_bias, self.state = map(self._tensor, (inputs.a_log, inputs.dt_bias, inputs.initial_state))

    def _tensor(self, x):
        return self.torch.from_dlpack(jax.block_until_ready(x)).clone()

    def forward(self):
        raise NotImplementedError

    def step(self) -> Callable[[], object] | None:
        """Forward and backward; None: forward only."""
        return None

    def values(self) -> tuple[np.ndarray, np.ndarray]:
        return tuple(x.float().cpu().numpy() for x in self.forward())

    def times(self, calls: int, repeats: int) -> tuple[float, float | None, float | None]:
        """(forward ms, forward and backward ms, peak GB): device time, calls queued back to back."""
        cuda = self.torch.cuda
        try:
            forward = self._time(self.forward, calls, repeats)
            step = self.step()
            if step is None:
                return forward, None, None
            cuda.reset_peak_memory_stats()
            return forward, self._time(step, calls, repeats), cuda.max_memory_allocated() / 1e9
        except cuda.OutOfMemoryError as error:
            raise OutOfMemory("out of memory") from error

    def _time(self, call, calls: int, repeats: int) -> float:
        events = [self.torch.cuda.Event(enable_timing=True) for _ in range(2)]
        times = []
        for _ in range(3):  # autotuning
            call()
        for _ in range(repeats):
            events[0].record()
            for _ in range(calls):
                call()
            events[1].record()
            self.torch.cuda.synchronize()
            times.append(events[0].elapsed_time(events[1]) / calls)
        return statistics.median(times)


class Fla(_Peer):
    """flash-linear-attention, `fla.ops.kda.chunk_kda`: gate, norm and beta's sigmoid inside."""

    def _call(self, q, k, v, g, logit):
        from fla.ops.kda import chunk_kda

        bounded = self.case.gate == "lower_bound"
        return chunk_kda(
            *(q, k, v, g),
            beta=logit,
            A_log=self.a_log,
            dt_bias=self.dt_bias.reshape(-1),
            initial_state=self.state.transpose(-1, -2).contiguous(),
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            **(dict(safe_gate=True, lower_bound=self.bound) if bounded else {}),
        )

    def forward(self):
        with self.torch.no_grad():
            o, state = self._call(self.q, self.k, self.v, self.g, self.logit)
        return o, state.transpose(-1, -2)

    def step(self):
        leaves = [x.detach().requires_grad_() for x in (self.q, self.k, self.v, self.g, self.logit)]

        def both():
            o, _ = self._call(*leaves)
            return self.torch.autograd.grad(o, leaves, self.d_o)

        return both


class FlashKda(_Peer):
    """FlashKDA, `flash_kda.fwd`: lower-bound gate, forward only."""

    def forward(self):
        import flash_kda

        if self.case.gate != "lower_bound":
            raise NotImplementedError("flash_kda: only the lower-bound gate")
        o, final = self.torch.empty_like(self.v), self.torch.empty_like(self.state)
        with self.torch.no_grad():
            flash_kda.fwd(
                *(self.q, self.k, self.v, self.g, self.logit, self.case.key_dim**-0.5, o),
                *(self.a_log, self.dt_bias, self.bound),
                **dict(initial_state=self.state, final_state=final),
            )
        return o, final


PEERS = {"fla": Fla, "flash_kda": FlashKda}
