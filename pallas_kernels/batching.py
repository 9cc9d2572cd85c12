"""What `jax.vmap` makes of a kernel: one launch whose rows are those of all members."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def by_rows(call: Callable) -> Callable:
    """Lets `jax.vmap` map `call`, by putting the rows of all members behind each other.

    Args:
      call: takes and returns arrays in any containers. The first axis of each counts rows, or a fixed number of
        entries per row, and the results of a row depend on the entries of that row alone. Not to be differentiated
        itself: it stands inside the two halves of a `jax.custom_vjp`.
    """
    mapped = jax.custom_batching.custom_vmap(call)

    @mapped.def_vmap
    def run_members(size, is_mapped, *arguments):
        def join(x, is_mapped):
            x = x if is_mapped else jnp.broadcast_to(x[None], (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        results = mapped(*jax.tree.map(join, arguments, tuple(is_mapped)))  # which maps further axes in the same way
        split = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), results)
        return split, jax.tree.map(lambda _: True, split)

    return mapped
