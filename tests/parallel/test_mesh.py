"""Eight simulated devices compute what one computes; bad sizes are one line."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from kimi_jax.config import mesh as config
from kimi_jax.config.load import load
from kimi_jax.config.train import RunConfig
from kimi_jax.errors import UserError
from kimi_jax.models import decoder
from kimi_jax.parallel.mesh import AXES, abstract_mesh, build_mesh, check_run
from kimi_jax.parallel.rules import batch_sharding, sharding_table, spec
from kimi_jax.train.loop import train
from kimi_jax.train.run_dir import RunDir
from kimi_jax.train.state import Recipe
from kimi_jax.train.step import build_gradients

ALONE = [{"data": 1} | {axis: 8} for axis in AXES]
PAIRS = [{"data": 1} | {one: 2, two: 4} for one, two in itertools.combinations(AXES, 2)]
TOLERANCE = 1e-5  # of a gradient's largest element; measured 2.5e-6
LOSS_TOLERANCE = 1e-6  # relative; measured 1.2e-7
B, T = 8, 512  # context=8 gives each device one chunk
HEADS, GATE = "num_heads: 8, key_dim: 8, value_dim: 8", "output_gate: {kind: sigmoid, rank: 8}"
EVERY_LAYER = [  # KDA, Gated DeltaNet, Mamba2 and MLA, a dense block and experts
    "model.num_layers=4",
    "model.pattern=[kda, gdn, mamba2, mla]",
    *(f"model.mixers.{kind}={{kind: {kind}, {HEADS}, {GATE}}}" for kind in ("kda", "gdn", "mamba2")),
    "model.mixers.mla={kind: mla, num_heads: 8, nope_dim: 8, rope_dim: 8, value_dim: 8, latent_dim: 16}",
    "model.ffn={kind: moe, num_experts: 8, top_k: 2, hidden_dim: 16, balance_loss: 1.0e-3, capacity: 8}",
    f"train.batch_size={B}",
    f"data.seq_len={T}",
]

multi_device = pytest.mark.multi_device
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def debug() -> RunConfig:
    return load(
        "experiments/sizes/debug.yaml", ["model.num_layers=4", "train.batch_size=8", "data.seq_len=32"], RunConfig
    )


def _batch(mesh) -> dict:
    random = np.random.default_rng(0)
    tokens = random.integers(0, 256, (B, T + 1), dtype=np.int32)
    segments = np.cumsum(random.random((B, T)) < 0.1, axis=1, dtype=np.int32) + 1
    mask = np.ones((B, T), bool)
    mask[:, -1] = False
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segments, "loss_mask": mask}
    return {name: jax.device_put(x, batch_sharding(mesh)) for name, x in batch.items()}


def _gradients(cfg: RunConfig, mesh):
    recipe = Recipe(cfg)
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda x: x.sharding, recipe.abstract_state(mesh))
        state = jax.jit(recipe.init_state, out_shardings=shardings)(jax.random.key(1))
        out = shardings["params"], None
        grads, sums = jax.jit(build_gradients(recipe), out_shardings=out)(
            state["params"], state["buffers"], _batch(mesh)
        )
        return jax.device_get(grads), jax.device_get(sums), state["params"]


@pytest.fixture(scope="module")
def every_layer() -> RunConfig:
    return load("experiments/sizes/debug.yaml", EVERY_LAYER, RunConfig)


@pytest.fixture(scope="module")
def one_device(every_layer):
    return _gradients(every_layer, build_mesh(config.Mesh(), jax.devices()[:1]))


@multi_device
@pytest.mark.parametrize("sizes", [*ALONE, *PAIRS], ids=str)
def test_gradients_equal_those_of_one_device(every_layer, one_device, sizes):
    mesh = build_mesh(config.Mesh(**sizes))
    check_run(mesh, every_layer)
    grads, sums, params = _gradients(every_layer, mesh)
    want_grads, want_sums, _ = one_device
    assert float(sums.loss) == pytest.approx(float(want_sums.loss), rel=LOSS_TOLERANCE)
    np.testing.assert_array_equal(sums.load, want_sums.load)
    assert sums.dropped == 0
    worst = 0.0
    for path, want in flatten_dict(want_grads).items():
        got = flatten_dict(grads)[path]
        worst = max(worst, np.abs(got - want).max() / np.abs(want).max())
    print(f"{sizes}: {worst:.1e}")
    assert worst < TOLERANCE
    held = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(params))
    whole = sum(leaf.size for leaf in jax.tree.leaves(params))
    parts = sizes.get("fsdp", 1) * sizes.get("expert", 1) * sizes.get("tensor", 1)
    assert held < 1.9 * whole / parts, "parameters are cut, but for gates, norms and convolutions"


@multi_device
def test_a_run_goes_on_over_another_mesh(debug, tmp_path):
    """Four steps over eight devices, four more over 2 x 2 x 2: the losses of eight steps over eight."""
    train_ = {**debug.train.model_dump(), "checkpoints": {"every": 4}, "log_every": 1, "validation": {"every": 100}}

    def run(folder, steps, **mesh) -> list[float]:
        values = debug.model_dump() | {"train": train_ | {"steps": steps}, "mesh": mesh}
        values["optim"] = {"kind": "adamw", "peak_lr": 1e-3, "schedule": {"kind": "constant"}}
        train(RunConfig.model_validate(values), tmp_path / folder)
        lines = RunDir(tmp_path / folder).metrics.read_text().splitlines()
        return [float(line.partition('"loss_nats": ')[2].partition(",")[0]) for line in lines]

    whole = run("whole", 8)
    run("parts", 4)
    parts = run("parts", 8, data=2, fsdp=2, tensor=2)
    assert len(parts) == len(whole) == 8 and parts[:4] == whole[:4]
    np.testing.assert_allclose(parts, whole, rtol=1e-5)  # measured 2e-7
    log = RunDir(tmp_path / "parts").log.read_text()
    assert log.count("MiB per device") == 2, "each start says how the parameters are cut"


# ------------------------------------------------------------------ without devices
def test_sizes_that_do_not_fit_are_named():
    devices = jax.devices()[:1]
    with pytest.raises(UserError, match="mesh: fsdp=2 need 2 devices, but there are 1"):
        build_mesh(config.Mesh(fsdp=2), devices)
    with pytest.raises(UserError, match="mesh: data=3, context=2 need 6 devices, but there are 8"):
        abstract_mesh(config.Mesh(data=3, context=2), 8)


BAD = {  # overrides, mesh, number of devices, what is said
    "batch": (
        ["train.batch_size=12", "train.grad_accum=2"],
        {"fsdp": 2, "expert": 2},
        8,
        r"train.batch_size=12: 6 rows of a microbatch \(grad_accum=2\) do not divide over 8 parts of the mesh "
        r"\(data=2, fsdp=2, expert=2\)",
    ),
    "sequence": (["data.seq_len=192"], {"context": 2}, 2, "data.seq_len=192: .*context=2 x 64 tokens of a chunk: 128"),
    "heads": ([], {"tensor": 4}, 4, "model.mixers.kda.num_heads=2: not a multiple of mesh.tensor=4"),
    "experts": ([], {"expert": 8}, 8, "model.ffn.num_experts=4: not a multiple of mesh.expert=8"),
    "rows_measured": (
        ["train.evaluations={other: {batch_size: 6}}"],
        {},
        8,
        "train.evaluations.other.batch_size=6: does not divide over 8 parts",
    ),
    "tokens_measured": (
        ["data.seq_len=256", "train.evaluations={longer: {seq_len: 320}}"],
        {"context": 2},
        2,
        "train.evaluations.longer.seq_len=320: not a multiple of 128",
    ),
    "no_experts": (["model.ffn={kind: dense, hidden_dim: 64}"], {"expert": 2}, 2, "mesh.expert=2: .* no experts"),
}


@pytest.mark.parametrize("overrides, sizes, devices, message", BAD.values(), ids=BAD)
def test_what_does_not_divide_is_named(overrides, sizes, devices, message):
    cfg = load("experiments/sizes/debug.yaml", ["train.batch_size=8", *overrides], RunConfig)
    with pytest.raises(UserError, match=message):
        check_run(abstract_mesh(config.Mesh(**sizes), devices), cfg)


def test_what_divides_passes(debug):
    check_run(abstract_mesh(config.Mesh(data=2, expert=4, tensor=2), 16), debug)


def test_an_array_is_cut_where_it_divides():
    mesh = abstract_mesh(config.Mesh(data=2, fsdp=4, tensor=2), 16)
    assert spec(("vocab", "embed"), (264, 32), mesh) == jax.P("tensor", "fsdp")
    assert spec(("vocab", "embed"), (263, 30), mesh) == jax.P(None, None)
    assert spec(("batch", "tokens", None), (8, 3, 3), mesh) == jax.P(("data", "fsdp"), None, None)
    assert spec(("batch", None, None), (6, 3, 3), mesh) == jax.P("data", None, None)
    assert spec(("layers", "rank", "conv"), (8, 8, 8), mesh) == jax.P(None, None, None)
    experts = abstract_mesh(config.Mesh(data=1, fsdp=2, expert=4), 8)
    names = ("layers", "experts", "embed", "ffn")
    assert spec(names, (6, 8, 16, 16), experts) == jax.P(None, ("expert", "fsdp"), None, None)
    assert spec(names, (6, 4, 16, 16), experts) == jax.P(None, "expert", "fsdp", None)
    assert spec(("embed", "heads"), (16, 4), experts) == jax.P(("fsdp", "expert"), None)


def test_the_table_adds_up(debug):
    mesh = build_mesh(config.Mesh(), jax.devices()[:1])
    params = decoder.abstract(debug.model)[1]
    lines = sharding_table(params, decoder.logical_axes(debug.model), mesh).splitlines()
    leaves = jax.tree.leaves(params)
    assert len(lines) == len(leaves) + 2
    total = sum(leaf.size for leaf in leaves) * jnp.float32.dtype.itemsize
    assert float(lines[-1].split()[-1]) == pytest.approx(total / 2**20, abs=0.005)
    assert "(embed, heads, head_dim)" in "\n".join(lines)
