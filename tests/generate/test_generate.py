"""Generation against the whole forward pass: the same logits token by token, in pieces, in batches, as text."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.config.model import ModelConfig
from kimi_jax.data.tokenizers import ByteTokenizer
from kimi_jax.errors import UserError
from kimi_jax.generate import api, prefill
from kimi_jax.generate.api import FINISHED, Generator, Settings
from kimi_jax.generate.decode import decode_step
from kimi_jax.generate.prefill import cut_pieces, init_state, padded_length, prefill_piece
from kimi_jax.interop.saved_model import SavedModel
from kimi_jax.models.decoder import init, merge

TOLERANCE = 1e-5  # largest difference of logits relative to their standard deviation, float32; measured 4.1e-6

CONFIG = ModelConfig(
    vocab_size=264,  # more rows than the tokenizer has tokens
    model_dim=16,
    num_layers=2,
    pattern=("kda", "mla"),
    mixers={
        "kda": {"kind": "kda", "num_heads": 2, "key_dim": 8, "value_dim": 8},
        "mla": {"kind": "mla", "num_heads": 2, "nope_dim": 8, "rope_dim": 4, "value_dim": 8, "latent_dim": 12}
        | {"position": {"kind": "rope"}},
    },
    ffn={"kind": "moe", "num_experts": 4, "top_k": 2, "hidden_dim": 16},
    init_std=0.4,
    dtype="float32",
)
PROMPTS = ["import numpy as np", "x", "def é漢(a):\n"]


@pytest.fixture(scope="module")
def graphdef_and_model():
    graphdef, params, buffers = jax.jit(functools.partial(init, CONFIG))(jax.random.key(0))
    head = params["head"]["weight"]
    params["head"]["weight"] = head.at[:, ByteTokenizer.vocab_size :].multiply(10)  # tokens that must not be picked
    return graphdef, SavedModel(CONFIG, params, buffers, ByteTokenizer(), stop_ids=(), max_length=64)


@pytest.fixture(scope="module")
def generator(graphdef_and_model):
    return Generator(graphdef_and_model[1])


@pytest.fixture(scope="module")
def logits_of(graphdef_and_model):
    """(tokens of one row) -> logits [T, A] of one forward pass without caches, at one compiled length."""
    graphdef, model = graphdef_and_model

    @jax.jit
    def run(tokens_BT, segment_ids_BT):
        decoder = merge(graphdef, model.params, model.buffers)
        return decoder.logits(decoder(tokens_BT, segment_ids_BT=segment_ids_BT)[0])

    def logits_TA(tokens):
        padded = np.zeros((2, 1, 160), np.int32)
        padded[0, 0, : len(tokens)], padded[1, 0, : len(tokens)] = tokens, 1
        return np.asarray(run(*padded))[0, : len(tokens)]

    return logits_TA


def test_decode_equals_the_forward_pass(graphdef_and_model, logits_of, monkeypatch):
    """Prompts of three lengths in pieces of 16, then known tokens one by one."""
    monkeypatch.setattr(prefill, "MAX_PIECE", 16)
    monkeypatch.setattr(prefill, "MIN_PIECE", 16)
    graphdef, model = graphdef_and_model
    weights = (model.params, model.buffers)
    texts = np.random.default_rng(0).integers(0, 256, (3, 60))
    lengths = (37, 1, 16)
    caches, last_BD = init_state(graphdef, *weights, batch=3, slots=64)
    feed = jax.jit(functools.partial(prefill_piece, graphdef))
    step = jax.jit(functools.partial(decode_step, graphdef))
    head = jax.jit(lambda h: merge(graphdef, *weights).logits(h[:, None])[:, 0, : ByteTokenizer.vocab_size])
    pieces = list(cut_pieces([row[:n] for row, n in zip(texts, lengths, strict=True)]))
    assert [piece[0].shape for piece in pieces] == [(3, 16)] * 3
    for piece in pieces:
        caches, last_BD = feed(*weights, caches, last_BD, *piece)
    want = [logits_of(row)[:, : ByteTokenizer.vocab_size] for row in texts]
    worst = 0.0
    for offset in range(12):
        got = np.asarray(head(last_BD))
        for row, (length, expected) in enumerate(zip(lengths, want, strict=True)):
            worst = max(worst, np.abs(got[row] - expected[length + offset - 1]).max() / expected.std())
        next_B = jnp.array([row[n + offset] for row, n in zip(texts, lengths, strict=True)])
        caches, last_BD = step(*weights, caches, next_B)
    print(f"largest difference {worst:.1e} standard deviations")
    assert worst <= TOLERANCE


def test_greedy_text_is_the_argmax_of_the_forward_pass(generator, logits_of):
    settings = Settings(max_new_tokens=12)
    (completion,) = generator.generate(PROMPTS[:1], settings).completions
    tokens = [*generator.encode(PROMPTS[0]), *completion.token_ids]
    logits_TA = logits_of(tokens)[:, : ByteTokenizer.vocab_size]
    start = len(tokens) - len(completion.token_ids)
    assert len(completion.token_ids) == 12
    np.testing.assert_array_equal(completion.token_ids, np.argmax(logits_TA[start - 1 : -1], axis=-1))
    assert (np.argmax(logits_of(tokens), axis=-1) >= ByteTokenizer.vocab_size).any()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_gives_what_each_prompt_gives_alone(generator, temperature):
    together = generator.generate(PROMPTS, Settings(16, temperature, seed=5)).completions
    for row, prompt in enumerate(PROMPTS):
        alone = generator.generate([prompt], Settings(16, temperature, seed=5 + row)).completions
        assert alone == (together[row],)


def test_the_seed_decides(generator):
    draw = lambda seed: generator.generate(["x"], Settings(16, temperature=1.0, seed=seed)).completions
    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    same_prompt = generator.generate(["x"] * 3, Settings(16, temperature=1.0)).completions
    assert len(set(same_prompt)) == 3


def test_the_stream_is_the_text(generator):
    settings = Settings(16, temperature=1.0, seed=2)
    pieces = list(generator.stream("x", settings))
    assert len(pieces) == 17
    (completion,) = generator.generate(["x"], settings).completions
    assert "".join(pieces) == completion.text


def test_characters_of_several_bytes_are_shown_whole():
    stream = api._TextStream(ByteTokenizer())
    assert [stream.add(byte) for byte in "é漢".encode()] + [stream.finish()] == ["", "é", "", "", "漢", ""]
    assert stream.add(0xC3) + stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_a_stop_token_ends_its_row_alone(generator):
    settings = Settings(10)
    prompts = [generator.encode(prompt) for prompt in PROMPTS]
    whole = np.array(list(generator.steps(prompts, settings)))
    stop = next(token for token in whole[2:, 0].tolist() if token not in whole[:, 1:])
    first = int(np.argmax(whole[:, 0] == stop))
    stopping = copy.copy(generator)
    stopping.stop_ids = (stop,)
    steps = np.array(list(stopping.steps(prompts, settings)))
    np.testing.assert_array_equal(steps[: first + 1, 0], whole[: first + 1, 0])
    assert (steps[first + 1 :, 0] == FINISHED).all()
    np.testing.assert_array_equal(steps[:, 1:], whole[:, 1:])
    one, other, _ = stopping.generate(PROMPTS, settings).completions
    assert (one.ended_by, one.token_ids) == ("stop", tuple(whole[:first, 0]))
    assert (other.ended_by, len(other.token_ids)) == ("length", 10)
    assert len(list(stopping.stream(PROMPTS[0], settings))) == first + 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_are_not_finite_give_no_text(graphdef_and_model, temperature):
    """One column of the head, of a token that would be drawn once in a while, is enough."""
    model = graphdef_and_model[1]
    head = {"weight": model.params["head"]["weight"].at[:, 7].set(jnp.nan)}
    broken = Generator(SavedModel(**vars(model) | {"params": model.params | {"head": head}}))
    with pytest.raises(UserError, match=r"new token 0 of prompt 0: a logit is not finite; are the weights whole\?"):
        broken.generate(["x"], Settings(2, temperature))


def test_pieces_hold_every_token_once():
    prompts = [np.arange(1, n + 1) for n in (1, 1500, 1024)]
    pieces = list(cut_pieces(prompts))
    tokens, segment_ids = (np.concatenate(part, axis=1) for part in zip(*pieces, strict=True))
    assert [p[0].shape for p in pieces] == [(3, 1024), (3, 1024)]
    assert tokens.shape[1] == padded_length(1500) == 2048
    for row, prompt in enumerate(prompts):
        np.testing.assert_array_equal(tokens[row][segment_ids[row] == 1], prompt)
        assert (segment_ids[row] == (np.arange(2048) < len(prompt))).all()
    assert [padded_length(n) for n in (1, 32, 33, 1024, 1025, 3000)] == [32, 32, 64, 1024, 2048, 3072]


def test_refusals(graphdef_and_model, generator):
    with pytest.raises(UserError, match="prompt: is empty"):
        generator.generate([""])
    with pytest.raises(UserError, match=r"prompt: is float64 of shape \[1\], must be text or integers \[N\]"):
        generator.generate([[1.5]])
    with pytest.raises(UserError, match=r"prompt: token 1099511627776 is outside"):
        generator.generate([[2**40]])
    with pytest.raises(UserError, match="max_new_tokens=0: must be at least 1"):
        Settings(0)
    with pytest.raises(UserError, match="prompts: there is none"):
        generator.generate([])
    with pytest.raises(UserError, match=r"seed=-1: must be in \[0, 2\^31\)"):
        Settings(seed=-1)
    with pytest.raises(UserError, match="temperature=-1"):
        Settings(temperature=-1)
    model = graphdef_and_model[1]
    with pytest.raises(UserError, match="the checkpoint has no tokenizer"):
        Generator(SavedModel(**vars(model) | {"tokenizer": None}))
    narrow = CONFIG.model_dump() | {"vocab_size": 100}
    small = Generator(SavedModel(**vars(model) | {"cfg": ModelConfig(**narrow)}))
    with pytest.raises(UserError, match="token 195 is outside the model's vocabulary of 100"):
        small.encode("aé")
