"""Trains several small runs as one program: a scan over steps of a vmap over the runs, and when it may end early."""

import collections
import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped
from rich.console import Console

from kimi_jax.config.evaluation import LmEval
from kimi_jax.config.sweep import Until
from kimi_jax.config.train import RunConfig
from kimi_jax.data.pipeline import Batch
from kimi_jax.errors import UserError
from kimi_jax.parallel.mesh import mesh_shape
from kimi_jax.train.checkpoint import CheckpointStore
from kimi_jax.train.evaluation import VALIDATION, Evaluator, Sums, fetch, mean_metrics, open_measurements
from kimi_jax.train.members import Feed, Member
from kimi_jax.train.meter import Meter
from kimi_jax.train.metrics import open_sinks
from kimi_jax.train.run_dir import claim, config_differences, naming, record_start
from kimi_jax.train.signals import StopRequest, catch_stop_signals
from kimi_jax.train.state import Recipe, State
from kimi_jax.train.step import build_train_step
from kimi_jax.train.watchdog import Watchdog
from kimi_jax.types import Variables

MEMBER_KEYS = ("optim.peak_lr", "train.seed", "data.shuffle_seed")  # what members of a group may differ in
BLOCK_STEPS = 64  # at most so many steps are one call of the device

type Validation = Sequence[Mapping[str, float]]
"""Validation metrics of each member."""


@dataclass(frozen=True)
class Ending:
    """How a call of `train_together` ended."""

    step: int
    finished: bool
    exit_code: int
    """0, or 128 + the number of the signal that stopped it."""


def train_together(configs: Sequence[RunConfig], run_dirs: Sequence[Path], until: Until | None = None) -> Ending:
    """Trains runs that differ in learning rate and seeds alone as one program, until all steps are done.

    Each run directory holds what `train` leaves there, checkpoints included, so a member may go on alone. The group
    goes on from the newest checkpoint that all its members have.

    Args:
      configs: one per member.
      run_dirs: their directories, made if need be.
      until: ends the group before its last step once it holds for one member; each directory then says so.

    Raises:
      UserError: the members do not fit together; a directory, the data or a checkpoint does not fit its config; or a
        member's loss stopped being finite, which is told once the others are done.
    """
    _check_alike(configs)
    with contextlib.ExitStack() as stack:
        everyone = [_open_member(stack, cfg, path) for cfg, path in zip(configs, run_dirs, strict=True)]
        members = _in_step(everyone)
        feed = Feed(members)
        stack.callback(feed.close)
        watchdog = stack.enter_context(Watchdog(configs[0].train.watchdog, members[0].paths.path, 0))
        group = _Group(members, feed, watchdog)
        group.restore()
        for member in members:
            record_start(member.paths, member.cfg)
            member.sinks = open_sinks(member.cfg, member.paths, last_step=group.step)
            for sink in member.sinks:
                stack.callback(sink.close)
        feed.save_tokenizers(members)
        stop = stack.enter_context(catch_stop_signals())
        group.compile()
        group.run(stop, until)
        group.finish(stop)
        if failures := [member.failure for member in everyone if member.failure]:
            raise UserError(failures)
        return Ending(group.step, group.finished, 0 if group.finished else stop.exit_code)


def _check_alike(configs: Sequence[RunConfig]) -> None:
    first = configs[0]
    for cfg in configs[1:]:
        for key, one, other in config_differences(first, cfg):
            if key not in MEMBER_KEYS:
                rule = f"only {', '.join(MEMBER_KEYS)} may differ"
                raise UserError(f"runs trained together: {key} is {one} in one and {other} in another; {rule}")
    if first.train.init_from is not None:
        raise UserError(f"runs trained together: train.init_from={first.train.init_from} is not supported")
    if asked := first.train.evaluations_of(LmEval):
        raise UserError(f"runs trained together: train.evaluations.{next(iter(asked))}.kind=lm_eval is not supported")
    if jax.device_count() > 1:
        raise UserError(f"runs trained together: they need one device, this process sees {jax.device_count()}")
    mesh_shape(first.mesh, 1)


def _open_member(stack: contextlib.ExitStack, cfg: RunConfig, path: Path) -> Member:
    paths, _ = stack.enter_context(claim(path, cfg, "auto"))
    keep = max(cfg.train.checkpoints.keep, 2)  # a kill between two members' writes leaves them at different steps
    return Member(cfg, paths, stack.enter_context(CheckpointStore(paths.checkpoints, keep=keep)))


def _in_step(members: Sequence[Member]) -> list[Member]:
    """Those that can go on from one step: all, but for those that failed long before the others were stopped.

    The latter get a `failure` that says so; they go on when the others are done.
    """
    steps = [set(member.store.steps) for member in members]
    ahead = max(steps, key=lambda own: max(own, default=0))
    # One checkpoint alone: the group was killed while its members wrote their first ones.
    if set.intersection(*steps) or len(ahead) < 2:
        return list(members)
    for member, own in zip(members, steps, strict=True):
        if not own & ahead:
            where = f"its checkpoints end at step {max(own, default=0)}, those of others begin at {min(ahead)}"
            member.failure = f"{member.paths.path}: left out: {where}; started again, it goes on without them"
    return [member for member in members if not member.failure]


def build_block(recipe: Recipe, *, shared_data: bool) -> Callable[..., tuple[State, dict[str, Array]]]:
    """Makes (states, batches, steps, peak_lrs) -> (states, metrics): a loop over steps of a vmap over members.

    Args:
      recipe: of any member.
      shared_data: whether batches are arrays [N, B, T] for all members, or [N, members, B, T].

    Returns:
      The function; states have a leading axis of members, steps is how many of the N batches are used, peak_lrs is
      [members], metrics are [N, members], 0 after the last step.
    """
    step = jax.vmap(build_train_step(recipe), in_axes=(0, None if shared_data else 0, 0))

    def block(
        states: State, batches: Mapping[str, Shaped[Array, "N ..."]], steps: Int[Array, ""], peak_lrs: Float[Array, "M"]
    ):
        batch_at = lambda i: {name: jax.lax.dynamic_index_in_dim(x, i, keepdims=False) for name, x in batches.items()}
        shapes = jax.eval_shape(lambda: step(states, batch_at(0), peak_lrs)[1])
        size = len(batches["inputs"])
        zeros = jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), shapes)

        def one(i, carry):
            states, metrics = carry
            states, new = step(states, batch_at(i), peak_lrs)
            return states, jax.tree.map(lambda rows, row: rows.at[i].set(row), metrics, new)

        return jax.lax.fori_loop(0, steps, one, (states, zeros))

    return block


class _Group:
    """One process's work on a group: `restore`, `compile`, `run`, `finish`, in this order."""

    def __init__(self, members: Sequence[Member], feed: Feed, watchdog: Watchdog):
        self.members, self.feed, self.watchdog, self.cfg = members, feed, watchdog, members[0].cfg.train
        self.recipe = Recipe(members[0].cfg)
        self.peak_lrs = np.array([member.cfg.optim.peak_lr for member in members], np.float32)
        self.console = Console(soft_wrap=True)
        self.pending: collections.deque[tuple[int, int, dict[str, Array]]] = collections.deque()
        self.meter = Meter()
        self.step = self.saved_step = self.plotted_step = 0
        self.ended_early = False

    # -------------------------------------------------------------- start
    def restore(self) -> None:
        """Makes the first states, or restores those of the newest step that all members have."""
        common = set.intersection(*(set(member.store.steps) for member in self.members))
        self.step = self.saved_step = self.plotted_step = max(common, default=0)
        if self.step:
            target = self.recipe.abstract_state()
            restored = [member.store.restore(self.step, target) for member in self.members]
            states = [one.state for one in restored]
            for member, one in zip(self.members, restored, strict=True):
                member.total_tokens = one.metadata["total_tokens"]
            identities = [one.metadata.get("data", {}) for one in restored]
            self.feed.go_on([one.position for one in restored], identities)
        else:
            init = jax.jit(self.recipe.init_state)
            states = [init(jax.random.key(member.cfg.train.seed)) for member in self.members]
        self.states: State = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        where = f"go on from step {self.step}" if self.step else "start"
        names = ", ".join(member.paths.path.name for member in self.members)
        self._print(f"{len(self.members)} runs together {where}, {self.cfg.steps} steps each: {names}")

    def compile(self) -> None:
        """Compiles a block of steps, and the validation."""
        start = time.perf_counter()
        self.block_steps = min(BLOCK_STEPS, self.cfg.steps, self.cfg.validation.every, self.cfg.checkpoints.every)
        block = jax.jit(build_block(self.recipe, shared_data=self.feed.shared), donate_argnums=0)
        try:
            lowered = block.lower(self.states, self.feed.empty(self.block_steps), np.int32(0), self.peak_lrs)
        except NotImplementedError as error:  # an operator's implementation that the config names cannot run here
            raise UserError(f"config: {error}") from error
        self.train_block = lowered.compile()
        measurements = open_measurements(self.recipe.cfg, self.feed.datasets[0])  # the same for all seeds
        over_members = functools.partial(jax.vmap, in_axes=(0, 0, None, None))
        self.evaluator = Evaluator(self.recipe, measurements, over=over_members)
        self._print(f"compiled up to {self.block_steps} steps at a time in {time.perf_counter() - start:.1f} s")

    # -------------------------------------------------------------- steps
    def run(self, stop: StopRequest, until: Until | None) -> None:
        """Takes steps until all are done, `until` holds, all members have failed or a signal comes; leaves a checkpoint
        of the last one."""
        block = self._next_block()
        while self.step < self.cfg.steps and not (stop or self.ended_early or self.failed):
            steps, batches = block
            self.states, metrics = self.train_block(self.states, batches, steps, self.peak_lrs)
            self.step += int(steps)
            self.pending.append((self.step, steps, metrics))
            last = self.step == self.cfg.steps
            validation, rest = divmod(self.step, self.cfg.validation.every)
            due = last or not rest
            self.positions = self.feed.positions
            block = self._next_block()  # drawn while the device works ...
            self._plot()  # ... and so are the plots
            if due:
                self._settle(keep=1)
                evaluate = functools.partial(self.evaluator.start, *self._models, validation, last=last)
                self._settle(keep=0, evaluate=evaluate)
                self.ended_early = until is not None and not last and any(_holds(until, m) for m in self.members)
            if last or self.step % self.cfg.checkpoints.every == 0:
                self._checkpoint()
            self._settle(keep=1 if self.meter.is_running else 0)  # the first block starts the meter, alone
        if self.step > self.saved_step:
            self._checkpoint()
        self._plot()

    def _next_block(self) -> tuple[np.int32, Batch]:
        """How many steps come next, so that nothing is due between them, and their batches."""
        every = (self.cfg.validation.every, self.cfg.checkpoints.every)
        due = min(self.cfg.steps, *((self.step // n + 1) * n for n in every))
        steps = min(due - self.step, self.block_steps)
        return np.int32(steps), self.feed.draw(steps, self.block_steps)

    @property
    def _models(self) -> tuple[Variables, Variables]:
        return self.states["params"], self.states["buffers"]

    def _validation(self, end: int, sums: Mapping[str, Sequence[Sums]]) -> Validation:
        fetched = fetch(sums, lambda: self.watchdog.feed(end))
        of_member = lambda i: jax.tree.map(lambda x: x[i], fetched)
        found = [mean_metrics(of_member(i)) for i in range(len(self.members))]
        for member, metrics in zip(self.members, found, strict=True):
            member.accuracies.append(metrics.get(f"{VALIDATION}_accuracy", 0.0))
        return found

    def _settle(self, *, keep: int, evaluate: Callable[[], Mapping[str, Sequence[Sums]]] | None = None) -> None:
        """Fetches and writes the steps of finished blocks, oldest first; `evaluate` starts the last one's validation.

        It starts when the block has ended, so that its time, and that of compiling it, is not taken for the block's.
        """
        while len(self.pending) > keep:
            end, steps, on_device = self.pending.popleft()
            metrics = jax.device_get(on_device)
            self.watchdog.feed(end)
            self.meter.add(int(metrics["tokens"].sum()))
            rate = self.meter.lap().get("tokens_per_s") if evaluate else None
            with self.meter.paused():
                validation = self._validation(end, evaluate()) if evaluate else None
            for at, step in enumerate(range(end - steps + 1, end + 1)):
                rows = {name: x[at] for name, x in metrics.items()}
                self._write(step, rows, *((rate, validation) if step == end else (None, None)))
            if validation:
                self._show(end, validation, rate)

    def _write(
        self, step: int, rows: Mapping[str, np.ndarray], rate: float | None, validation: Validation | None
    ) -> None:
        logged = validation or step in (1, self.cfg.steps) or step % self.cfg.log_every == 0
        speed = {} if rate is None else {"tokens_per_s": rate / len(self.members)}
        for i, member in enumerate(self.members):
            if member.failure:
                continue
            record = member.note_step(step, {name: x[i].item() for name, x in rows.items()})
            if logged and not member.failure:
                member.write(record | (validation[i] if validation else {}) | speed)

    def _show(self, step: int, validation: Validation, rate: float | None) -> None:
        found = ", ".join(f"{v['validation_loss_nats']:.3f} ({v['validation_accuracy']:.2%})" for v in validation if v)
        speed = "" if rate is None else f"; {rate:,.0f} tokens/s"
        self._print(f"step {step}/{self.cfg.steps}  validation loss and accuracy {found}{speed}")

    def _checkpoint(self) -> None:
        self._settle(keep=0)
        with self.meter.paused():
            for i, (member, data) in enumerate(zip(self.members, self.feed.identities, strict=True)):
                if not member.failure:
                    state = jax.tree.map(lambda x, i=i: x[i], self.states)
                    config = member.cfg.model_dump(mode="json")
                    metadata = {"total_tokens": member.total_tokens, "config": config, "data": data}
                    member.store.save(self.step, state, self.positions[i], metadata)
        self.saved_step = self.step

    def _plot(self) -> None:
        """Draws the curves of what the newest checkpoints belong to, if that was not done yet."""
        if self.plotted_step < self.saved_step:
            for member in self.members:
                if not member.failure:
                    member.plot()
        self.plotted_step = self.saved_step

    # -------------------------------------------------------------- end
    @property
    def finished(self) -> bool:
        return self.ended_early or self.step == self.cfg.steps

    @property
    def failed(self) -> bool:
        """Whether no member is left."""
        return all(member.failure for member in self.members)

    def finish(self, stop: StopRequest) -> None:
        """Waits for the checkpoints and says how it ended."""
        for member in self.members:
            member.store.wait()
        for member in self.members:  # once all checkpoints are whole
            if self.ended_early and not member.failure:
                member.paths.mark_ended(self.step)
        how = "ended early" if self.ended_early else "finished" if self.finished else "stopped"
        how = f"{stop.signal.name}: {how}" if stop and not self.finished else how
        self._print(f"{how} after step {self.step}")

    def _print(self, line: str) -> None:
        """To the terminal and to every member's log.txt."""
        self.console.print(line, markup=False, highlight=False)
        for member in self.members:
            with naming(member.paths.log), member.paths.log.open("a") as log:
                log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")


def _holds(until: Until, member: Member) -> bool:
    last = member.accuracies[-until.validations :]
    return not member.failure and len(last) == until.validations and min(last) >= until.accuracy
