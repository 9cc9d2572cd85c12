"""Public entries of the products of Newton-Schulz steps: matrices R x C, and symmetric ones of S = min(R, C).

Of a symmetric matrix only the blocks of 128 x 128 up to the diagonal count: the kernel neither reads nor writes others.
"""

from jaxtyping import Array, Float

from pallas_kernels.arguments import check_arrays, check_one_dtype
from pallas_kernels.dispatch import Implementation, call
from pallas_kernels.symmetric_matmul import mosaic_gpu, xla

IMPLEMENTATIONS = {  # of each entry, fastest first
    name: {
        "mosaic_gpu": Implementation(getattr(mosaic_gpu, name), mosaic_gpu.refuse),
        "xla": Implementation(getattr(xla, name)),
    }
    for name in ("gram", "multiply", "quadratic", "apply")
}


def gram(x: Float[Array, "N R C"], *, implementation: str = "auto") -> Float[Array, "N S S"]:
    """Computes x x^T of wide or square matrices, x^T x of tall ones.

    Args:
      x: 16-bit for the kernel, any float dtype for "xla".
      implementation: "auto", "mosaic_gpu" or "xla".

    Returns:
      In the dtype of x, accumulated in float32.

    Raises:
      ValueError: an argument has the wrong shape or dtype.
      NotImplementedError: the implementation refuses these arguments.
    """
    check_arrays("gram", {"x": (x, "N R C")})
    return call("gram", IMPLEMENTATIONS["gram"], implementation, x)


def multiply(
    x: Float[Array, "N S S"], y: Float[Array, "N S S"], *, implementation: str = "auto"
) -> Float[Array, "N S S"]:
    """Computes x y of symmetric matrices that commute, as polynomials of one matrix do, so that x y is symmetric too.

    Arguments and errors as for `gram`.
    """
    check_arrays("multiply", {"x": (x, "N S S"), "y": (y, "N S S")})
    check_one_dtype("multiply", x=x, y=y)
    return call("multiply", IMPLEMENTATIONS["multiply"], implementation, x, y)


def quadratic(
    x: Float[Array, "N S S"], *, a: float, b: float, c: float, implementation: str = "auto"
) -> Float[Array, "N S S"]:
    """Computes a I + b x + c x x of symmetric matrices, rounded once. Arguments and errors as for `gram`."""
    check_arrays("quadratic", {"x": (x, "N S S")})
    return call("quadratic", IMPLEMENTATIONS["quadratic"], implementation, x, a=a, b=b, c=c)


def apply(q: Float[Array, "N S S"], x: Float[Array, "N R C"], *, implementation: str = "auto") -> Float[Array, "N R C"]:
    """Computes q x of wide or square matrices, x q of tall ones. Arguments and errors as for `gram`."""
    check_arrays("apply", {"x": (x, "N R C"), "q": (q, "N S S")}, S=min(x.shape[-2:]))
    check_one_dtype("apply", q=q, x=x)
    return call("apply", IMPLEMENTATIONS["apply"], implementation, q, x)
