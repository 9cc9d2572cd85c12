"""Whether two checkpoints hold the same model: settings, names, shapes and numbers, one tensor in memory at a time."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kimi_jax.config.model import ModelConfig
from kimi_jax.data.json_files import read_json
from kimi_jax.errors import UserError
from kimi_jax.interop.files import CONFIG
from kimi_jax.interop.hf_config import from_public, to_public
from kimi_jax.interop.hf_import import find_tensors, summarize
from kimi_jax.interop.keymap import flatten, public_tensors
from kimi_jax.interop.public_config import json_fields, read_public
from kimi_jax.interop.safetensors_file import NUMPY_DTYPES, TensorSpec
from kimi_jax.interop.saved_model import load_model


class Comparison(NamedTuple):
    """What `compare_checkpoints` found."""

    differences: tuple[str, ...]
    """A line each; long lists are cut."""
    num_tensors: int
    """Of the names that both have."""
    num_equal: int
    """To the bit."""
    num_rounded: int
    """To the bit after rounding the wider dtype to the narrower."""

    @property
    def equal(self) -> bool:
        return not self.differences

    def report(self) -> str:
        """The differences and a summary, as lines."""
        rounded = f", {self.num_rounded} equal after rounding to the narrower dtype" if self.num_rounded else ""
        other = self.num_tensors - self.num_equal - self.num_rounded
        counts = f"{self.num_tensors} tensors in both: {self.num_equal} equal to the bit{rounded}, {other} different"
        return "\n".join([*self.differences, counts])


class _Source(NamedTuple):
    cfg: ModelConfig
    specs: Mapping[str, TensorSpec]
    read: Callable[[str], np.ndarray]


def compare_checkpoints(a: str | Path, b: str | Path) -> Comparison:
    """Compares two runs, imported or public directories, in any combination.

    Names of mixers and what only training reads are no difference, nor is the dtype: numbers of two dtypes are the
    same if rounding the wider ones gives the narrower.

    Raises:
      UserError: one is no checkpoint, is damaged, or has no public form.
    """
    first, second = _open(Path(a)), _open(Path(b))
    shared = [name for name in first.specs if name in second.specs]
    lines = [*_settings(first.cfg, second.cfg)]
    lines += summarize(f"only in {a}", (name for name in first.specs if name not in second.specs))
    lines += summarize(f"only in {b}", (name for name in second.specs if name not in first.specs))
    unequal, num_equal, num_rounded = [], 0, 0
    for name in shared:
        verdict = _compare(first, second, name)
        num_equal += verdict == EQUAL
        num_rounded += verdict == ROUNDED
        if verdict not in (EQUAL, ROUNDED):
            unequal.append(f"{name}: {verdict}")
    lines += summarize("different", unequal)
    return Comparison(tuple(lines), len(shared), num_equal, num_rounded)


EQUAL, ROUNDED = "equal", "rounded"


def _open(path: Path) -> _Source:
    config = path / CONFIG
    if config.is_file():
        cfg = from_public(read_public(read_json(config), source=str(config)))
        stored = find_tensors(path)
        wrong = [name for name, tensor in stored.items() if tensor.spec.dtype not in NUMPY_DTYPES]
        if wrong:
            raise UserError([f"{path}: {line}" for line in summarize("wrong dtype", wrong)])
        specs = {name: tensor.spec for name, tensor in stored.items()}
        return _Source(cfg, specs, lambda name: stored[name].read())
    model = load_model(path)
    _public_fields(model.cfg)
    leaves = flatten(model.params, model.buffers)
    tensors = {tensor.name: tensor for tensor in public_tensors(model.cfg, leaves)}
    specs = {name: TensorSpec(name, "F32", tensor.shape) for name, tensor in tensors.items()}

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        leaf = np.asarray(leaves[tensor.path])
        return tensor.read(leaf if tensor.repeat is None else leaf[tensor.repeat], NUMPY_DTYPES["F32"])

    return _Source(model.cfg, specs, read)


def _public_fields(cfg: ModelConfig) -> dict[str, Any]:
    return json_fields(to_public(cfg, dtype="float32", max_length=None, eos=None, pad=None))


def _settings(a: ModelConfig, b: ModelConfig) -> Iterator[str]:
    """Two configs of one function have one public form."""
    first, second = _public_fields(a), _public_fields(b)
    for key in first:
        if first[key] != second.get(key):
            yield f"config: {key}: {first[key]} and {second.get(key)}"


def _compare(first: _Source, second: _Source, name: str) -> str:
    shapes = [list(source.specs[name].shape) for source in (first, second)]
    if shapes[0] != shapes[1]:
        return f"shapes {shapes[0]} and {shapes[1]}"
    x, y = first.read(name), second.read(name)
    narrow = min((x.dtype, y.dtype), key=lambda dtype: dtype.itemsize)
    if x.astype(narrow, copy=False).tobytes() == y.astype(narrow, copy=False).tobytes():
        return EQUAL if x.dtype == y.dtype else ROUNDED
    x, y = x.astype(np.float32), y.astype(np.float32)
    return f"by up to {np.abs(x - y).max():.3g}, where numbers reach {np.abs(x).max():.3g}"
