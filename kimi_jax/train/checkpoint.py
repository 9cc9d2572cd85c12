"""Checkpoints: what they hold, how they are written while training goes on, and what a reader may find wrong."""

import contextlib
import logging
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from kimi_jax.errors import UserError
from kimi_jax.parallel.processes import on_main
from kimi_jax.types import PyTree

MODEL, OPTIMIZER, POSITION, METADATA = "model", "optimizer", "data", "metadata"
TOTAL_TOKENS = "total_tokens"  # the entry of the metadata that a run needs to go on
OPTIMIZER_KEYS = ("opt_state", "step")
SHOWN = 8  # differences named before "and n more"


@dataclass(frozen=True)
class Restored:
    """A checkpoint in memory."""

    state: dict[str, Any]
    position: dict[str, Any]
    metadata: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run; a context manager that waits for the write in progress when it closes.

    A checkpoint is a folder named by its step with four items: `model` (params and buffers), `optimizer` (opt_state and
    step), `data` (position of the data iterator) and `metadata`, the last two JSON. It is written under a temporary
    name and renamed when whole, so what carries a step's name is complete.

    Args:
      directory: made if need be.
      keep: the newest so many stay; None: nothing is made, written or removed, as a run may be writing there.

    Raises:
      UserError: the directory cannot be written.
    """

    def __init__(self, directory: Path, *, keep: int | None = None):
        self.directory = directory.absolute()
        if keep is None:
            options = ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
        else:
            options = ocp.CheckpointManagerOptions(max_to_keep=keep)
            on_main(self._make_ready)
        handlers = {name: ocp.StandardCheckpointHandler() for name in (MODEL, OPTIMIZER)}
        handlers |= {name: ocp.JsonCheckpointHandler() for name in (POSITION, METADATA)}
        self._writable = keep is not None
        for logger in ("absl", "asyncio"):
            logging.getLogger(logger).addFilter(_is_not_orbaxs)
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def _make_ready(self) -> None:
        with self._writing():
            self.directory.mkdir(parents=True, exist_ok=True)
            # What a killed process left. Orbax would do it in a thread that outlives a start which fails at once.
            for folder in self.directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                shutil.rmtree(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error and jax.process_count() > 1:  # the other processes may not come to end the write in progress
            return
        with contextlib.suppress(Exception) if error else self._writing():  # the first error is the one to report
            self._manager.close()

    @property
    def steps(self) -> list[int]:
        """The complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    @property
    def latest_step(self) -> int | None:
        """The newest complete checkpoint."""
        return self._manager.latest_step()

    def path(self, step: int) -> Path:
        return self.directory / str(step)

    def save(
        self, step: int, state: Mapping[str, Any], position: Mapping[str, Any], metadata: Mapping[str, Any]
    ) -> None:
        """Starts to write a checkpoint; returns when the state may be donated again, before the files are whole.

        Raises:
          UserError: the write before this one failed, for instance on a full disk.
        """
        if not self._writable:
            raise ValueError(f"CheckpointStore {self.directory}: opened for reading (keep=None)")
        items = {
            MODEL: ocp.args.StandardSave(_model_part(state)),
            OPTIMIZER: ocp.args.StandardSave(_optimizer_part(state)),
            POSITION: ocp.args.JsonSave(position),
            METADATA: ocp.args.JsonSave(metadata),
        }
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items))

    def wait(self) -> None:
        """Returns when the write in progress is whole; raises if it failed."""
        with self._writing():
            self._manager.wait_until_finished()

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        # tensorstore reports a full disk as ValueError
        message = lambda error: f"checkpoints {self.directory}: cannot be written: {_first_line(error)}"
        return _as_user_error(message, OSError, ValueError)

    def restore(self, step: int, target: Mapping[str, Any]) -> Restored:
        """Reads a whole checkpoint.

        Args:
          step: one that exists.
          target: the state as shapes and dtypes, with shardings if it should not lie on the first device.

        Raises:
          UserError: it is damaged, or holds another model or optimizer; the differing parameters are named.
        """
        model, optimizer = _placed(_model_part(target)), _placed(_optimizer_part(target))
        self._check(step, MODEL, model)
        self._check(step, OPTIMIZER, optimizer)
        items = {
            MODEL: ocp.args.StandardRestore(model),
            OPTIMIZER: ocp.args.StandardRestore(optimizer),
            POSITION: ocp.args.JsonRestore(),
            METADATA: ocp.args.JsonRestore(),
        }
        read = self._read(step, lambda: self._manager.restore(step, args=ocp.args.Composite(**items)))
        metadata = read[METADATA]
        if not isinstance(metadata.get(TOTAL_TOKENS), int):
            what = f"damaged: its {METADATA} has no {TOTAL_TOKENS}"
            raise UserError(f"checkpoint {self.path(step)}: {what}{self._way_out(step)}")
        return Restored({**read[MODEL], **read[OPTIMIZER]}, read[POSITION], metadata)

    def restore_model(self, step: int, target: Mapping[str, Any]) -> dict[str, Any]:
        """Reads {"params", "buffers"} alone, in the dtypes of `target`, however `train.parameters` had them saved.

        Arguments and errors as in `restore`.
        """
        model = _placed(_model_part(target))
        saved = self._in_saved_dtypes(step, model)
        self._check(step, MODEL, saved)
        arguments = ocp.args.Composite(**{MODEL: ocp.args.StandardRestore(saved)})
        read = self._read(step, lambda: self._manager.restore(step, args=arguments))[MODEL]
        return jax.tree.map(lambda x, like: x if x.dtype == like.dtype else x.astype(like.dtype), read, model)

    def _in_saved_dtypes(self, step: int, target: PyTree) -> PyTree:
        """The target with the floating-point dtypes of the checkpoint."""
        metadata = self._read(step, lambda: self._manager.item_metadata(step)[MODEL])
        saved = {} if metadata is None else dict(jax.tree_util.tree_leaves_with_path(metadata.tree))

        def adopt(path, leaf):
            dtype = saved[path].dtype if path in saved else leaf.dtype
            both_float = jnp.issubdtype(dtype, jnp.floating) and jnp.issubdtype(leaf.dtype, jnp.floating)
            return leaf.update(dtype=dtype) if both_float else leaf

        return jax.tree_util.tree_map_with_path(adopt, target)

    def _check(self, step: int, item: str, target: PyTree) -> None:
        metadata = self._read(step, lambda: self._manager.item_metadata(step)[item])
        if metadata is None:
            raise UserError(f"checkpoint {self.path(step)}: damaged: it has no {item}{self._way_out(step)}")
        found = list(_differences(_shapes(metadata.tree), _shapes(target)))
        if found:
            more = [f"  and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
            first = f"checkpoint {self.path(step)}: its {item} is not the one this config describes:"
            raise UserError([first, *(f"  {line}" for line in found[:SHOWN]), *more])

    def _read[T](self, step: int, read: Callable[[], T]) -> T:
        # orbax and tensorstore report damage as errors of many types
        message = lambda error: f"checkpoint {self.path(step)}: damaged: {_first_line(error)}{self._way_out(step)}"
        with _as_user_error(message, Exception):
            return read()

    def _way_out(self, step: int) -> str:
        older = [other for other in self._manager.all_steps() if other < step]
        return f"; remove that folder to go on from step {max(older)}" if older else ""


def _model_part(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in state.items() if name not in OPTIMIZER_KEYS}


def _optimizer_part(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: state[name] for name in OPTIMIZER_KEYS}


def _placed(target: PyTree) -> PyTree:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or here)
    return jax.tree.map(place, target)


def _shapes(tree: PyTree) -> dict[str, str]:
    """Path -> "float32 [3, 4]"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{np.dtype(x.dtype).name} {list(x.shape)}"
        for path, x in leaves
    }


def _differences(saved: Mapping[str, str], wanted: Mapping[str, str]) -> Iterator[str]:
    for path in sorted(saved.keys() | wanted.keys()):
        there, here = saved.get(path), wanted.get(path)
        if there is None:
            yield f"{path}: {here} here, missing there"
        elif here is None:
            yield f"{path}: {there} there, unknown here"
        elif there != here:
            yield f"{path}: {there} there, {here} here"


@contextlib.contextmanager
def _as_user_error(message: Callable[[Exception], str], *kinds: type[Exception]) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(message(error)) from error


def _is_not_orbaxs(record: logging.LogRecord) -> bool:
    """Drops what orbax says: a warning for every reader, and stacks of errors that `UserError` tells in a line.

    Of reads under way when another one fails asyncio says only what tensorstore said.
    """
    text = f"{record.pathname} {record.getMessage()}"
    return not any(name in text for name in ("orbax", "tensorstore"))


def _first_line(error: Exception) -> str:
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return textwrap.shorten(line, 240, placeholder=" ...")
