"""Tokenizers in a public checkpoint: what the tokenizers library reads is what we encode with."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_jax.data.tokenizers import ByteTokenizer, load_tokenizer
from kimi_jax.errors import UserError
from kimi_jax.interop.tokenizer_files import byte_tokenizer_json, load_folder_tokenizer, write_tokenizer

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def engine():
    return tokenizers.Tokenizer.from_str(json.dumps(byte_tokenizer_json()))


@given(st.text() | st.text("<eos>pad ") | st.just("é漢\u0000\u2028😀<eos>\r\n  <pad><eos"))
def test_the_byte_tokenizer_for_others(engine, text):
    ours = ByteTokenizer()
    ids = engine.encode(text).ids
    np.testing.assert_array_equal(ids, ours.encode(text, specials=True))
    assert engine.decode(ids) == ours.decode(ids)


def test_the_byte_tokenizer_comes_back(tmp_path):
    write_tokenizer(ByteTokenizer(), tmp_path, max_length=64)
    assert isinstance(load_folder_tokenizer(tmp_path), ByteTokenizer)
    generic = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert (generic.vocab_size, generic.eos_id, generic.pad_id) == (258, 256, 257)
    assert generic.table == ByteTokenizer().table


def test_other_tokenizers_are_copied(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    data = byte_tokenizer_json()
    data["added_tokens"].append(data["added_tokens"][0] | {"id": 258, "content": "<more>"})
    source = tmp_path / "in" / "mine.json"
    source.write_text(json.dumps(data))
    (tmp_path / "in" / "tokenizer_config.json").write_text('{"eos_token": "<more>"}')
    tokenizer = load_tokenizer(str(source))
    write_tokenizer(tokenizer, tmp_path / "out", max_length=64)
    shutil.rmtree(tmp_path / "in")
    read = load_folder_tokenizer(tmp_path / "out")
    assert (read.eos_id, read.vocab_size) == (258, 259)


def test_no_tokenizer_and_a_damaged_one(tmp_path):
    assert load_folder_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json: is not JSON"):
        load_folder_tokenizer(tmp_path)
