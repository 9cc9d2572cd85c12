"""The rules that pick a token: the greedy one, and frequencies of the random one against the exact distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.errors import UserError
from kimi_jax.generate.sampling import Greedy, make_rule, pick

NUM_DRAWS = 20_000
LOGITS_A = np.log(np.array([0.1, 0.4, 0.05, 0.2, 0.25]))
PICK = jax.jit(pick)


def frequencies(**settings) -> np.ndarray:
    keys = jax.random.split(jax.random.key(0), NUM_DRAWS)
    logits_BA = jnp.tile(jnp.float32(LOGITS_A), (NUM_DRAWS, 1))
    return np.bincount(np.asarray(PICK(logits_BA, keys, make_rule(**settings))), minlength=5) / NUM_DRAWS


def kept(*tokens: int, temperature: float = 1.0) -> np.ndarray:
    weights = np.where(np.isin(np.arange(5), tokens), np.exp(LOGITS_A / temperature), 0)
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 1.0}, kept(0, 1, 2, 3, 4)),
        ({"temperature": 0.5}, kept(0, 1, 2, 3, 4, temperature=0.5)),
        ({"temperature": 3.0}, kept(0, 1, 2, 3, 4, temperature=3.0)),
        ({"temperature": 1.0, "top_k": 2}, kept(1, 4)),
        ({"temperature": 2.0, "top_k": 1}, kept(1)),
        ({"temperature": 1.0, "top_k": 50}, kept(0, 1, 2, 3, 4)),
        # In order of probability: 0.4 0.25 0.2 0.1 0.05; the fewest that reach 0.6 are two, 0.7 three.
        ({"temperature": 1.0, "top_p": 0.6}, kept(1, 4)),
        ({"temperature": 1.0, "top_p": 0.7}, kept(1, 4, 3)),
        ({"temperature": 1.0, "top_p": 1e-6}, kept(1)),
        # top_p is a share of what top_k leaves: 0.4 / 0.65 = 0.62 of two tokens.
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.6}, kept(1)),
        ({"temperature": 1e-30}, kept(1)),
    ],
    ids=str,
)
def test_frequencies(settings, expected):
    found = frequencies(**settings)
    assert (found[expected == 0] == 0).all()
    five_sigma = 5 * np.sqrt(expected * (1 - expected) / NUM_DRAWS)
    assert (np.abs(found - expected) <= five_sigma + 1e-12).all()


def test_greedy_takes_the_first_of_the_best():
    assert make_rule(0.0, 0.3, 2) == make_rule(1e-50) == Greedy()
    logits_BA = jnp.array([[0.0, 2.0, 2.0], [-1e30, -jnp.inf, -2e30]])
    np.testing.assert_array_equal(PICK(logits_BA, jax.random.split(jax.random.key(0), 2), Greedy()), [1, 0])


def test_a_row_depends_on_its_own_key_alone():
    logits_BA = jax.random.normal(jax.random.key(1), (6, 40))
    keys, rule = jax.random.split(jax.random.key(2), 6), make_rule(1.0)
    whole = PICK(logits_BA, keys, rule)
    np.testing.assert_array_equal(PICK(logits_BA[2:4], keys[2:4], rule), whole[2:4])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, r"temperature=-1.0: must be in \[0, 3.4e\+38\]"),
        ({"temperature": 1e300}, r"temperature=1e\+300"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p=0.0: must be in \(0, 1\]"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0: must be at least 1"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(UserError, match=message):
        make_rule(**settings)
