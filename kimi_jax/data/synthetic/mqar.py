"""Multi-query associative recall: values by their keys; how exactly a state can be addressed."""

import numpy as np

from kimi_jax.config.data import MqarData
from kimi_jax.data.example import Example

SEPARATOR = 0
FIRST_KEY = 1


def vocab_size(cfg: MqarData) -> int:
    return FIRST_KEY + cfg.key_tokens + cfg.num_values


def draw(cfg: MqarData, random: np.random.Generator) -> Example:
    """Draws key, value, key, value, ..., the separator, and queries: the keys again in random order.

    The keys of an example differ. At each query the target is the value that followed the key. Without `num_pairs` the
    pairs take half of the sequence; every key is asked for once if there is room, and what is left is padding.

    Source: Kimi Linear, arXiv:2510.26692, section 5.1; Arora et al., Zoology, arXiv:2312.04927.
    """
    pairs = cfg.pairs
    keys = FIRST_KEY + random.permutation(cfg.key_tokens)[:pairs]
    values = FIRST_KEY + cfg.key_tokens + random.integers(cfg.num_values, size=pairs)
    queries = random.permutation(pairs)[: cfg.seq_len - 2 * pairs - 1]
    tokens = np.concatenate([np.stack([keys, values], axis=1).ravel(), [SEPARATOR], keys[queries]])
    targets = np.concatenate([np.zeros(2 * pairs + 1, int), values[queries]])
    return Example.of_one_document(cfg.seq_len, tokens, targets, np.arange(len(tokens)) > 2 * pairs)
