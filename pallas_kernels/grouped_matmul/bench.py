"""Times grouped products and moves of rows; peers are those of JAX, and one dense product of the same size."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from pallas_kernels.grouped_matmul import api
from pallas_kernels.timing import REASONS, Row, Work, check, reason, time_compiled

# Error ratios against the plain JAX form: results are rounded to bfloat16; so is what the other gradients are made of.
TOLERANCE = {"result": 0.005} | dict.fromkeys(("dx", "gate", "up", "down", "scale"), 0.01)
PRODUCTS = ("forward", "dx", "dw", "dw rounded")
CHOICES = 8  # rows per token, where rows are moved
IMPLEMENTATIONS = tuple(name for name in api.IMPLEMENTATIONS if name != "reference")


class Case(NamedTuple):
    """[rows, inner] x [groups, inner, outer]; groups of equal sizes, or with shares that are gamma(2) distributed.

    bfloat16; matrices float32 where that is a matter of their gradients alone (dw; rounded: bfloat16), and in a SwiGLU,
    which rounds them.
    """

    name: str
    call: str
    rows: int
    inner: int
    outer: int
    num_groups: int
    even: bool = True

    @property
    def work(self) -> Work:
        """Of the call alone: rounding the matrices to bfloat16 is left out."""
        rows_bytes = lambda *widths: 2 * self.rows * sum(widths)
        matrix, product = self.num_groups * self.inner * self.outer, 2 * self.rows * self.inner * self.outer
        match self.call:
            case "forward" | "dx":
                return Work(rows_bytes(self.inner, self.outer) + 2 * matrix, product)
            case "dw" | "dw rounded":
                item = 4 if self.call == "dw" else 2
                return Work(rows_bytes(self.inner, self.outer) + item * matrix, product)
            case "swiglu forward":
                return Work(rows_bytes(self.inner, self.inner) + 6 * matrix, 3 * product)
            case "swiglu forward + backward":
                return Work(rows_bytes(*[self.inner] * 4) + 24 * matrix, 9 * product)
        return Work(rows_bytes(self.inner) + rows_bytes(self.inner) // CHOICES, 0)


def _cases() -> Iterator[Case]:
    for name, *shape in (("E64", 98304, 2048, 1024, 64), ("E256", 98304, 2048, 1024, 256)):
        for even in (True, False):
            for call in PRODUCTS:
                yield Case(f"{name}{'' if even else '-uneven'}", call, *shape, even)
    for call in ("swiglu forward", "swiglu forward + backward", "spread rows", "sum rows"):
        yield Case("B8-T4096-E64-top8", call, 262144, 1024, 512, 64, False)


CASES = {f"{case.name} {case.call}": case for case in _cases()}
PEERS = ("dense", "ragged_dot", "ragged_dot_mgpu")


def measure(case: Case, implementations: Sequence[str], peers: Sequence[str]) -> Iterator[Row]:
    """Yields the row of every implementation, then of every peer; a failure is a row that says why."""
    arrays = _draw(case)
    want = jax.jit(_ours(case, "xla"))(*arrays)
    for name, run in [(n, _ours(case, n)) for n in implementations] + [(n, _peer(case, n)) for n in peers]:
        row = Row(case.name, case.call, name, name in implementations, case.work)
        try:
            timed = time_compiled(run, *arrays)
            if name != "dense":
                check(timed.values, want, TOLERANCE)
            yield dataclasses.replace(row, ms=timed.ms, compiled_gb=timed.compiled_gb)
        except REASONS as error:
            yield dataclasses.replace(row, note=reason(error))


def group_sizes(case: Case) -> np.ndarray:
    """The same for every call of a case."""
    rng = np.random.default_rng(0)
    share = np.ones(case.num_groups) if case.even else rng.gamma(2.0, size=case.num_groups)
    ends = np.rint(np.cumsum(share) / np.sum(share) * case.rows).astype(np.int32)
    return np.diff(ends, prepend=np.int32(0))


def _draw(case: Case) -> tuple[Array, ...]:
    """The arguments of `_ours`, drawn on the device."""
    rows, inner, outer, E = case.rows, case.inner, case.outer, case.num_groups

    @jax.jit
    def draw():
        key = iter(jax.random.split(jax.random.key(0), 6))
        normal = lambda *shape: jax.random.normal(next(key), shape, jnp.bfloat16)
        matrix = lambda *shape: jax.random.normal(next(key), shape) * shape[1] ** -0.5
        sizes = jnp.asarray(group_sizes(case))
        if case.call in ("spread rows", "sum rows"):
            place = jax.random.permutation(next(key), rows).astype(jnp.int32).reshape(-1, CHOICES)
            return normal(rows // CHOICES if case.call == "spread rows" else rows, inner), place
        if case.call.startswith("swiglu"):
            matrices = matrix(E, inner, outer), matrix(E, inner, outer), matrix(E, outer, inner)
            return normal(rows, inner), *matrices, jax.random.uniform(next(key), (rows,)), sizes
        w = matrix(E, inner, outer).astype(jnp.float32 if case.call == "dw" else jnp.bfloat16)
        return normal(rows, inner), w, normal(rows, outer), sizes

    return draw()


def _ours(case: Case, name: str) -> Callable[..., dict[str, Array]]:
    swiglu = functools.partial(api.grouped_swiglu, implementation=name)
    match case.call:
        case "spread rows":
            return lambda x, row: {"result": api.spread_rows(x, row, name)}
        case "sum rows":
            return lambda y, row: {"result": api.sum_rows(y, row, name)}
        case "swiglu forward":
            return lambda *arguments: {"result": swiglu(*arguments)}
        case "swiglu forward + backward":
            return functools.partial(_with_gradients, swiglu)
    return _product(case.call, lambda x, w, sizes: api.grouped_matmul(x, w, sizes, implementation=name))


def _product(call: str, matmul: Callable) -> Callable[..., dict[str, Array]]:
    """One of the three; XLA leaves out what it does not need."""

    def run(x, w, dy, sizes):
        y, pull = jax.vjp(lambda x, w: matmul(x, w, sizes), x, w)
        return {"result": y if call == "forward" else pull(dy)[call != "dx"]}

    return run


def _with_gradients(swiglu: Callable, *arguments) -> dict[str, Array]:
    *arrays, sizes = arguments
    y, pull = jax.vjp(lambda *arrays: swiglu(*arrays, sizes), *arrays)
    return {"result": y} | dict(zip(("dx", "gate", "up", "down", "scale"), pull(y), strict=True))


def _peer(case: Case, name: str) -> Callable:
    def unserved(*_):
        raise NotImplementedError(f"{name} has no {case.call}")

    if case.call not in PRODUCTS:
        return unserved
    match name:
        case "dense":
            return functools.partial(_dense, case.call)
        case "ragged_dot":
            return _product(case.call, lambda x, w, sizes: lax.ragged_dot(x, w.astype(x.dtype), sizes))
    return _bundled() if case.call == "forward" else unserved


def _dense(call: str, x, w, dy, sizes) -> Array:
    """As many operations with one matrix, or one group."""
    del sizes
    if call.startswith("dw"):
        return lax.dot_general(x, dy, (((0,), (0,)), ((), ())), preferred_element_type=w.dtype)
    return x @ w[0] if call == "forward" else dy @ w[0].T


def _bundled() -> Callable[..., dict[str, Array]]:
    """The example kernel in JAX, with the fastest of the tilings that were tried."""
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

    tiling = {"block_m": 128, "block_n": 128, "block_k": 64, "max_concurrent_steps": 4, "grid_block_n": 8}
    return lambda x, w, dy, sizes: {"result": ragged_dot(x, w, group_sizes=sizes, **tiling)}
