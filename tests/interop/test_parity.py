"""Logits of exported models in transformers, an implementation that shares nothing with ours.

Needs another Python with torch and transformers >= 5.17, named by KIMI_JAX_REFERENCE_PYTHON: see docs/interop.md.
"""

import os
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from lively_models import SPECS, draw_model

from kimi_jax.interop.hf_export import export_model
from kimi_jax.models.decoder import abstract, merge

REFERENCE_PYTHON = os.environ.get("KIMI_JAX_REFERENCE_PYTHON")
TOLERANCE = 1e-4  # largest difference, float32, logits of standard deviation 1.4 to 1.7
# measured on CPU: odd_tail 5.3e-5, stacked 1.8e-5, all_kda_dense 1.2e-5, all_mla 8.1e-6

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not REFERENCE_PYTHON, reason="KIMI_JAX_REFERENCE_PYTHON names no Python with transformers"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every model, exported, with 70 tokens per row (more than one chunk) and the logits of transformers."""
    root = tmp_path_factory.mktemp("parity")
    rng = np.random.default_rng(0)
    folders = {name: export_model(draw_model(name), root / name, shard_bytes=40_000) for name in SPECS}
    for folder in folders.values():
        np.save(folder / "tokens.npy", rng.integers(0, 256, (2, 70), np.int32))
    script = Path(__file__).with_name("reference_logits.py")
    subprocess.run([REFERENCE_PYTHON, script, *folders.values()], check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    return folders


@pytest.mark.parametrize("name", SPECS)
def test_logits_are_those_of_transformers(name, folders):
    model = draw_model(name)
    graphdef = abstract(model.cfg)[0]

    @jax.jit
    def run(params, buffers, tokens_BT):
        decoder = merge(graphdef, params, buffers)
        return decoder.logits(decoder(tokens_BT)[0])

    ours = run(model.params, model.buffers, np.load(folders[name] / "tokens.npy"))
    theirs = np.load(folders[name] / "reference_logits.npy")
    assert theirs.std() > 1
    error = np.abs(ours - theirs).max()
    print(f"{name}: largest difference {error:.1e}")
    assert error <= TOLERANCE
