"""What a checkpoint argument may be: a training run or a public checkpoint, both read into the same thing."""

from dataclasses import dataclass
from pathlib import Path

from kimi_jax.config.model import ModelConfig
from kimi_jax.data.pipeline import open_tokenizer
from kimi_jax.data.tokenizers import Tokenizer
from kimi_jax.errors import UserError
from kimi_jax.interop.files import CONFIG
from kimi_jax.interop.hf_import import import_model
from kimi_jax.interop.tokenizer_files import load_folder_tokenizer
from kimi_jax.models.decoder import abstract
from kimi_jax.train.checkpoint import CheckpointStore
from kimi_jax.train.run_dir import RunDir
from kimi_jax.types import Variables


@dataclass(frozen=True)
class SavedModel:
    """A model in memory.

    Attributes:
      params, buffers: nested dicts of float32 arrays, as `kimi_jax.models.decoder.init` returns them.
      tokenizer: None if the checkpoint has none.
      stop_ids: tokens that end a generated text.
      max_length: longest sequence in tokens that the model was trained on, or that its publisher names.
    """

    cfg: ModelConfig
    params: Variables
    buffers: Variables
    tokenizer: Tokenizer | None
    stop_ids: tuple[int, ...]
    max_length: int


def load_model(path: str | Path, *, step: int | None = None) -> SavedModel:
    """Reads a run directory or a public checkpoint.

    Args:
      path: a directory with a config.yaml (a run) or a config.json (a public checkpoint).
      step: of a run's checkpoint; None: the newest.

    Raises:
      UserError: neither of both, or one that is incomplete or damaged.
    """
    path = Path(path)
    if RunDir(path).config.is_file():
        return load_run(path, step)
    if not (path / CONFIG).is_file():
        kind = "is no directory" if not path.is_dir() else f"has neither config.yaml (a run) nor {CONFIG}"
        raise UserError(f"checkpoint {path}: {kind}")
    if step is not None:
        raise UserError(f"checkpoint {path}: has no steps to choose from; step={step} needs a run directory")
    return load_public(path)


def load_run(path: Path, step: int | None = None) -> SavedModel:
    """Reads a checkpoint of a run; arguments and errors as in `load_model`."""
    run = RunDir(path)
    cfg = run.load_config()
    if not run.checkpoints.is_dir():
        raise UserError(f"checkpoint {path}: the run has not written a checkpoint")
    tokenizer = open_tokenizer(run.tokenizer)
    _, params, buffers = abstract(cfg.model)
    with CheckpointStore(run.checkpoints) as store:
        steps = store.steps
        if not steps or step not in (None, *steps):
            asked = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            known = ", ".join(map(str, steps)) or "none"
            raise UserError(f"checkpoint {path}: {asked}; there: {known}")
        chosen = steps[-1] if step is None else step
        state = store.restore_model(chosen, {"params": params, "buffers": buffers})
    stop_ids = (tokenizer.eos_id,)
    return SavedModel(cfg.model, state["params"], state["buffers"], tokenizer, stop_ids, cfg.data.seq_len)


def load_public(path: Path) -> SavedModel:
    """Reads a public checkpoint; errors as in `load_model`."""
    model = import_model(path)
    tokenizer = load_folder_tokenizer(path)
    eos = model.public.eos_token_id
    stop_ids = (eos,) if isinstance(eos, int) else (eos or ())
    max_length = model.public.model_max_length or 0
    return SavedModel(model.cfg, model.params, model.buffers, tokenizer, stop_ids, max_length)
