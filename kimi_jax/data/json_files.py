"""How files of JSON are read and written: of tokenizers, of tools, and beside the weights of public checkpoints."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kimi_jax.errors import UserError

NAMES = {dict: "an object", list: "a list"}
MAX_JSON_BYTES = 100_000_000  # the released index has 2 MB, the largest tokenizers 40 MB


def write_json(path: Path, data: Any) -> None:
    """Writes indented UTF-8."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object in which no key is given twice.

    Raises:
      UserError: no such file, or it holds something else.
    """
    return _read(path, parse_object)


def read_json_list(path: Path) -> list[Any]:
    """Reads a JSON list; otherwise as `read_json`."""
    return _read(path, functools.partial(_parse, kind=list))


def _read[Value](path: Path, parse: Callable[[bytes], Value]) -> Value:
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise UserError(f"{path}: has {size} bytes; a file of settings has at most {MAX_JSON_BYTES}")
        return parse(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: is not JSON: {' '.join(str(error).split())}") from None


def parse_object(data: bytes) -> dict[str, Any]:
    """Parses a JSON object.

    Raises:
      ValueError: not UTF-8, not JSON, not an object, nested too deeply, or a key is given twice.
    """
    return _parse(data, kind=dict)


def _parse[Value](data: bytes, *, kind: type[Value]) -> Value:
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, kind):
        raise ValueError(f"it is a {type(value).__name__} at top level, must be {NAMES[kind]}")
    return value


def _unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} is given twice")
    return data
