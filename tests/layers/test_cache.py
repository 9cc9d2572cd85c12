"""Numbering of documents and of the tokens in them, across padding and across calls."""

import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.layers.cache import place_tokens

ONE, ZERO = jnp.ones(1, jnp.int32), jnp.zeros(1, jnp.int32)


@pytest.mark.parametrize(
    "segment_ids, document, position",
    [
        ([1, 1, 1], [1, 1, 1], [0, 1, 2]),
        ([0, 0, 4, 4], [0, 0, 1, 1], [0, 0, 0, 1]),
        ([2, 2, 1, 1, 1, 2], [1, 1, 2, 2, 2, 3], [0, 1, 0, 1, 2, 0]),
        ([3, 0, 3, 0, 5, 0], [1, 0, 1, 0, 2, 0], [0, 0, 1, 0, 0, 0]),
        ([0, 0], [0, 0], [0, 0]),
    ],
)
def test_placement(segment_ids, document, position):
    placement = place_tokens(jnp.asarray([segment_ids], jnp.int32), ONE, ZERO)
    np.testing.assert_array_equal(placement.document[0], document)
    np.testing.assert_array_equal(placement.position[0], position)


def test_calls_continue_the_open_document():
    first = place_tokens(jnp.asarray([[0, 7, 7, 9, 9, 0]], jnp.int32), ONE, ZERO)
    assert (int(first.open_document[0]), int(first.next_position[0])) == (2, 2)
    padding = place_tokens(jnp.zeros((1, 3), jnp.int32), first.open_document, first.next_position)
    assert (int(padding.open_document[0]), int(padding.next_position[0])) == (2, 2)
    second = place_tokens(jnp.asarray([[0, 1, 1, 2]], jnp.int32), padding.open_document, padding.next_position)
    np.testing.assert_array_equal(second.document, [[0, 2, 2, 3]])
    np.testing.assert_array_equal(second.position, [[0, 2, 3, 0]])
    assert (int(second.open_document[0]), int(second.next_position[0])) == (3, 1)
