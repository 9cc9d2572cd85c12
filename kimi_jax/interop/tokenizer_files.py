"""Which files carry a tokenizer in a public checkpoint, and how the byte tokenizer is said in them."""

import shutil
from pathlib import Path
from typing import Any

from kimi_jax.data.json_files import read_json, write_json
from kimi_jax.data.tokenizers import BYTES, ByteTokenizer, Tokenizer, load_tokenizer
from kimi_jax.interop.files import RANKS, TOKENIZER, TOKENIZER_CONFIG

BYTE_SPECIALS = {"<eos>": ByteTokenizer.eos_id, "<pad>": ByteTokenizer.pad_id}


def write_tokenizer(tokenizer: Tokenizer, folder: Path, *, max_length: int | None) -> None:
    """Writes the files from which transformers, vLLM and `load_folder_tokenizer` make the same tokenizer.

    Args:
      tokenizer: files of its own are copied; the byte tokenizer becomes a byte-level BPE without merges.
      folder: exists.
      max_length: longest sequence in tokens, for the byte tokenizer's settings; None: unknown.
    """
    if isinstance(tokenizer, ByteTokenizer):
        write_json(folder / TOKENIZER, byte_tokenizer_json())
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<pad>"}
        settings["clean_up_tokenization_spaces"] = False
        if max_length is not None:
            settings["model_max_length"] = max_length
        write_json(folder / TOKENIZER_CONFIG, settings)
        return
    main, *others = tokenizer.files
    shutil.copyfile(main, folder / (TOKENIZER if main.suffix == ".json" else RANKS))
    for file in others:
        shutil.copyfile(file, folder / file.name)


def load_folder_tokenizer(folder: Path) -> Tokenizer | None:
    """Opens the tokenizer of a public checkpoint; None if there is none.

    Raises:
      UserError: a damaged file, or one of a kind that is not supported.
    """
    for name in (TOKENIZER, RANKS):
        path = folder / name
        if path.is_file():
            # What `write_tokenizer` writes is recognised, so that reading it needs no tokenizer library.
            is_bytes = name == TOKENIZER and read_json(path) == byte_tokenizer_json()
            return load_tokenizer(BYTES if is_bytes else str(path))
    return None


def byte_tokenizer_json() -> dict[str, Any]:
    """The byte tokenizer as a `tokenizer.json`: byte-level BPE without merges, in which token i is byte i."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": name, **flags} for name, index in BYTE_SPECIALS.items()],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {character: byte for byte, character in enumerate(_byte_alphabet())},
            "merges": [],
        },
    }


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte: printable Latin-1 for itself, the others from U+0100 on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(shifted)) for byte in range(256)]
