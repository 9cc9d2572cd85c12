"""Hugging Face `tokenizer.json` files, as far as each token stands for definite bytes."""

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kimi_jax.data.json_files import read_json
from kimi_jax.data.tokenizers import Tokenizer, import_extra, with_siblings
from kimi_jax.errors import UserError

# Names of the end-of-document token, for a tokenizer.json without the tokenizer_config.json that would say it.
EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "[EOS]", "<|im_end|>")
PAD_NAMES = ("<|pad|>", "<pad>", "[PAD]")
SIBLINGS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
WORD_START = "▁"  # how Metaspace writes a space
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


class HfTokenizer(Tokenizer):
    """A byte-level or Metaspace tokenizer of the `tokenizers` library.

    The end token is the `eos_token` of a `tokenizer_config.json` beside the file, or, where that names none, the first
    of `EOS_NAMES` that the vocabulary has. Normalisation, if the file asks for it, is part of encoding; truncation and
    padding are off.

    Args:
      path: `tokenizer.json`.

    Raises:
      UserError: a damaged file, no end token, tokens without definite bytes, or the extra `hf` is not installed.
    """

    kind = "hf"

    def __init__(self, path: Path):
        tokenizers = import_extra("tokenizers", f"tokenizer {path}")
        config = path.with_name("tokenizer_config.json")
        self.files = with_siblings(path, SIBLINGS)
        try:
            self._engine = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"tokenizer {path}: not a tokenizer.json ({error})") from error
        stated = _read_settings(config) if config.is_file() else {}
        self._engine.no_truncation()
        self._engine.no_padding()
        self._parts = json.loads(self._engine.to_str())
        self._byte_level = _is_byte_level(self._parts, path)
        vocabulary = self._engine.get_vocab(with_added_tokens=True)
        added = self._engine.get_added_tokens_decoder()
        self.specials = {token.content: index for index, token in added.items() if token.special}
        self.vocab_size = max(vocabulary.values()) + 1
        ends = (stated["eos_token"],) if "eos_token" in stated else EOS_NAMES
        eos = next((vocabulary[name] for name in ends if name in vocabulary), None)
        if eos is None:
            raise UserError(
                f"tokenizer {path}: no end token; put a tokenizer_config.json with eos_token beside it "
                f"(the vocabulary has none of {', '.join(ends)})"
            )
        self.eos_id = eos
        pads = (stated.get("pad_token"), *PAD_NAMES)
        self.pad_id = next((vocabulary[name] for name in pads if name in vocabulary), eos)

    def encode(self, text: str, *, specials: bool = False) -> np.ndarray:
        self._engine.encode_special_tokens = not specials
        return np.array(self._engine.encode(text, add_special_tokens=False).ids, np.int32)

    @functools.cached_property
    def table(self) -> tuple[bytes, ...]:
        table = [b""] * self.vocab_size
        for token, index in self._engine.get_vocab(with_added_tokens=False).items():
            table[index] = _bytes_of(token, self._byte_level)
        for index, added in self._engine.get_added_tokens_decoder().items():
            table[index] = b"" if added.special else added.content.encode()
        return tuple(table)


def _read_settings(path: Path) -> dict[str, str]:
    """Reads which tokens a tokenizer_config.json names; null is no name."""
    settings, stated = read_json(path), {}
    for field in ("eos_token", "pad_token"):
        name = settings.get(field)
        name = name.get("content") if isinstance(name, dict) else name
        if not isinstance(name, str | None):
            raise UserError(f"{path}: {field}: got {name!r}, must be the name of a token")
        if name is not None:
            stated[field] = name
    return stated


def _is_byte_level(parts: dict, path: Path) -> bool:
    """Decides between byte-level tokens and Metaspace tokens."""
    kinds = set(_kinds(parts.get("decoder"))) | set(_kinds(parts.get("pre_tokenizer")))
    if "ByteLevel" in kinds:
        return True
    if kinds & {"Metaspace", "ByteFallback"}:
        return False
    used = ", ".join(sorted(kinds)) or "none"
    raise UserError(
        f"tokenizer {path}: needs ByteLevel or Metaspace, so that tokens stand for definite bytes; it has {used}"
    )


def _kinds(part: dict | None) -> Iterator[str]:
    if part:
        yield part["type"]
        for inner in (*part.get("decoders", ()), *part.get("pretokenizers", ())):
            yield from _kinds(inner)


def _bytes_of(token: str, byte_level: bool) -> bytes:
    if byte_level:
        alphabet = _byte_of_character()
        return b"".join(alphabet[c] if c in alphabet else c.encode() for c in token)
    if match := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace(WORD_START, " ").encode()


@functools.cache
def _byte_of_character() -> dict[str, bytes]:
    """GPT-2's alphabet: printable bytes of Latin-1 stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(0x100 + i): bytes([byte]) for i, byte in enumerate(others)}
    return {chr(byte): bytes([byte]) for byte in printable} | shifted
