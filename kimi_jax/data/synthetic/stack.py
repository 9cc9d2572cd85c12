"""Stack: pushes and pops on many stacks; whether a state follows what happens to it."""

import numpy as np

from kimi_jax.config.data import StackData
from kimi_jax.data.example import Example

PUSH, POP, FIRST_STACK = 0, 1, 2
OPERATION = 3  # tokens: what, which stack, which element


def vocab_size(cfg: StackData) -> int:
    return FIRST_STACK + cfg.num_stacks + cfg.num_symbols


def draw(cfg: StackData, random: np.random.Generator) -> Example:
    """Draws operations `<push> id x` and `<pop> id x`; x of a pop is the element last pushed on stack id.

    Scored is the prediction of x at the id of a pop. Which operation comes is a fair coin as long as some stack holds
    an element; a pop takes one of the stacks that do, each alike.

    Source: Kimi Linear, arXiv:2510.26692, section 5.1.
    """
    num_operations = cfg.seq_len // OPERATION
    coins, shares = random.random((2, num_operations)).tolist()
    pushed_on = random.integers(cfg.num_stacks, size=num_operations).tolist()
    symbols = (FIRST_STACK + cfg.num_stacks + random.integers(cfg.num_symbols, size=num_operations)).tolist()
    stacks: list[list[int]] = [[] for _ in range(cfg.num_stacks)]
    filled: list[int] = []  # stacks that hold an element
    popped, ids = [], []
    for step, (coin, share) in enumerate(zip(coins, shares, strict=True)):
        pop = coin < 0.5 and bool(filled)
        popped.append(pop)
        if pop:
            at = int(share * len(filled))
            ids.append(filled[at])
            held = stacks[filled[at]]
            symbols[step] = held.pop()
            if not held:
                del filled[at]
        else:
            ids.append(pushed_on[step])
            held = stacks[pushed_on[step]]
            if not held:
                filled.append(pushed_on[step])
            held.append(symbols[step])
    pops = np.array(popped)
    tokens = np.stack([np.where(pops, POP, PUSH), FIRST_STACK + np.array(ids), np.array(symbols)], axis=1).ravel()
    scored = np.zeros(tokens.shape, bool)
    scored[1::OPERATION] = pops
    return Example.of_one_document(cfg.seq_len, tokens, np.roll(tokens, -1), scored)
