"""A small corpus of mixed scripts, prepared with byte tokens, for the tests of this folder."""

import base64
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from kimi_jax.data.prepare import Plan, prepare
from kimi_jax.data.sources import Document, Piece
from kimi_jax.data.tokenizers import ByteTokenizer

SEQ_LEN = 16


def documents_of(texts: Iterable[str]) -> list[Document]:
    return [Document(f"{i}", (Piece(text, len(text.encode())),)) for i, text in enumerate(texts)]


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 0 to 60 characters, from ASCII to characters outside the basic plane."""
    rng = random.Random(seed)
    alphabet = "abcdefgh ,.\n\tÄéßЖ你好日本한😀"
    return ["".join(rng.choices(alphabet, k=rng.randrange(61))) for _ in range(count)]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return random_texts(120)


@pytest.fixture(scope="session")
def prepare_texts() -> Callable[..., Path]:
    """Prepares texts, by default with byte tokens; returns the folder."""

    def run(folder: Path, texts: Iterable[str], *, seq_len=SEQ_LEN, percent=20.0, tokenizer=None) -> Path:
        prepare(
            documents_of(texts), tokenizer or ByteTokenizer(), Plan(seq_len, percent), folder, source="random texts"
        )
        return folder

    return run


@pytest.fixture
def prepared(tmp_path, texts, prepare_texts) -> Path:
    """A folder with train/ and validation/ of `texts`."""
    return prepare_texts(tmp_path / "prepared", texts)


@pytest.fixture(scope="session")
def rank_file(tmp_path_factory) -> Path:
    """A small rank file in Kimi's format: all bytes, then merges that English, Han and Kana text uses."""
    merges = [
        "th",
        "the",
        " t",
        " the",
        "in",
        "ing",
        "an",
        "and",
        " a",
        " and",
        "  ",
        "12",
        "123",
        "'s",
        "你",
        "你好",
        "日",
    ]
    merges += ["日本", "の", "e\n"]
    tokens = {bytes([i]): None for i in range(256)}
    for merge in merges:  # with every prefix, so that the merge can be reached from bytes
        data = merge.encode()
        tokens |= {data[:n]: None for n in range(2, len(data) + 1)}
    path = tmp_path_factory.mktemp("tokenizer") / "tiktoken.model"
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    path.write_text("".join(lines), encoding="ascii")
    return path
