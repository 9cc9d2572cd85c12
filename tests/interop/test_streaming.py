"""A checkpoint of 2 GB goes through in the memory of its parameters and little more; the released layout, quickly."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from lively_models import KDA, MLA
from released import CONFIG

from kimi_jax.config.model import ModelConfig
from kimi_jax.data.json_files import write_json
from kimi_jax.interop.files import INDEX
from kimi_jax.interop.hf_config import from_public, to_public
from kimi_jax.interop.hf_export import plan_shards, shard_name, tensor_spec
from kimi_jax.interop.hf_import import open_checkpoint
from kimi_jax.interop.keymap import flatten, public_tensors
from kimi_jax.interop.load_plan import plan_load
from kimi_jax.interop.public_config import json_fields, read_public
from kimi_jax.interop.safetensors_file import NUMPY_DTYPES, header_bytes, write_file
from kimi_jax.models.decoder import abstract

pytestmark = pytest.mark.slow

WIDE = {"num_heads": 8, "key_dim": 128, "value_dim": 128}
WIDE |= {"decay": {"kind": "channel", "rank": 128}, "output_gate": {"kind": "sigmoid", "rank": 128}}
LARGE = ModelConfig(
    vocab_size=32_000,
    model_dim=1024,
    num_layers=12,
    pattern=("kda", "kda", "kda", "mla"),
    mixers={
        "kda": KDA | WIDE,
        "mla": MLA | {"num_heads": 8, "nope_dim": 128, "rope_dim": 64, "value_dim": 128, "latent_dim": 512},
    },
    ffn={"kind": "moe", "num_experts": 52, "top_k": 4, "hidden_dim": 512},
    first_k_dense=1,
    dense_hidden_dim=4096,
)


def write_index(folder, cfg, write):
    """Lays out a bfloat16 checkpoint in files of 500 MB; `write` makes one of them."""
    folder.mkdir()
    shards = plan_shards(public_tensors(cfg, flatten(*abstract(cfg)[1:])), "BF16", 500_000_000)
    weight_map = {}
    for index, shard in enumerate(shards):
        name, specs = shard_name(index, len(shards)), [tensor_spec(tensor, "BF16") for tensor in shard]
        write(folder / name, specs)
        weight_map |= {spec.name: name for spec in specs}
    write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("large") / "in", np.random.default_rng(0)

    def draw(path, specs):
        drawn = ((rng.random(spec.shape, np.float32) - 0.5).astype(NUMPY_DTYPES[spec.dtype]) for spec in specs)
        write_file(path, specs, drawn)

    write_index(folder, LARGE, draw)
    public = to_public(LARGE, dtype="bfloat16", max_length=None, eos=None, pad=None)
    write_json(folder / "config.json", json_fields(public))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_and_time(dtype, large, tmp_path):
    script, out = Path(__file__).with_name("streaming.py"), tmp_path / "out"
    command = [sys.executable, script, large, out, dtype]
    report = json.loads(
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}).stdout
    )
    size = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    largest = 2 * LARGE.vocab_size * LARGE.model_dim
    for step in ("import", "export"):
        print(f"{dtype}, {step} of {size / 1e9:.2f} GB: " + ", ".join(f"{k} {v:.4g}" for k, v in report[step].items()))
    print(f"parameters: {report['parameter_bytes'] / 1e9:.2f} GB")
    assert size > 2e9
    assert report["import"]["peak_bytes"] < report["parameter_bytes"] + 2 * largest + 50e6
    assert report["export"]["peak_bytes"] < 2 * largest + 50e6
    for file in large.glob("*.safetensors"):
        assert file.read_bytes() == (out / file.name).read_bytes(), file.name


def test_the_released_layout_from_headers_alone(tmp_path):
    def holes(path, specs):
        with path.open("wb") as stream:
            stream.write(header_bytes(specs))
            stream.truncate(stream.tell() + sum(spec.num_bytes for spec in specs))  # no block of it is allocated

    folder = tmp_path / "released"
    write_index(folder, from_public(read_public(CONFIG, source="config.json")), holes)
    write_json(folder / "config.json", CONFIG)
    start = time.perf_counter()
    checkpoint = open_checkpoint(folder)
    seconds = time.perf_counter() - start
    print(f"{len(checkpoint.tensors)} tensors in {seconds:.1f} s")
    assert len(checkpoint.stored) == 20_493
    assert seconds < 60  # measured: 1.7 s
    plans = {count: plan_load(checkpoint, count, 80e9, "bfloat16") for count in (1, 2, 8)}
    # 49,122,681,728 numbers of two bytes, and two more for each of the 20 (32 + 4096) + 26 * 256 float32 ones.
    assert plans[1].device_bytes == 2 * 49_122_681_728 + 2 * (20 * 4128 + 26 * 256)
    assert plans[1].cache_tokens < 0 < plans[2].cache_tokens < plans[8].cache_tokens
    for count, plan in plans.items():
        assert plan.device_bytes == pytest.approx(plans[1].device_bytes / count, rel=0.01)
