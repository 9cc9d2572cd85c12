"""Muon over eight devices updates as on one, and moves no more than the matrices themselves."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.config import mesh as config
from kimi_jax.config.optim import Muon
from kimi_jax.parallel.mesh import build_mesh
from kimi_jax.parallel.rules import state_shardings
from kimi_jax.train.optimizer import assign, build_optimizer

AXES = {
    "query": ("layers", "embed", "heads", "head_dim"),
    "key": ("layers", "embed", "heads", "head_dim"),
    "output": ("layers", "heads", "head_dim", "embed"),
    "single": ("embed", "ffn"),
    "experts": ("layers", "experts", "embed", "ffn"),
    "norm": ("embed",),
}
SHAPES = {
    "query": (3, 32, 4, 8),
    "key": (3, 32, 4, 8),
    "output": (3, 4, 8, 32),
    "single": (32, 48),
    "experts": (3, 4, 32, 16),
    "norm": (32,),
}
TOLERANCE = 1e-2  # of the largest element; measured 4.7e-3: a norm is summed in another order, products are float16
# Number of collectives and bytes of their results per device: norms, matrices on their way to the device that has them
# whole, and back.
MOST = {
    "fsdp=4,tensor=2": {"all-reduce": (2, 88), "all-to-all": (16, 36864)},
    "data=2,fsdp=2,expert=2": {"all-reduce": (2, 64), "all-to-all": (8, 18432), "all-gather": (4, 18432)},
    "expert=4,context=2": {"all-reduce": (1, 40), "all-to-all": (6, 14336), "all-gather": (4, 18432)},
    "data=8": {"all-gather": (3, 73728)},
}

multi_device = pytest.mark.multi_device


def _build(mesh):
    """The compiled update, its arguments, and all on the mesh."""
    leaves = {name: jax.random.normal(jax.random.key(i), SHAPES[name]) for i, name in enumerate(SHAPES)}
    cfg = Muon(kind="muon", peak_lr=1e-3, schedule={"kind": "constant"})
    optimizer = build_optimizer(cfg, assign(cfg, leaves, AXES))
    with jax.set_mesh(mesh):
        place = lambda tree: jax.device_put(tree, state_shardings(tree, AXES, mesh))
        params, state = place(leaves), place(optimizer.init(leaves))
        grads = place(jax.tree.map(lambda x: jnp.cos(3 * x), leaves))
        out = jax.tree.map(lambda x: x.sharding, (params, state))
        update = jax.jit(optimizer.update, out_shardings=out)
        return update.lower(grads, state, params).compile(), (grads, state, params)


def _run(mesh):
    compiled, arguments = _build(mesh)
    return jax.device_get(compiled(*arguments)), compiled.as_text()


@pytest.fixture(scope="module")
def one_device():
    return _run(build_mesh(config.Mesh(), jax.devices()[:1]))[0]


@multi_device
@pytest.mark.parametrize("name", MOST)
def test_updates_equal_those_of_one_device(one_device, name):
    sizes = dict(part.split("=") for part in name.split(","))
    got, text = _run(build_mesh(config.Mesh(**sizes)))
    worst = 0.0
    for one, many in zip(jax.tree.leaves(one_device), jax.tree.leaves(got), strict=True):
        worst = max(worst, np.abs(one - many).max() / max(np.abs(one).max(), 1))
    found = collectives(text)
    print(name, f"{worst:.1e}", found)
    assert worst < TOLERANCE
    assert set(found) <= set(MOST[name])
    assert all(np.less_equal(found[kind], MOST[name][kind]).all() for kind in found), found


COLLECTIVE = re.compile(r"= (?P<results>.*?) (?P<kind>all-reduce|all-gather|all-to-all|reduce-scatter)(-start)?\(")
ARRAY = re.compile(r"(f32|f16|s32)\[([\d,]*)\]")
BYTES = {"f32": 4, "f16": 2, "s32": 4}


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """How many of each kind a compiled program has, and the bytes of their results."""
    found: dict[str, tuple[int, int]] = {}
    for match in COLLECTIVE.finditer(text):
        arrays = ARRAY.findall(match["results"])
        size = sum(BYTES[dtype] * int(np.prod([int(n) for n in shape.split(",") if n])) for dtype, shape in arrays)
        number, total = found.get(match["kind"], (0, 0))
        found[match["kind"]] = number + 1, total + size
    return found
