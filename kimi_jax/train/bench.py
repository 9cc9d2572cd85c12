"""Times whole training steps on random tokens, as the configuration says, with nothing left out.

`python -m kimi_jax.train.bench` reads a request (JSON) from standard input and writes a measurement (JSON).
"""

import collections
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kimi_jax.config.train import RunConfig
from kimi_jax.errors import exit_on_user_error
from kimi_jax.parallel.mesh import build_mesh, check_run
from kimi_jax.parallel.rules import batch_sharding
from kimi_jax.train.profile import kernel_table, part_table, profile_steps
from kimi_jax.train.programs import compile_step
from kimi_jax.train.state import Recipe, State
from kimi_jax.train.step import Batch, build_train_step
from kimi_jax.train.xla_flags import apply

BATCHES = 4  # different ones, taken in turn
AHEAD = 2  # steps queued while one runs, as in the training loop
FIRST_TOKEN = 3  # below it stand the public models' special tokens


@dataclasses.dataclass(frozen=True)
class Request:
    """What to measure.

    Args:
      config: a `RunConfig` as JSON; its data is not touched, but its sequence length counts.
      steps: timed steps.
      warmup: steps before them.
      profiled: steps after them under the profiler; 0: none.
      document: tokens per document, packed into the rows; 0: every row is one document, as PyTorch's peers have it.
    """

    config: dict
    steps: int = 20
    warmup: int = 3
    profiled: int = 0
    document: int = 0


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What one configuration takes; the same fields for every framework."""

    device: str
    tokens: int
    """Per step, over all devices."""
    step_ms: list[float]
    """Each from the end of the step before to its own, compilation excluded."""
    compile_s: float
    losses: list[float]
    """Of every step in nats, warmup included."""
    peak_bytes: int | None
    """Most bytes that arrays and temporaries took at once on a device, as the allocator counted."""
    profile: str = ""
    """Tables of the kernels, Markdown."""
    devices: int = 1


def measure(request: Request) -> Measurement:
    """Compiles the training step of a configuration and takes steps on random tokens, over all devices.

    Raises:
      UserError: the configuration does not fit the devices.
    """
    cfg = RunConfig.model_validate(request.config)
    mesh = build_mesh(cfg.mesh)
    check_run(mesh, cfg)
    with jax.set_mesh(mesh):
        return _measure(request, Recipe(cfg), mesh)


def _measure(request: Request, recipe: Recipe, mesh: Mesh) -> Measurement:
    cfg, device = recipe.cfg, jax.devices()[0]
    rows, length = cfg.train.batch_size, cfg.data.seq_len
    sizes = (rows, length, cfg.model.vocab_size, request.document)
    batches = [jax.device_put(random_batch(seed, *sizes), batch_sharding(mesh)) for seed in range(BATCHES)]
    start = time.perf_counter()
    init, step = lower_step(recipe, mesh, batches[0])
    compiled = compile_step(step, mesh)
    compile_s = time.perf_counter() - start
    stepper = _Stepper(compiled, init.compile()(jax.random.key(cfg.train.seed)), batches)
    step_ms, losses = stepper.take(request.warmup + request.steps)  # in one queue, which is full when timing starts
    peak_bytes = (device.memory_stats() or {}).get("peak_bytes_in_use")
    profile = ""
    if request.profiled:
        found = profile_steps(lambda: stepper.take(request.profiled), request.profiled, compiled.as_text())
        profile = f"{part_table(found)}\n\n{kernel_table(found, 120)}"
    timed_ms = step_ms[request.warmup :]
    return Measurement(
        device.device_kind, rows * length, timed_ms, compile_s, losses, peak_bytes, profile, devices=mesh.size
    )


def lower_step(recipe: Recipe, mesh: Mesh, batch: Batch) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
    """The programs key -> state, and (state, batch) -> (state, metrics), for the mesh, which is in use."""
    state = recipe.abstract_state(mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(build_train_step(recipe), donate_argnums=0, out_shardings=(shardings, None))
    init = jax.jit(recipe.init_state, out_shardings=shardings)
    return init.lower(jax.random.key(0)), step.lower(state, batch)


def random_batch(seed: int, rows: int, length: int, vocab: int, document: int = 0) -> Batch:
    """A batch of uniformly random tokens on the device, all scored; for `document` see `Request`."""
    tokens = jax.random.randint(jax.random.key(seed), (rows, length + 1), min(FIRST_TOKEN, vocab - 1), vocab)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "loss_mask": jnp.ones((rows, length), bool)}
    if not document:
        return batch
    first = seed * document // BATCHES  # so that documents do not start at the same places in every batch
    number = 1 + (first + jnp.arange(length, dtype=jnp.int32)) // document
    return batch | {"segment_ids": jnp.broadcast_to(number[None], (rows, length))}


class _Stepper:
    """Takes steps the way the training loop does: the next ones are queued while one runs."""

    def __init__(self, compiled: jax.stages.Compiled, state: State, batches: list[Batch]):
        self.compiled, self.state, self.batches = compiled, state, itertools.cycle(batches)

    def take(self, steps: int) -> tuple[list[float], list[float]]:
        """Takes steps; returns the milliseconds and the loss of each."""
        ends, losses = [time.perf_counter()], []
        for metrics in self._queued(steps):
            losses.append(float(metrics["loss_nats"]))
            ends.append(time.perf_counter())
        return [(end - start) * 1e3 for start, end in itertools.pairwise(ends)], losses

    def _queued(self, steps: int) -> Iterator[dict[str, jax.Array]]:
        waiting: collections.deque[dict[str, jax.Array]] = collections.deque()
        for _ in range(steps):
            self.state, metrics = self.compiled(self.state, next(self.batches))
            waiting.append(metrics)
            if len(waiting) > AHEAD:
                yield waiting.popleft()
        yield from waiting


if __name__ == "__main__":
    with exit_on_user_error():
        asked = Request(**json.load(sys.stdin))
        apply(RunConfig.model_validate(asked.config).train.flags)
        print(json.dumps(dataclasses.asdict(measure(asked))))
