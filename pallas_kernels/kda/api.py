"""Public entry of Kimi Delta Attention: signatures, argument checks and the table of implementations."""

from jaxtyping import Array, Float, Int

from pallas_kernels.arguments import Arrays, check_arrays, check_one_dtype
from pallas_kernels.dispatch import Implementation, call
from pallas_kernels.kda import chunked, mosaic_gpu, reference, step_mosaic_gpu
from pallas_kernels.kda.gates import Gate, LowerBoundGate, SoftplusGate
from pallas_kernels.kda.states import by_blocks
from pallas_kernels.partition import Axes, refuse_parts

__all__ = [
    "IMPLEMENTATIONS",
    "STEP_IMPLEMENTATIONS",
    "Gate",
    "LowerBoundGate",
    "SoftplusGate",
    "chunk_kda",
    "chunk_kda_with_states",
    "step_kda",
]


# Fastest first.
IMPLEMENTATIONS = {
    "mosaic_gpu": Implementation(mosaic_gpu.chunk_kda, mosaic_gpu.refuse),
    "chunked": Implementation(chunked.chunk_kda, chunked.refuse),
    "reference": Implementation(reference.chunk_kda, refuse_parts),
}
STATES_IMPLEMENTATIONS = {
    "mosaic_gpu": Implementation(mosaic_gpu.chunk_kda_with_states, mosaic_gpu.refuse),
    "chunked": Implementation(by_blocks(chunked.chunk_kda), chunked.refuse),
    "reference": Implementation(by_blocks(reference.chunk_kda)),
}
STEP_IMPLEMENTATIONS = {
    "mosaic_gpu": Implementation(step_mosaic_gpu.step_kda, step_mosaic_gpu.refuse),
    "reference": Implementation(reference.step_kda),
}
AXES = Axes(("BTH",) * 5, ("BTH", "BH"), {"gate": "H", "segment_ids": "BT"}, exchanges=True)
INPUTS = ("B-H",) * 5
OPTIONAL = {"gate": "H", "initial_state": "BH", "segment_ids": "B"}
CONTINUED_AXES = Axes(INPUTS, ("B-H", "BH"), OPTIONAL)
STATES_AXES = Axes(INPUTS, ("B-H", "BH", "B-H"), OPTIONAL)
STEP_AXES = Axes((*INPUTS, "BH"), ("B-H", "BH"), {"gate": "H", "accepted": "B"})
POOL_AXES = Axes((*("--H",) * 5, "-H"), ("--H", "-H"), {"gate": "H"})  # any row may belong to any sequence


def chunk_kda(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    g: Float[Array, "B T HV K"],
    beta: Float[Array, "B T HV"],
    *,
    gate: Gate = None,
    scale: float | None = None,
    initial_state: Float[Array, "B HV V K"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    normalize_qk: bool = False,
    implementation: str = "auto",
    tile: int | None = None,
) -> tuple[Float[Array, "B T HV V"], Float[Array, "B HV V K"]]:
    """Runs the gated delta rule over a whole sequence.

    Per value head: S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T and o_t = scale S_t^T q_t.
    Without `initial_state` tokens may be cut over devices, which hand the state on (`pallas_kernels.partition`).

    Args:
      q, k: queries and keys, bfloat16, float16 or float32.
      v: values, same dtype; HV is a multiple of H, and value head h reads query head h // (HV // H).
      g: log-decay in nats, float32, <= 0; with a `gate`, the raw logit in any of the dtypes above.
      beta: step size per token and head, in (0, 1), or (0, 2) for negative eigenvalues.
      gate: fused and differentiated through; None: g is the log-decay itself.
      scale: factor on the queries (after the norm); None: K**-0.5.
      initial_state: float32, V first; enters the first segment; None: zero.
      segment_ids: int32; 0 is padding, which leaves the state alone, gives zero output and zero gradient, and may
        hold anything. A token whose id differs from the last non-padding token before it starts from a zero state.
      normalize_qk: divide q and k by sqrt(sum of squares + 1e-6) first, in float32.
      implementation: "auto" or a key of `IMPLEMENTATIONS`.
      tile: tokens per chunk; None: the default of the implementation. The kernels have 64 and refuse any other.

    Returns:
      (o in the dtype of v, state after the last non-padding token, float32). Differentiable in every array and in the
      gate's a_log and dt_bias.

    Raises:
      ValueError: an argument has the wrong shape or kind.
      NotImplementedError: the implementation refuses these arguments; the message says why.

    Source: Kimi Linear, arXiv:2510.26692, equation 1.
    """
    continued = {"initial_state": (initial_state, "B HV V K")}
    _check("chunk_kda", "T", q, k, v, g, beta, gate, continued, {"segment_ids": (segment_ids, "B T")})
    return call(
        "chunk_kda",
        IMPLEMENTATIONS,
        implementation,
        *(q, k, v, g, beta),
        gate=gate,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        initial_state=initial_state,
        segment_ids=segment_ids,
        normalize_qk=normalize_qk,
        tile=tile,
        axes=AXES if initial_state is None else CONTINUED_AXES,
    )


def chunk_kda_with_states(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    g: Float[Array, "B T HV K"],
    beta: Float[Array, "B T HV"],
    *,
    every: int,
    gate: Gate = None,
    scale: float | None = None,
    initial_state: Float[Array, "B HV V K"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    normalize_qk: bool = False,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T HV V"], Float[Array, "B HV V K"], Float[Array, "B N HV V K"]]:
    """Runs `chunk_kda` and also returns the state after every `every` tokens: for prefix caches and split sequences.

    Args:
      every: tokens between states, a multiple of 64, at most T.
      The others: as in `chunk_kda`.

    Returns:
      (o, final state, states [B, T // every, HV, V, K] float32): states[:, n] is the final state of the first
      (n + 1) * every tokens, exactly, or through the kernels rounded to float16. There are no gradients through the
      kernels; `chunked` and `reference` have them.

    Raises:
      ValueError: an argument has the wrong shape or kind, or `every` does not fit.
      NotImplementedError: the implementation refuses these arguments; the message says why.
    """
    continued = {"initial_state": (initial_state, "B HV V K")}
    _check("chunk_kda_with_states", "T", q, k, v, g, beta, gate, continued, {"segment_ids": (segment_ids, "B T")})
    if every % 64 or not 0 < every <= q.shape[1]:
        raise ValueError(f"chunk_kda_with_states: {every=} must be a multiple of 64 from 64 to T={q.shape[1]}")
    return call(
        "chunk_kda_with_states",
        STATES_IMPLEMENTATIONS,
        implementation,
        *(q, k, v, g, beta),
        every=every,
        gate=gate,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        initial_state=initial_state,
        segment_ids=segment_ids,
        normalize_qk=normalize_qk,
        tile=None,
        axes=STATES_AXES,
    )


def step_kda(
    q: Float[Array, "N *T H K"],
    k: Float[Array, "N *T H K"],
    v: Float[Array, "N *T HV V"],
    g: Float[Array, "N *T HV K"],
    beta: Float[Array, "N *T HV"],
    state: Float[Array, "P HV V K"],
    *,
    gate: Gate = None,
    scale: float | None = None,
    normalize_qk: bool = False,
    slots: Int[Array, "N"] | None = None,
    accepted: Int[Array, "N"] | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "N *T HV V"], Float[Array, "P HV V K"]]:
    """Runs one token of `chunk_kda` per sequence, or a few: the decode step.

    Donate the state to the enclosing `jax.jit` and it is updated in place: only the rows in use are read and written.

    To verify T drafts, call with `accepted` = 0; once a of them are accepted, let the next call begin with those a
    tokens, followed by its own drafts, and `accepted` = a. No state but the one is ever kept.

    Args:
      q, k, v, g, beta: as for `chunk_kda`, without the T axis for one token, with it for several.
      state: float32 or bfloat16 (rounded once per call), V first: what `chunk_kda` or the step before returned; with
        `slots`, a pool of P rows, else one row per sequence.
      gate, scale, normalize_qk: as in `chunk_kda`.
      slots: int32, the row of the pool that each sequence has; negative: inactive, its o is zero and no row changes.
        A row belongs to one sequence at a time.
      accepted: int32 in 0..T, tokens after which the state is kept; None: all. All T outputs are computed in any case.
      implementation: "auto" or a key of `STEP_IMPLEMENTATIONS`.

    Returns:
      (o in the dtype of v, the state after the accepted tokens, in its own dtype). Rows not in `slots` keep every bit.

    Raises:
      ValueError: an argument has the wrong shape or dtype.
      NotImplementedError: the implementation refuses these arguments; the message says why.
    """
    one, rows = q.ndim == 3, "B" if slots is None else "P"
    integers = {"slots": (slots, "B"), "accepted": (accepted, "B")}
    _check("step_kda", "" if one else "T", q, k, v, g, beta, gate, {"state": (state, f"{rows} HV V K")}, integers)
    q, k, v, g, beta = (x[:, None] if one else x for x in (q, k, v, g, beta))
    o, state = call(
        "step_kda",
        STEP_IMPLEMENTATIONS,
        implementation,
        *(q, k, v, g, beta, state),
        gate=gate,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        normalize_qk=normalize_qk,
        slots=slots,
        accepted=accepted,
        axes=STEP_AXES if slots is None else POOL_AXES,
    )
    return o[:, 0] if one else o, state


def _check(op: str, time: str, q, k, v, g, beta, gate, floating: Arrays, integer: Arrays) -> None:
    """Compares all arguments with what q and v imply; `time` is "T", or "" for one token."""
    if not isinstance(gate, SoftplusGate | LowerBoundGate | None):
        raise ValueError(f"{op}: {gate=} must be a SoftplusGate, a LowerBoundGate or None")
    arrays = {"q": (q, f"B {time} H K"), "k": (k, f"B {time} H K"), "v": (v, f"B {time} HV V")}
    arrays |= {"g": (g, f"B {time} HV K"), "beta": (beta, f"B {time} HV"), **floating}
    if gate is not None:
        arrays |= {"gate.dt_bias": (gate.dt_bias, "HV K"), "gate.a_log": (gate.a_log, "HV")}
    sizes = check_arrays(op, arrays, integer)
    check_one_dtype(op, q=q, k=k, v=v)
    if sizes["HV"] % sizes["H"]:
        raise ValueError(f"{op}: HV={sizes['HV']} must be a multiple of H={sizes['H']}")
    if isinstance(gate, SoftplusGate) and gate.a_log is None:
        raise ValueError(f"{op}: gate.a_log is None, which only LowerBoundGate allows")
    if isinstance(gate, LowerBoundGate) and gate.bound >= 0:
        raise ValueError(f"{op}: gate.bound={gate.bound} must be negative")
