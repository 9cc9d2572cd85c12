"""Context parallelism: how sequences are cut in time over devices, what each layer then exchanges, and how much.

Tokens of a sequence lie over the mesh axis `context` in equal contiguous spans. Norms, feed-forward blocks, experts and
the loss see single tokens and need no exchange; mixers do, inside their operators (`pallas_kernels/partition.py`
hands these the name of the axis). Per layer and row of the batch, a device receives in the forward pass, with T tokens
in c spans, HV value heads, H query heads, and 2-byte activations:

  KDA, Gated DeltaNet, Mamba2: the maps of all spans, S -> S M + H in float32,   4 (c - 1) HV K (K + V) bytes
    short convolutions: the last W - 1 inputs of all spans                       2 (c - 1) (W - 1) (2 H K + HV V)
  MLA: latents and shared keys of all tokens                                     2 (c - 1) / c T (R + P)
    queries of T tokens for 1 / c of the heads, and their results back           2 (c - 1) / c (T / c) H (N + P + V)

The recurrent mixers' share does not depend on T. The backward pass moves the same again: gradients of the states
that leave the spans with the maps, gradients of latents summed where they came from, and those of queries and results.
Rematerialisation moves what attention and the convolutions read, and what attention returns, a third time. With heads
over `tensor`, H and HV are those of one part.
"""

from collections.abc import Callable
from typing import Any

import jax

from kimi_jax.parallel.rules import spec
from kimi_jax.types import PyTree

WHOLE = jax.P()


def over_tokens(
    run: Callable[..., Any], whole: PyTree, *arrays: jax.Array, total: bool = False, cuts: PyTree = WHOLE
) -> Any:
    """Returns run(whole, *arrays) where each device of the mesh in use has its own rows and tokens.

    Left to itself XLA makes every step of a scan over tokens the work of one device, or adds up over devices inside it.

    Args:
      run: differentiable.
      whole: arrays that every device has whole, though they may be cut over other mesh axes than rows and tokens.
      arrays: of shape [B, T, ...].
      total: the results are sums over rows and tokens; else they are arrays like those given.
      cuts: partitions of those of `whole` that `run` takes in parts, over the axes of rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    tokens = jax.P() if mesh.empty else spec(("batch", "tokens"), arrays[0].shape[:2], mesh)
    axes = tuple(jax.tree.leaves(tuple(tokens)))
    if not axes:
        return run(whole, *arrays)
    return jax.shard_map(
        lambda *local: jax.lax.psum(run(*local), axes) if total else run(*local),
        in_specs=(cuts, *(tokens for _ in arrays)),
        out_specs=jax.P() if total else tokens,
        axis_names=set(axes),
        check_vma=False,
    )(whole, *arrays)
