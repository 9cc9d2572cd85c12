"""Times latent attention over whole sequences: queries, and keys with values, as the layer's projections write them."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.mla import api
from pallas_kernels.timing import Row, Work, check, measured, time_compiled

TOLERANCE = {"o": 5e-3, "dq": 6e-3, "dkv": 6e-3, "dshared": 6e-3}  # error ratio to `xla` in float32
FORWARD, BOTH = "forward", "forward + backward"


class Case(NamedTuple):
    """One problem: bfloat16, key dimensions per head and shared, mean tokens of a document (0: a row is one)."""

    name: str
    batch: int
    tokens: int
    heads: int
    document: int = 0
    nope: int = 128
    shared: int = 64
    value: int = 128

    def ids(self) -> Int[Array, "B T"] | None:
        """Documents of exponentially distributed lengths, cut off at the end of the row."""
        if not self.document:
            return None
        rng = np.random.default_rng(0)
        rows = []
        for _ in range(self.batch):
            lengths = 1 + rng.exponential(self.document, 8 * (1 + self.tokens // self.document)).astype(int)
            rows.append(np.repeat(np.arange(1, len(lengths) + 1), lengths)[: self.tokens])
        return jnp.asarray(np.stack(rows), jnp.int32)

    def work(self, call: str) -> Work:
        """Products of visible pairs, each once: two forward, four backward; what is recomputed does not count."""
        K, ids = self.nope + self.shared, self.ids()
        pairs = self.batch * self.tokens * (self.tokens + 1) // 2
        if ids is not None:
            lengths = np.concatenate([np.bincount(row) for row in np.asarray(ids)]).astype(int)
            pairs = int((lengths * (lengths + 1) // 2).sum())
        q, kv, shared = self.heads * K, self.heads * (self.nope + self.value), self.shared
        forward = 2 * self.heads * pairs * (K + self.value)
        channels = q + kv + shared + self.heads * self.value
        both = 2 * channels + self.heads * self.value
        scaled = (channels, forward) if call == FORWARD else (both, 3 * forward)
        return Work(2 * self.batch * self.tokens * scaled[0], scaled[1])


class Inputs(NamedTuple):
    """Arrays of one call; o is [B, T, H, V]."""

    q: Float[Array, "B T H K"]
    kv: Float[Array, "B T H NV"]
    shared: Float[Array, "B T P"]
    do: Float[Array, "B T H V"]


CASES = {
    case.name: case
    for case in (
        Case("B4-T4096-H16", 4, 4096, 16),
        Case("B4-T4096-H16-packed1024", 4, 4096, 16, 1024),
        Case("B8-T4096-H8", 8, 4096, 8),
        Case("B4-T4096-H16-K128-V128", 4, 4096, 16, shared=0),
        Case("B4-T4096-H16-K192-V192", 4, 4096, 16, nope=192, shared=0, value=192),
    )
}
IMPLEMENTATIONS = tuple(api.IMPLEMENTATIONS)
PEERS = ("cudnn-192-128",)


def measure(case: Case, implementations: Sequence[str], peers: Sequence[str]) -> Iterator[Row]:
    """Yields the rows of every implementation, then of every peer; a failure is a row that says why."""
    inputs, ids = _draw(case), case.ids()
    want = _reference(case, inputs, ids)
    attends = [(name, True, functools.partial(_ours, case, name)) for name in implementations]
    attends += [(name, False, functools.partial(_unpadded, case)) for name in peers]
    for name, ours, attend in attends:
        for call, run in ((FORWARD, _forward), (BOTH, _both)):
            timed = functools.partial(_time, functools.partial(run, attend), inputs, ids, want)
            yield measured(Row(case.name, call, name, ours, case.work(call)), timed)


def _time(run: Callable, inputs: Inputs, ids, want: dict[str, Array]) -> dict[str, float | None]:
    timed = time_compiled(run, inputs, ids)
    got = dict(zip(want, timed.values, strict=False))
    check(got, {name: want[name] for name in got}, TOLERANCE)
    return {"ms": timed.ms, "compiled_gb": timed.compiled_gb, "device_gb": timed.device_gb}


@functools.partial(jax.jit, static_argnums=0)
def _draw(case: Case) -> Inputs:
    key = iter(jax.random.split(jax.random.key(0), 4))
    B, T, H, K = case.batch, case.tokens, case.heads, case.nope + case.shared
    shapes = (B, T, H, K), (B, T, H, case.nope + case.value), (B, T, case.shared), (B, T, H, case.value)
    return Inputs(*(jax.random.normal(next(key), shape).astype(jnp.bfloat16) for shape in shapes))


def _ours(case: Case, name: str, ids, q, kv, shared):
    parts = *jnp.split(q, [case.nope], -1), *jnp.split(kv, [case.nope], -1)
    q_nope, q_shared, k_nope, v = parts
    return api.mla_attention(q_nope, q_shared, k_nope, shared, v, segment_ids=ids, implementation=name)[0]


def _unpadded(case: Case, ids, q, kv, shared):
    """cuDNN with values of their own width: JAX has that behind its public function, which refuses it."""
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    if ids is not None:
        raise NotImplementedError("cuDNN has no packed documents here")
    k_nope, v = jnp.split(kv, [case.nope], -1)
    spread = jnp.broadcast_to(shared[:, :, None], (*k_nope.shape[:-1], case.shared))
    k = jnp.concatenate([k_nope, spread], -1)
    return dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask_type=MaskType.CAUSAL)


def _forward(attend: Callable, inputs: Inputs, ids):
    return (attend(ids, *inputs[:3]),)


def _both(attend: Callable, inputs: Inputs, ids):
    o, pull_back = jax.vjp(functools.partial(attend, ids), *inputs[:3])
    return o, *pull_back(inputs.do)


def _reference(case: Case, inputs: Inputs, ids) -> dict[str, Array]:
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
    with jax.default_matmul_precision("highest"):
        values = jax.jit(functools.partial(_both, functools.partial(_ours, case, "xla")))(wide, ids)
    return dict(zip(TOLERANCE, values, strict=True)) if case.shared else dict(zip(TOLERANCE, values[:3], strict=False))
