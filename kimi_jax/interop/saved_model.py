"""What a checkpoint argument may be: a run, an imported or a public checkpoint; all read into the same thing."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kimi_jax.config.model import ModelConfig
from kimi_jax.data.json_files import read_json
from kimi_jax.data.pipeline import open_tokenizer
from kimi_jax.data.tokenizers import Tokenizer
from kimi_jax.errors import UserError
from kimi_jax.interop.files import CONFIG, GENERATION_CONFIG
from kimi_jax.interop.hf_config import from_public
from kimi_jax.interop.hf_import import MemoryDtype, open_checkpoint
from kimi_jax.interop.public_config import PublicConfig, read_public
from kimi_jax.interop.tokenizer_files import load_folder_tokenizer
from kimi_jax.models.decoder import abstract
from kimi_jax.train.checkpoint import CheckpointStore
from kimi_jax.train.run_dir import RunDir
from kimi_jax.types import Variables

PUBLIC = "public"  # folder of an imported directory: what its source held besides weights


@dataclass(frozen=True)
class SavedModel:
    """A model in memory.

    Attributes:
      params, buffers: nested dicts of arrays, as `kimi_jax.models.decoder.init` returns them: float32, unless a public
        checkpoint was read in another dtype.
      tokenizer: None if the checkpoint has none.
      stop_ids: tokens that end a generated text.
      max_length: longest sequence in tokens that the model was trained on, or that its publisher names; None: unknown.
      bos_id, pad_id: what a public checkpoint names so.
      generation: its generation_config.json.
    """

    cfg: ModelConfig
    params: Variables
    buffers: Variables
    tokenizer: Tokenizer | None
    stop_ids: tuple[int, ...]
    max_length: int | None
    bos_id: int | None = None
    pad_id: int | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)


def find_model(
    path: str | Path, *, step: int | None = None, dtype: MemoryDtype = "float32"
) -> Callable[[], SavedModel]:
    """Looks what kind of checkpoint there is; what reads it takes no arguments. Arguments as in `load_model`.

    Raises:
      UserError: there is none.
    """
    path = Path(path)
    if RunDir(path).config.is_file():
        return functools.partial(load_run, path, step)
    if (path / PUBLIC / CONFIG).is_file():
        return functools.partial(load_imported, path, step)
    if not (path / CONFIG).is_file():
        kind = "is no directory" if not path.is_dir() else f"has neither config.yaml (a run) nor {CONFIG}"
        raise UserError(f"checkpoint {path}: {kind}")
    if step is not None:
        raise UserError(f"checkpoint {path}: has no steps to choose from; step={step} needs a run directory")
    return functools.partial(load_public, path, dtype=dtype)


def load_model(path: str | Path, *, step: int | None = None, dtype: MemoryDtype = "float32") -> SavedModel:
    """Reads a run directory, an imported directory or a public checkpoint.

    Args:
      path: a directory with a config.yaml (a run), a public/config.json (imported) or a config.json (public).
      step: of a run's checkpoint; None: the newest.
      dtype: of a public checkpoint's parameters in memory, as in `PublicCheckpoint.read`; the others give float32.

    Raises:
      UserError: none of these, or one that is incomplete or damaged.
    """
    return find_model(path, step=step, dtype=dtype)()


def load_run(path: Path, step: int | None = None) -> SavedModel:
    """Reads a checkpoint of a run; arguments and errors as in `load_model`."""
    run = RunDir(path)
    cfg = run.load_config()
    if not run.checkpoints.is_dir():
        raise UserError(f"checkpoint {path}: the run has not written a checkpoint")
    tokenizer = open_tokenizer(run.tokenizer) if run.tokenizer.is_dir() else None  # a synthetic task has none
    variables = _restore(path, cfg.model, step)
    stop_ids = (tokenizer.eos_id,) if tokenizer else ()
    return SavedModel(cfg.model, **variables, tokenizer=tokenizer, stop_ids=stop_ids, max_length=cfg.data.seq_len)


def load_imported(path: Path, step: int | None = None) -> SavedModel:
    """Reads what `imported.import_directory` made; arguments and errors as in `load_model`."""
    config = path / PUBLIC / CONFIG
    public = read_public(read_json(config), source=str(config))
    cfg = from_public(public)
    return SavedModel(cfg, **_restore(path, cfg, step), **read_around(path / PUBLIC, public))


def load_public(path: Path, *, dtype: MemoryDtype = "float32") -> SavedModel:
    """Reads a public checkpoint onto the first device; arguments and errors as in `load_model`."""
    checkpoint = open_checkpoint(path)
    around = read_around(path, checkpoint.public)  # before the weights, so that a damaged tokenizer is found at once
    params, buffers = checkpoint.read(dtype=dtype)
    return SavedModel(checkpoint.cfg, params, buffers, **around)


def _restore(path: Path, cfg: ModelConfig, step: int | None) -> dict[str, Any]:
    _, params, buffers = abstract(cfg)
    with CheckpointStore(RunDir(path).checkpoints) as store:
        steps = store.steps
        if not steps or step not in (None, *steps):
            asked = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            known = ", ".join(map(str, steps)) or "none"
            raise UserError(f"checkpoint {path}: {asked}; there: {known}")
        return store.restore_model(steps[-1] if step is None else step, {"params": params, "buffers": buffers})


def read_around(folder: Path, public: PublicConfig) -> dict[str, Any]:
    """Reads what a public checkpoint holds besides weights, as fields of `SavedModel`.

    Raises:
      UserError: a damaged generation_config.json or tokenizer, or end tokens outside the vocabulary.
    """
    path = folder / GENERATION_CONFIG
    generation = read_json(path) if path.is_file() else {}
    eos = generation.get("eos_token_id", public.eos_token_id)
    stop_ids = tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,)
    if not all(type(token) is int and 0 <= token < public.vocab_size for token in stop_ids):
        raise UserError(f"{path}: eos_token_id: got {eos!r}, must be ids below vocab_size={public.vocab_size}")
    return {
        "tokenizer": load_folder_tokenizer(folder),
        "stop_ids": stop_ids,
        "max_length": public.model_max_length,
        "bos_id": public.bos_token_id,
        "pad_id": public.pad_token_id,
        "generation": generation,
    }
