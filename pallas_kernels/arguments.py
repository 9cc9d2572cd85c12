"""What an operator says of arguments that do not fit: one line with every array, what it is and what it must be."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array

type Arrays = Mapping[str, tuple[Array | None, str]]
"""Arrays by name, each with letters for its axes, as in "B T D"; None is left out, "W-1" is one less than W."""


def check_arrays(
    op: str, floating: Arrays, integer: Arrays | None = None, *, may_be_0: str = "", **sizes: int
) -> dict[str, int]:
    """Checks the shapes and kinds of an operator's arguments.

    Args:
      op: its name, for the message.
      floating, integer: what must be of these kinds. A letter stands for the size that it has first.
      may_be_0: letters of axes that may be empty.
      sizes: of letters that are known already.

    Returns:
      The size of every letter.

    Raises:
      ValueError: an array has another kind or shape, or an empty axis.
    """
    wrong = []
    for kind, arrays in (("floating", floating), ("integer", integer or {})):
        for name, (x, axes) in arrays.items():
            if x is None:
                continue
            want = _match(x.shape, axes.split(), sizes)
            if x.shape != want:
                wrong.append(f"{name} has shape {x.shape}, must be {_show(want)}")
            elif not jnp.issubdtype(x.dtype, getattr(jnp, kind)):
                wrong.append(f"{name} is {x.dtype}, must be {kind}")
    empty = [letter for letter, size in sizes.items() if size < 1 and letter not in may_be_0]
    wrong += [f"{letter}={sizes[letter]} must be at least 1" for letter in empty]
    if wrong:
        raise ValueError(f"{op}: " + "; ".join(wrong))
    return sizes


def _match(shape: tuple[int, ...], letters: list[str], sizes: dict[str, int]) -> tuple[int | str, ...]:
    """The shape that the letters stand for; those that have no size yet take it from `shape`."""
    if len(shape) == len(letters):
        for letter, size in zip(letters, shape, strict=True):
            if not letter.endswith("-1"):
                sizes.setdefault(letter, size)
    less = {f"{letter}-1": size - 1 for letter, size in sizes.items()}
    return tuple((sizes | less).get(letter, letter) for letter in letters)


def _show(shape: tuple[int | str, ...]) -> str:
    return f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"


def check_one_dtype(op: str, **arrays: Array | None) -> None:
    """Checks that arrays have one dtype; None is left out.

    Raises:
      ValueError: they have several.
    """
    dtypes = {name: x.dtype for name, x in arrays.items() if x is not None}
    if len(set(dtypes.values())) > 1:
        raise ValueError(f"{op}: " + ", ".join(f"{k} is {v}" for k, v in dtypes.items()) + ": must be of one dtype")
