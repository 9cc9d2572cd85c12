"""Prompts: what is no text, ids outside the vocabulary, chats."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.config.model import ModelConfig
from kimi_jax.data.chat import encode_chat
from kimi_jax.data.kimi_tokenizer import KimiTokenizer
from kimi_jax.data.tokenizers import ByteTokenizer
from kimi_jax.errors import UserError
from kimi_jax.generate.api import Generator
from kimi_jax.interop.hf_export import export_model
from kimi_jax.interop.saved_model import SavedModel
from kimi_jax.models.decoder import abstract

pytest.importorskip("tiktoken")

GENERATE = Path(__file__).parents[2] / "scripts" / "generate.py"
MIXERS = {"mla": {"kind": "mla", "num_heads": 2, "nope_dim": 8, "rope_dim": 4, "value_dim": 8, "latent_dim": 16}}
SIZES = {"model_dim": 16, "num_layers": 1, "pattern": ("mla",), "ffn": {"kind": "dense", "hidden_dim": 16}}


@pytest.fixture(scope="module")
def kimi():
    """A tokenizer in Kimi's format without merges."""

    def build(folder):
        path = folder / "tiktoken.model"
        path.write_bytes(b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)))
        return KimiTokenizer(path)

    return build


def saved_model(tokenizer, **changes):
    cfg = ModelConfig(vocab_size=tokenizer.vocab_size, mixers=MIXERS, dtype="float32", **SIZES)
    _, params, buffers = abstract(cfg)

    params = jax.tree.map(lambda x: jnp.full(x.shape, 0.1, x.dtype), params)
    fields = {"tokenizer": tokenizer, "stop_ids": (tokenizer.eos_id,), "max_length": 64} | changes
    return SavedModel(cfg, params, buffers, **fields)


def test_a_command_line_that_is_not_utf8():
    generator = Generator(saved_model(ByteTokenizer()))
    with pytest.raises(UserError, match="prompt: character 2 is not UTF-8"):
        generator.encode(os.fsdecode(b"ab\xff"))


def test_ids_are_checked():
    generator = Generator(saved_model(ByteTokenizer()))
    np.testing.assert_array_equal(generator.encode(np.array([0, 257])), [0, 257])
    for ids, message in (([258], "token 258 is outside"), ([-1], "token -1 is outside"), ([], "is empty")):
        with pytest.raises(UserError, match=message):
            generator.encode(np.array(ids, np.int32))


def test_the_end_of_a_turn_ends_a_text(kimi, tmp_path):
    tokenizer = kimi(tmp_path)
    turn = tokenizer.specials["<|im_end|>"]
    assert Generator(saved_model(tokenizer)).stop_ids == (tokenizer.eos_id, turn)
    assert Generator(saved_model(tokenizer, stop_ids=(turn,))).stop_ids == (turn,)


@pytest.mark.slow
def test_the_script_prints_what_the_terminal_has_letters_for(tmp_path):
    checkpoint = export_model(saved_model(ByteTokenizer()), tmp_path / "public")
    command = [sys.executable, GENERATE, "--checkpoint", checkpoint, "--prompt", "\xe9", "--max-new-tokens", "3"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout[0]) == (0, "?"), done.stderr


@pytest.mark.slow
def test_the_script_chats(kimi, tmp_path):
    tokenizer = kimi(tmp_path)
    checkpoint = export_model(saved_model(tokenizer), tmp_path / "public")
    (tmp_path / "tools.json").write_text(json.dumps([{"type": "function", "function": {"name": "grep"}}]))
    command = [
        sys.executable,
        GENERATE,
        "--checkpoint",
        checkpoint,
        "--chat",
        "--prompt",
        "hi",
        "--system",
        "Be brief.",
    ]
    command += ["--tools", tmp_path / "tools.json", "--max-new-tokens", "3", "--temperature", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    ids = encode_chat(tokenizer, talk, json.loads((tmp_path / "tools.json").read_text()))
    assert "hi" not in done.stdout  # only the reply is printed
    assert len(ids) > 100
    (tmp_path / "tools.json").write_text("{}")
    refused = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert refused.returncode == 2
    why = "is not JSON: it is a dict at top level, must be a list"
    assert refused.stderr == f"error: {tmp_path / 'tools.json'}: {why}\n"
