"""The training loop: the only place that owns a while-loop, and the order in which a step's results are settled."""

import collections
import contextlib
import functools
import math
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from kimi_jax.config.train import RunConfig, SkipNonFinite
from kimi_jax.data.pipeline import BATCH_DTYPES, Batch, Dataset, build_dataset, save_tokenizer
from kimi_jax.errors import UserError
from kimi_jax.models.counts import count_flops
from kimi_jax.parallel.feed import Share, StopVote, place, share_of_batch
from kimi_jax.parallel.mesh import build_mesh, check_run
from kimi_jax.parallel.processes import is_main, on_main
from kimi_jax.parallel.rules import batch_sharding, sharding_table
from kimi_jax.train.checkpoint import CheckpointStore
from kimi_jax.train.devices import model_flops_utilization
from kimi_jax.train.display import Display, Silence
from kimi_jax.train.evaluation import (
    Evaluator,
    OpenBenchmark,
    RunBenchmark,
    fetch,
    is_due,
    mean_metrics,
    open_benchmarks,
    open_measurements,
)
from kimi_jax.train.initial import load_initial
from kimi_jax.train.meter import Meter
from kimi_jax.train.metrics import Sink, open_sinks, read_metrics
from kimi_jax.train.optimizer import assignment_table
from kimi_jax.train.plot import plot_loss
from kimi_jax.train.programs import compile_step
from kimi_jax.train.run_dir import Resume, RunDir, claim, record_start
from kimi_jax.train.signals import StopRequest, catch_stop_signals, exit_code
from kimi_jax.train.state import Recipe, State
from kimi_jax.train.step import build_train_step
from kimi_jax.train.watchdog import Watchdog

LAG_STEPS = 2  # steps the host may run ahead: the device always has the next one queued
STOP = "stop_signal"  # beside a step's metrics where several processes train


@dataclass(frozen=True)
class Result:
    """How a call of `train` ended."""

    run_dir: RunDir
    step: int
    finished: bool
    exit_code: int
    """0, or 128 + the number of the signal that stopped the run."""
    num_params: int
    last: dict[str, Any]
    """The last line of metrics.jsonl; empty if there is none."""
    compile_s: float | None
    """Seconds of compilation of the training step; None if the run was finished before."""


def train(
    cfg: RunConfig, run_dir: str | Path, resume: Resume = "auto", *, open_benchmark: OpenBenchmark | None = None
) -> Result:
    """Trains until `cfg.train.steps`, from the newest checkpoint in the run directory if there is one.

    Args:
      cfg: the run.
      run_dir: made if need be.
      resume: "auto" goes on if there is a checkpoint, "must" insists on one, "never" refuses a directory with a run.
      open_benchmark: what runs evaluations of kind lm_eval: `kimi_jax.generate.benchmark.Benchmark`.

    Returns:
      Where it ended: all steps done, or stopped by a signal after writing a checkpoint.

    Raises:
      UserError: the directory, the data or a checkpoint does not fit the config, or the loss stopped being finite.
    """
    with contextlib.ExitStack() as stack:
        paths, changes = stack.enter_context(claim(Path(run_dir), cfg, resume))
        store = stack.enter_context(CheckpointStore(paths.checkpoints, keep=cfg.train.checkpoints.keep))
        step = on_main(lambda: store.latest_step) or 0
        recipe = Recipe(cfg)
        if step >= cfg.train.steps:
            return _already_finished(recipe, paths, step)
        mesh = build_mesh(cfg.mesh)
        check_run(mesh, cfg)
        stack.enter_context(jax.set_mesh(mesh))
        share = share_of_batch(batch_sharding(mesh), (cfg.train.batch_size, cfg.data.seq_len))
        data = _open_data(cfg, share)
        benchmarks = open_benchmarks(cfg, data, open_benchmark)
        display = stack.enter_context(Display(paths.log, steps=cfg.train.steps) if is_main() else Silence())
        watchdog = stack.enter_context(Watchdog(cfg.train.watchdog, paths.path, jax.process_index()))
        loop = _Loop(recipe, mesh, data, benchmarks, store, paths, display, watchdog)
        stack.callback(loop.iterator.close)
        loop.set_state(step)  # a checkpoint that cannot be used is found before anything is written
        if is_main():
            _announce(display, recipe, paths, record_start(paths, cfg), step, changes)
            save_tokenizer(data, paths.tokenizer)  # so that the model can be used where the data is not
        if mesh.size > 1:
            display.print(sharding_table(loop.abstract_state["params"], recipe.logical_axes, mesh))
        sinks = open_sinks(cfg, paths, last_step=step) if is_main() else ()
        for sink in sinks:
            stack.callback(sink.close)
        stop = stack.enter_context(catch_stop_signals())
        compile_s = loop.compile()
        loop.run(stop, sinks)
        finished = loop.finish()
        return Result(
            run_dir=paths,
            step=loop.step,
            finished=finished,
            exit_code=0 if finished else exit_code(loop.stopped_by),
            num_params=_num_params(recipe),
            last=_last_record(paths),
            compile_s=compile_s,
        )


class _Loop:
    """One process's part of a run: `set_state`, `compile`, `run`, `finish`, in this order."""

    def __init__(
        self,
        recipe: Recipe,
        mesh: Mesh,
        data: Dataset,
        benchmarks: Mapping[str, RunBenchmark],
        store: CheckpointStore,
        paths: RunDir,
        display: Display | Silence,
        watchdog: Watchdog,
    ):
        self.recipe, self.cfg, self.data, self.store = recipe, recipe.cfg.train, data, store
        self.abstract_state, self.batch_sharding = recipe.abstract_state(mesh), batch_sharding(mesh)
        self.shardings, self.mesh = jax.tree.map(lambda x: x.sharding, self.abstract_state), mesh
        self.paths, self.display, self.watchdog = paths, display, watchdog
        self.sinks: Sequence[Sink] = ()
        self.iterator = data.train_iterator()
        self.measurements, self.benchmarks = open_measurements(recipe.cfg, data), benchmarks
        self.pending: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
        self.vote = StopVote(mesh) if jax.process_count() > 1 else None
        self.stopped_by: signal.Signals | None = None
        self.meter = Meter()
        self.skipped_in_a_row = self.total_tokens = 0

    # -------------------------------------------------------------- start
    def set_state(self, step: int) -> None:
        """Makes the first state, or restores that of `step` and the data position from its checkpoint."""
        self.step = self.saved_step = step
        if not step:
            self.state: State = self._first_state()
            return
        restored = self.store.restore(step, self.abstract_state)
        self.state, self.total_tokens = restored.state, restored.metadata["total_tokens"]
        self.iterator.set_state(restored.position)
        self.data.check_same(restored.metadata.get("data", {}))

    def _first_state(self) -> State:
        if self.cfg.init_from is None:
            return jax.jit(self.recipe.init_state, out_shardings=self.shardings)(jax.random.key(self.cfg.seed))
        float32 = lambda x: jax.ShapeDtypeStruct(x.shape, np.float32, sharding=x.sharding)
        target = {name: jax.tree.map(float32, self.abstract_state[name]) for name in ("params", "buffers")}
        weights = load_initial(Path(self.cfg.init_from), self.recipe.cfg.model, target)
        self.display.print(f"weights from {self.cfg.init_from}", *weights.notes)
        around = jax.jit(self.recipe.state_around, donate_argnums=(0, 1), out_shardings=self.shardings)
        return around(**weights.variables)

    def compile(self) -> float:
        """Compiles the training step; returns the seconds it took."""
        start = time.perf_counter()
        rows, seq_len = self.cfg.batch_size, self.recipe.cfg.data.seq_len
        batch = {
            name: jax.ShapeDtypeStruct((rows, seq_len), dtype, sharding=self.batch_sharding)
            for name, dtype in BATCH_DTYPES.items()
        }
        step = jax.jit(build_train_step(self.recipe), donate_argnums=0, out_shardings=(self.shardings, None))
        try:
            lowered = step.lower(self.abstract_state, batch)
        except NotImplementedError as error:  # an operator's implementation that the config names cannot run here
            raise UserError(f"config: {error}") from error
        self.train_step = compile_step(lowered, self.mesh)
        self.evaluator = Evaluator(self.recipe, self.measurements, self._place)
        seconds = time.perf_counter() - start
        memory = self.train_step.memory_analysis()
        peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes if memory else 0
        self.display.print(f"compiled the training step in {seconds:.1f} s; it needs {peak / 2**20:,.0f} MiB")
        return seconds

    def _place(self, batch: Batch) -> dict[str, jax.Array]:
        """Sends this process's rows of a batch to its devices."""
        share = Share(self.data.process_index, self.data.process_count)
        return {name: place(rows, share, self.batch_sharding) for name, rows in batch.items()}

    # -------------------------------------------------------------- steps
    def run(self, stop: StopRequest, sinks: Sequence[Sink]) -> None:
        """Takes steps until all are done or a signal comes; leaves a checkpoint of the last one."""
        self.sinks = sinks
        self.display.start_steps(self.step)
        while self.step < self.cfg.steps and not self._stopping(stop):
            self.state, metrics = self.train_step(self.state, self._place(next(self.iterator)))
            self.step += 1
            if self.vote:
                metrics |= {STOP: self.vote(stop.signal or 0)}
            self.pending.append((self.step, metrics))
            last = self.step == self.cfg.steps
            if last or self.step % self.cfg.validation.every == 0:
                self._settle(keep=1)
                self._settle(keep=0, validate=True)
            if last or self.step % self.cfg.checkpoints.every == 0:
                self._checkpoint()
            self._settle(keep=LAG_STEPS)
        if self.step > self.saved_step:
            self._checkpoint()

    def _stopping(self, stop: StopRequest) -> bool:
        """Whether to end here; several processes go by what all of them have read from the same step."""
        if not self.vote:
            self.stopped_by = stop.signal
        return self.stopped_by is not None

    def _settle(self, *, keep: int, validate: bool = False) -> None:
        """Fetches, checks and reports finished steps, oldest first, until `keep` are pending."""
        while len(self.pending) > keep:
            step, on_device = self.pending.popleft()
            numbers = {name: x.item() for name, x in jax.device_get(on_device).items()}
            self.watchdog.feed(step)
            if number := numbers.pop(STOP, 0):
                self.stopped_by = signal.Signals(number)
            record = {"step": step, "loss_nats": numbers.pop("loss_nats"), **numbers}
            self._check_finite(record)
            self.meter.add(record["tokens"])
            self.total_tokens += record["tokens"]
            record["total_tokens"] = self.total_tokens
            self._report(record, self._validate(step) if validate else {})

    def _check_finite(self, record: dict[str, Any]) -> None:
        bad = [f"{name} is {record[name]}" for name in ("loss_nats", "grad_norm") if not math.isfinite(record[name])]
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if bad else 0
        if not bad:
            return
        rule, what = self.cfg.non_finite, f"step {record['step']}: {' and '.join(bad)}"
        if not isinstance(rule, SkipNonFinite):
            hint = "train.non_finite.kind=skip passes over such steps"
            raise UserError(f"{what}; {self._last_good()}; {hint}")
        if self.skipped_in_a_row > rule.max_consecutive:
            limit = f"more in a row than train.non_finite.max_consecutive={rule.max_consecutive}"
            raise UserError(f"{what}; {limit}; {self._last_good()}")
        self.display.print(f"{what}; step skipped")

    def _last_good(self) -> str:
        self.store.wait()
        step = self.store.latest_step
        return f"last good checkpoint: {self.store.path(step)}" if step else "no checkpoint was written before"

    def _report(self, record: dict[str, Any], measured: Mapping[str, float]) -> None:
        step = record["step"]
        logged = measured or step in (1, self.cfg.steps) or step % self.cfg.log_every == 0
        if logged:
            record |= measured
            record |= self.meter.lap()
            record |= self._utilization(record.get("tokens_per_s"))
            for sink in self.sinks:
                sink.write(record)
        self.display.show_step(record, logged=bool(logged))

    def _utilization(self, tokens_per_s: float | None) -> dict[str, float]:
        """Counted FLOPs of the scored tokens over the devices' peak; empty where the peak is unknown."""
        flops = count_flops(self.recipe.cfg.model, self.recipe.cfg.data.seq_len).total / jax.device_count()
        share = tokens_per_s and model_flops_utilization(tokens_per_s, flops, jax.devices()[0].device_kind)
        return {"mfu": share} if share else {}

    def _validate(self, step: int) -> dict[str, float]:
        with self.meter.paused():
            last, number = step == self.cfg.steps, step // self.cfg.validation.every
            model, arrived = (self.state["params"], self.state["buffers"]), lambda: self.watchdog.feed(step)
            metrics = mean_metrics(fetch(self.evaluator.start(*model, number, last=last), arrived))
            for name, benchmark in self.benchmarks.items():
                if is_due(self.cfg.evaluations[name], number, last=last):
                    metrics |= {f"{name}_{key}": value for key, value in benchmark(*model, arrived).items()}
            return metrics

    def _checkpoint(self) -> None:
        """Starts a checkpoint of the current step, all of whose metrics are known to be finite or skipped."""
        self._settle(keep=0)
        with self.meter.paused():
            config = self.recipe.cfg.model_dump(mode="json")
            metadata = {"total_tokens": self.total_tokens, "config": config, "data": self.data.identity}
            self.store.save(self.step, self.state, self.iterator.get_state(), metadata)
            self.saved_step = self.step
            if is_main():
                self._plot()

    def _plot(self) -> None:
        plot_loss(read_metrics(self.paths.metrics), self.paths.loss_plot, title=self.paths.path.absolute().name)

    # -------------------------------------------------------------- end
    def finish(self) -> bool:
        """Waits for the checkpoint and says how it ended; returns whether all steps are done."""
        self.store.wait()
        finished = self.step == self.cfg.steps
        if finished:
            rate = f", {self.meter.tokens_per_s:,.0f} tokens/s" if self.meter.tokens_per_s else ""
            self.display.print(f"finished {self.step} steps, {self.total_tokens:,} tokens{rate}")
        else:
            saved = f"its checkpoint is {self.store.path(self.step)}" if self.step else "nothing to save"
            again = "the same command goes on from there"
            self.display.print(f"{self.stopped_by.name}: stopped after step {self.step}; {saved}; {again}")
        return finished


def _open_data(cfg: RunConfig, share: Share) -> Dataset:
    """Opens this process's rows; process 0 comes first, as it may have to prepare them."""
    sizes = {"batch_size": cfg.train.batch_size, "process_index": share.index, "process_count": share.count}
    build = functools.cache(lambda: build_dataset(cfg.data, **sizes))
    identity = on_main(lambda: build().identity)
    data = build()
    data.check_same(identity)
    data.check_vocabulary(cfg.model.vocab_size, f"the {cfg.data.kind} data")
    return data


def _announce(
    display: Display, recipe: Recipe, paths: RunDir, environment: dict[str, Any], step: int, changes: list[str]
) -> None:
    git = environment["git"]
    source = f"{git['revision'][:10]}{' with changes' if git['dirty'] else ''}" if git else "unknown"
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    where = f"goes on from step {step}" if step else "starts"
    display.print(
        f"{paths.path}: {where}, {recipe.cfg.train.steps} steps, {_num_params(recipe):,} parameters, {devices}, "
        f"jax {environment['packages']['jax']}, source {source}"
    )
    display.print(*(f"changed since the last time: {change}" for change in changes))
    if not step:
        display.print(assignment_table(recipe.assignments, recipe.cfg.optim.weight_decay))


def _already_finished(recipe: Recipe, paths: RunDir, step: int) -> Result:
    if is_main():
        print(f"{paths.path}: finished, {step} steps taken, train.steps={recipe.cfg.train.steps}; nothing to do")
    return Result(
        run_dir=paths,
        step=step,
        finished=True,
        exit_code=0,
        num_params=_num_params(recipe),
        last=_last_record(paths),
        compile_s=None,
    )


def _num_params(recipe: Recipe) -> int:
    return sum(math.prod(assignment.shape) for assignment in recipe.assignments.values())


def _last_record(paths: RunDir) -> dict[str, Any]:
    return next(reversed(read_metrics(paths.metrics)), {})
