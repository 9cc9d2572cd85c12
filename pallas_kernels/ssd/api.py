"""Public entry of scalar-decay linear attention: signature, argument checks and the table of implementations."""

from jaxtyping import Array, Float, Int

from pallas_kernels.arguments import check_arrays, check_one_dtype
from pallas_kernels.dispatch import Implementation, call
from pallas_kernels.partition import Axes, refuse_parts
from pallas_kernels.ssd import chunked, reference

__all__ = ["IMPLEMENTATIONS", "chunk_ssd"]


IMPLEMENTATIONS = {  # fastest first
    "chunked": Implementation(chunked.chunk_ssd, chunked.refuse),
    "reference": Implementation(reference.chunk_ssd, refuse_parts),
}
AXES = Axes(("BTH",) * 5, ("BTH", "BH"), {"segment_ids": "BT"}, exchanges=True)
CONTINUED_AXES = Axes(("B-H",) * 5, ("B-H", "BH"), {"initial_state": "BH", "segment_ids": "B"})


def chunk_ssd(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    g: Float[Array, "B T HV"],
    beta: Float[Array, "B T HV"],
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B HV V K"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str = "auto",
    tile: int | None = None,
) -> tuple[Float[Array, "B T HV V"], Float[Array, "B HV V K"]]:
    """Runs Mamba2's recurrence over a whole sequence.

    Per value head: S_t = exp(g_t) S_{t-1} + beta_t k_t v_t^T and o_t = scale S_t^T q_t.

    Args:
      q, k: queries and keys, bfloat16, float16 or float32.
      v: values, same dtype; HV is a multiple of H, and value head h reads query head h // (HV // H).
      g: log-decay in nats, float32, <= 0.
      beta: step size per token and head.
      scale: factor on the queries; None: K**-0.5.
      initial_state: float32, V first; enters the first segment; None: zero.
      segment_ids: int32; 0 is padding, which leaves the state alone, gives zero output and zero gradient, and may
        hold anything. A token whose id differs from the last non-padding token before it starts from a zero state.
      implementation: "auto", "chunked" or "reference".
      tile: tokens per chunk of the chunked form; None: 64.

    Returns:
      (o in the dtype of v, state after the last non-padding token, float32). Differentiable in every array.

    Raises:
      ValueError: an argument has the wrong shape.
      NotImplementedError: the implementation refuses these arguments.

    Source: Mamba2, arXiv:2405.21060, with the step size of Kimi Linear, arXiv:2510.26692, table 6.
    """
    arrays = {
        "q": (q, "B T H K"),
        "k": (k, "B T H K"),
        "v": (v, "B T HV V"),
        "g": (g, "B T HV"),
        "beta": (beta, "B T HV"),
    }
    arrays |= {"initial_state": (initial_state, "B HV V K")}
    sizes = check_arrays("chunk_ssd", arrays, {"segment_ids": (segment_ids, "B T")})
    check_one_dtype("chunk_ssd", q=q, k=k, v=v)
    if sizes["HV"] % sizes["H"]:
        raise ValueError(f"chunk_ssd: HV={sizes['HV']} must be a multiple of H={sizes['H']}")
    settings = {"initial_state": initial_state, "segment_ids": segment_ids, "tile": tile}
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    settings |= {"scale": scale, "axes": AXES if initial_state is None else CONTINUED_AXES}
    return call("chunk_ssd", IMPLEMENTATIONS, implementation, q, k, v, g, beta, **settings)
