"""What a benchmark of a run is: tasks of lm-evaluation-harness on the model that trains, as it is."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from kimi_jax.config.evaluation import LmEval
from kimi_jax.config.model import ModelConfig
from kimi_jax.data.tokenizers import Tokenizer
from kimi_jax.generate.evaluate import check_harness, find_tasks, read_figures, rehearse, run_tasks
from kimi_jax.generate.weights import cast_matrices
from kimi_jax.interop.saved_model import SavedModel
from kimi_jax.types import PyTree, Variables

NO_MESH = Mesh(np.empty((), object), ())


class Benchmark:
    """Tasks whose documents are read once, and rehearsed once: all requests are made, and none is run.

    Args:
      cfg: which tasks, and how much of them.
      model: of the run.
      tokenizer: of the run's data.

    Raises:
      UserError: no harness, an unknown task, documents that cannot be had, or a task that asks for what cannot be done.
    """

    def __init__(self, cfg: LmEval, model: ModelConfig, tokenizer: Tokenizer):
        check_harness()
        self._model, self._tokenizer, self._batch_size = model, tokenizer, cfg.batch_size
        self._tasks = find_tasks(cfg.tasks, cfg.include and Path(cfg.include))
        self._settings = {"limit": cfg.limit, "num_fewshot": cfg.num_fewshot}
        rehearse(*self._tasks, model, tokenizer, **self._settings)

    def __call__(self, params: Variables, buffers: Variables, arrived: Callable[[], None]) -> dict[str, float]:
        """Runs the tasks; each process does so with all of the model on its first device.

        Args:
          params, buffers: in any sharding; all processes of a run call.
          arrived: called now and then while the tasks run.

        Returns:
          The harness's figures, called TASK_METRIC.
        """
        from kimi_jax.generate.lm_eval_adapter import HarnessModel

        params = cast_matrices(params, self._model.dtype)  # before all of it is brought to one place
        params, buffers = _on_first_device((params, buffers))
        stop_ids = (self._tokenizer.eos_id,)
        model = SavedModel(self._model, params, buffers, self._tokenizer, stop_ids, max_length=None)
        with jax.set_mesh(NO_MESH):
            answering = HarnessModel(model, batch_size=self._batch_size, arrived=arrived)
            results = run_tasks(answering, *self._tasks, bootstrap_iters=0, **self._settings)
        return {f"{figure.task}_{figure.metric}": figure.value for figure in read_figures(results)}


_whole = jax.jit(lambda x: x, out_shardings=PartitionSpec())  # on every device of the mesh in use


def _on_first_device(arrays: PyTree) -> PyTree:
    """Copies arrays to the first device of each process, one by one: the other devices hold one of them at a time."""
    return jax.tree.map(lambda x: _whole(x).addressable_data(0), arrays)
