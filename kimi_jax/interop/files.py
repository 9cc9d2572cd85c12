"""The files of a public checkpoint: their names, and how JSON is read and written."""

import json
from pathlib import Path
from typing import Any

from kimi_jax.errors import UserError

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TOKENIZER, TOKENIZER_CONFIG, RANKS = "tokenizer.json", "tokenizer_config.json", "tiktoken.model"


def write_json(path: Path, data: Any) -> None:
    """Writes indented UTF-8."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      UserError: no such file, or it holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: is {type(data).__name__} at top level, must be an object")
    return data
