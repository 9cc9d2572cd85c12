"""Muon over eight devices updates as on one, and moves no more than the matrices themselves."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.config import mesh as config
from kimi_jax.parallel.mesh import build_mesh
from kimi_jax.parallel.rules import state_shardings
from kimi_jax.train.muon import scale_by_muon
from kimi_jax.train.optimizer import matrix_of

AXES = {
    "query": ("layers", "embed", "heads", "head_dim"),
    "key": ("layers", "embed", "heads", "head_dim"),
    "output": ("layers", "heads", "head_dim", "embed"),
    "single": ("embed", "ffn"),
    "experts": ("layers", "experts", "embed", "ffn"),
}
SHAPES = {
    "query": (3, 32, 4, 8),
    "key": (3, 32, 4, 8),
    "output": (3, 4, 8, 32),
    "single": (32, 48),
    "experts": (3, 4, 32, 16),
}
TOLERANCE = 2e-5  # of the largest element, with products in float32; measured 2.8e-6
# Number of collectives and bytes of their results per device, with products in float16: norms, matrices on their way to
# the device that has them whole, and back.
MOST = {
    "fsdp=4,tensor=2": {"all-reduce": (3, 52), "all-to-all": (14, 32768)},
    "data=2,fsdp=2,expert=2": {"all-reduce": (1, 40), "all-to-all": (6, 14336), "all-gather": (3, 12288)},
    "expert=4,context=2": {"all-reduce": (1, 40), "all-to-all": (6, 14336), "all-gather": (3, 12288)},
    "data=8": {"all-gather": (2, 49152)},
}

multi_device = pytest.mark.multi_device


def _build(mesh, dtype):
    """The compiled update and its arguments, on the mesh."""
    leaves = {name: jax.random.normal(jax.random.key(i), SHAPES[name]) for i, name in enumerate(SHAPES)}
    matrices = {name: matrix_of(axes) for name, axes in AXES.items()}
    settings = {"momentum": 0.95, "update_rms": 0.2, "logical_axes": AXES, "dtype": dtype}
    muon = scale_by_muon(matrices, **settings)
    with jax.set_mesh(mesh):
        place = lambda tree: jax.device_put(tree, state_shardings(tree, AXES, mesh))
        state = place(muon.init(leaves))
        grads = place(jax.tree.map(lambda x: jnp.cos(3 * x), leaves))
        out = jax.tree.map(lambda x: x.sharding, (grads, state))
        return jax.jit(muon.update, out_shardings=out).lower(grads, state).compile(), (grads, state)


def _run(mesh):
    compiled, arguments = _build(mesh, jnp.float32)
    return jax.device_get(compiled(*arguments))


def _mesh(name: str):
    return build_mesh(config.Mesh(**dict(part.split("=") for part in name.split(","))))


@pytest.fixture(scope="module")
def one_device():
    return _run(build_mesh(config.Mesh(), jax.devices()[:1]))


@multi_device
@pytest.mark.parametrize("name", MOST)
def test_updates_equal_those_of_one_device(one_device, name):
    got, worst = _run(_mesh(name)), 0.0
    for one, many in zip(jax.tree.leaves(one_device), jax.tree.leaves(got), strict=True):
        worst = max(worst, np.abs(one - many).max() / np.abs(one).max())
    print(name, f"{worst:.1e}")
    assert worst < TOLERANCE


@multi_device
@pytest.mark.parametrize("name", MOST)
def test_only_the_matrices_travel(name):
    found = collectives(_build(_mesh(name), jnp.float16)[0].as_text())
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
