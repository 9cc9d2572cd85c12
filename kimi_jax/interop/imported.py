"""A public checkpoint as a directory of ours: weights that training starts from, beside all else its source held."""

import shutil
from pathlib import Path

import jax.numpy as jnp

from kimi_jax.config.yaml_files import to_yaml
from kimi_jax.data.records import new_folder
from kimi_jax.interop.files import CONFIG, GENERATION_CONFIG
from kimi_jax.interop.hf_export import refuse_existing, writing_to
from kimi_jax.interop.hf_import import open_checkpoint
from kimi_jax.interop.saved_model import PUBLIC, read_around
from kimi_jax.interop.tokenizer_files import write_tokenizer
from kimi_jax.train.checkpoint import CheckpointStore
from kimi_jax.train.initial import MODEL_YAML
from kimi_jax.train.run_dir import RunDir


def import_directory(public_dir: str | Path, out_dir: str | Path) -> Path:
    """Converts a public checkpoint; `train.init_from`, `load_model` and so every script take the result.

    It holds `model.yaml`, the model as a `base:` for experiment files; `checkpoints/0`, its weights in float32; and
    `public/`, config.json, generation_config.json and the tokenizer's files as they came.

    Args:
      public_dir: holds config.json and safetensors.
      out_dir: the new directory; it appears when everything is written.

    Returns:
      `out_dir`.

    Raises:
      UserError: `public_dir` is incomplete or damaged (each problem named), or `out_dir` exists.
    """
    source, out_dir = Path(public_dir), Path(out_dir)
    refuse_existing(out_dir)
    checkpoint = open_checkpoint(source)
    tokenizer = read_around(source, checkpoint.public)["tokenizer"]
    params, buffers = checkpoint.read()
    with writing_to(out_dir), new_folder(out_dir) as folder:
        (folder / PUBLIC).mkdir()
        for name in (CONFIG, GENERATION_CONFIG):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / PUBLIC / name)
        if tokenizer:
            write_tokenizer(tokenizer, folder / PUBLIC, max_length=checkpoint.public.model_max_length)
        model = {"model": checkpoint.cfg.model_dump(mode="json")}
        (folder / MODEL_YAML).write_text(to_yaml(model))
        with CheckpointStore(RunDir(folder).checkpoints, keep=1) as store:
            state = {"params": params, "buffers": buffers, "opt_state": {}, "step": jnp.int32(0)}
            store.save(0, state, {}, {"source": str(source)})
            store.wait()  # a signal from here on leaves the block with an error: it waits before the folder is removed
    return out_dir
