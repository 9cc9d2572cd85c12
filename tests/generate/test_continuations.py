"""Continuations against whole passes over context and continuation, and how many tokens they cost."""

import numpy as np
import pytest
from tiny_model import make_model, make_reference

from kimi_jax.errors import UserError
from kimi_jax.generate import continuations, prefill
from kimi_jax.generate.continuations import Request, find_families, score_continuations
from kimi_jax.generate.forward import Forward

TOLERANCE = 2e-5  # largest difference of a sum of at most 20 float32 log-likelihoods; measured 9.8e-6
VOCAB = 50

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def model():
    return make_model(VOCAB)


@pytest.fixture(scope="module")
def expect(model):
    """Request -> (log-likelihood, greedy), by one pass over everything."""
    score = make_reference(model, length=64)

    def expected(request):
        logits_TA, likelihood_T = score(np.array(request.context + request.continuation))
        start = len(request.context)
        best = np.argmax(logits_TA[start - 1 : -1], axis=-1)
        return likelihood_T[start:].sum(dtype=np.float64), (best == request.continuation).all()

    return expected


def draw(rng, length) -> tuple[int, ...]:
    return tuple(rng.integers(0, VOCAB, length).tolist())


def make_requests(model) -> list[Request]:
    """Four choices per question, questions behind the same examples and without, in mixed order."""
    rng = np.random.default_rng(0)
    examples = draw(rng, 20)
    contexts = [examples + draw(rng, n) for n in (3, 11, 17)] + [examples, draw(rng, 5), draw(rng, 30), draw(rng, 1)]
    requests = [Request(context, draw(rng, n)) for context in contexts for n in (1, 2, 7, 20)]
    requests.append(Request(contexts[0], ()))
    return [requests[i] for i in rng.permutation(len(requests))]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(prefill, "MAX_PIECE", 16)
    monkeypatch.setattr(prefill, "MIN_PIECE", 16)
    monkeypatch.setattr(continuations, "MIN_SHARED", 12)


def test_scores_are_those_of_whole_passes_and_nothing_runs_twice(model, expect, small):
    requests = make_requests(model)
    forward = Forward(model)
    got = score_continuations(forward, requests, batch_size=4)
    worst = 0.0
    for request, answer in zip(requests, got, strict=True):
        likelihood, greedy = expect(request) if request.continuation else (0.0, True)
        worst = max(worst, abs(answer.log_likelihood - likelihood))
        assert answer.greedy == greedy
    print(f"largest difference {worst:.1e}")
    assert worst <= TOLERANCE
    contexts = 20 + (3 + 11 + 17) + (5 + 30 + 1)  # the examples once, then each question once
    fed = sum(max(len(request.continuation) - 1, 0) for request in requests)  # behind a last token nothing is asked
    assert forward.num_tokens == contexts + fed


def test_a_greedy_continuation_is_told(model, expect, small):
    context = (3, 1, 4, 1, 5)
    score = make_reference(model, length=64)
    tokens = context
    for _ in range(3):
        tokens += (int(np.argmax(score(np.array(tokens))[0][-1])),)
    requests = [Request(context, tokens[5:]), Request(context, (*tokens[5:7], (tokens[7] + 1) % VOCAB))]
    assert [answer.greedy for answer in score_continuations(Forward(model), requests, batch_size=4)] == [True, False]


def test_families_share_a_long_beginning():
    a, b = tuple(range(100)), tuple(range(100, 180))
    contexts = [(*a, 7), (*b, 1), (*a, 8, 9), b, (*a[:60], 3), (1, 2), (1, 3)]
    families = {family.shared: set(family.contexts) for family in find_families(contexts)}
    assert families == {
        100: {(*a, 7), (*a, 8, 9)},
        80: {b, (*b, 1)},
        0: {(*a[:60], 3), (1, 2), (1, 3)},
    }
    assert find_families([]) == []


def test_an_empty_context_is_refused(model):
    with pytest.raises(UserError, match="request 1: its context is empty; must have at least one token"):
        score_continuations(Forward(model), [Request((1,), (2,)), Request((), (2,))])
