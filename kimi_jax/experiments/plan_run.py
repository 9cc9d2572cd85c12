"""Plans a training run before anything is rented: memory, traffic and time on a mesh, and which meshes would fit."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax

from kimi_jax.config.load import validate
from kimi_jax.config.mesh import Mesh
from kimi_jax.config.train import RunConfig
from kimi_jax.errors import UserError
from kimi_jax.experiments.plan_compile import Compiled, compile_elsewhere
from kimi_jax.experiments.plan_hardware import GIB, Hardware
from kimi_jax.experiments.plan_time import StepTime, describe_model, estimate_step
from kimi_jax.experiments.plan_traffic import Traffic, count_traffic, local_tokens, seconds
from kimi_jax.parallel.mesh import abstract_mesh, check_run
from kimi_jax.parallel.rules import state_shardings
from kimi_jax.train.state import Recipe, State

LONG = 32768  # tokens of a sequence from which on cutting it is tried
SHOWN = 12  # candidates


@dataclass(frozen=True)
class StateBytes:
    """On one device, as the rules cut it."""

    parameters: int
    optimizer: int
    buffers: int

    @property
    def total(self) -> int:
        return self.parameters + self.optimizer + self.buffers


@dataclass(frozen=True)
class Candidate:
    """A mesh and what is known of it without compiling."""

    mesh: Mesh
    shape: Mapping[str, int]
    state: StateBytes
    tokens: float
    """Of a microbatch on one device."""
    traffic: tuple[Traffic, ...]
    time: StepTime

    @property
    def label(self) -> str:
        return ",".join(f"{axis}={size}" for axis, size in self.shape.items() if size > 1) or "data=1"


def parse_mesh(text: str) -> Mesh:
    """Reads data=8,fsdp=8.

    Raises:
      UserError: an axis is unknown or given twice, or a size no whole number from 1 on.
    """
    parts = [part.partition("=")[::2] for part in text.split(",")]
    sizes = dict(parts)
    if len(sizes) < len(parts):
        raise UserError(f"--mesh={text!r}: an axis is given twice")
    return validate(sizes, Mesh, source=f"--mesh={text!r}")


class Planned(NamedTuple):
    """What is the same on every mesh."""

    recipe: Recipe
    state: State
    """Shapes and dtypes."""
    hardware: Hardware


def examine(planned: Planned, mesh: Mesh) -> Candidate:
    """Counts one mesh.

    Raises:
      UserError: the mesh does not fit the devices, the model, the batch or the sequence.
    """
    recipe, whole, hardware = planned
    cfg, abstract = recipe.cfg, abstract_mesh(mesh, hardware.count)
    check_run(abstract, cfg)
    state = _state_bytes(planned, abstract)
    traffic = tuple(count_traffic(recipe, whole["params"], abstract))
    time = estimate_step(cfg, hardware, abstract, traffic, state.parameters)
    return Candidate(mesh, dict(abstract.shape), state, local_tokens(cfg, abstract), traffic, time)


def _state_bytes(planned: Planned, mesh) -> StateBytes:
    state = planned.state
    shardings = state_shardings(state, planned.recipe.logical_axes, mesh)

    def size(part: str) -> int:
        leaves = zip(jax.tree.leaves(state[part]), jax.tree.leaves(shardings[part]), strict=True)
        return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in leaves)

    return StateBytes(size("params"), size("opt_state"), size("buffers"))


def candidates(planned: Planned) -> list[Candidate]:
    """Every mesh of powers of two that the config fits, the fastest first."""
    found = []
    for mesh in _meshes(planned.recipe.cfg, planned.hardware):
        try:
            found.append(examine(planned, mesh))
        except UserError:
            continue
    return sorted(found, key=lambda c: (c.time.worst_s, c.state.total))


def _meshes(cfg: RunConfig, hardware: Hardware) -> Iterator[Mesh]:
    powers = [2**i for i in range(hardware.count.bit_length())]
    contexts = powers if cfg.data.seq_len >= LONG else [cfg.mesh.context]
    tensors = [p for p in powers if p <= hardware.gpu.per_host]
    for fsdp, expert, context, tensor in itertools.product(powers, powers, contexts, tensors):
        if hardware.count % (fsdp * expert * context * tensor) == 0:
            yield Mesh(fsdp=fsdp, expert=expert, context=context, tensor=tensor)


def choose(planned: Planned, found: Sequence[Candidate]) -> Candidate:
    """The mesh of the config if it names one, else the fastest whose state leaves half of the memory for the rest.

    Raises:
      UserError: the state fits on no mesh.
    """
    cfg, hardware = planned.recipe.cfg, planned.hardware
    if cfg.mesh != Mesh():
        return examine(planned, cfg.mesh)
    fitting = [c for c in found if c.state.total <= hardware.usable_bytes / 2]
    fitting = fitting or [c for c in found if c.state.total <= hardware.usable_bytes]
    if not fitting:
        examine(planned, Mesh())  # why not, if the config is at fault
        least = min(c.state.total for c in found) / GIB
        room = hardware.usable_bytes / GIB
        raise UserError(f"--hardware: parameters and optimizer alone take {least:.1f} GiB per GPU of {room:.1f} usable")
    return fitting[0]


def plan(cfg: RunConfig, hardware: Hardware, mesh: Mesh | None, *, compiled: bool) -> str:
    """Returns the whole report, Markdown.

    Args:
      mesh: the one to plan; None: see `choose`.
      compiled: whether the step is compiled ahead of time, which takes minutes for large models.
    """
    recipe = Recipe(cfg)
    planned = Planned(recipe, recipe.abstract_state(), hardware)
    chosen = examine(planned, mesh) if mesh else None  # one that does not fit is refused before the others are counted
    found = candidates(planned)
    chosen = chosen or choose(planned, found)
    placed = cfg.model_copy(update={"mesh": chosen.mesh})
    result = compile_elsewhere(placed, hardware) if compiled else None
    parts = [
        f"{hardware.count} x {hardware.gpu.kind}, mesh {chosen.label}",
        describe_model(cfg),
        memory_table(chosen, hardware, result),
        traffic_table(chosen, hardware, result),
        time_lines(cfg, chosen, hardware),
        candidate_table(cfg, found, chosen, hardware, result),
    ]
    return "\n\n".join(parts)


# ------------------------------------------------------------------ report
def memory_table(chosen: Candidate, hardware: Hardware, result: Compiled | None) -> str:
    """GiB per device."""
    state = chosen.state
    rows = [("parameters", state.parameters), ("optimizer", state.optimizer), ("router biases", state.buffers)]
    if result:
        rows += [
            ("batch, step", max(0, result.argument_bytes - state.total)),
            (f"gradients, activations and the rest, compiled for {result.target}", result.temporary_bytes),
            ("peak", result.peak_bytes),
        ]
    lines = ["| per device | GiB |", "|---|---|", *(f"| {name} | {size / GIB:.2f} |" for name, size in rows)]
    usable = hardware.usable_bytes / GIB
    if result:
        fits = "fits" if result.peak_bytes <= hardware.usable_bytes else "does NOT fit"
        lines.append(f"\nIt {fits} into the {usable:.1f} GiB that a program may use.")
    return "\n".join(lines)


def traffic_table(chosen: Candidate, hardware: Hardware, result: Compiled | None) -> str:
    """MB that each device sends per step: by formula, and as counted in the compiled program."""
    if not chosen.traffic:
        return "One device: nothing is sent."
    lines = ["| axes | what | MB per device and step | ms |", "|---|---|---|---|"]
    for t in chosen.traffic:
        ms = 1e3 * seconds(t, hardware, chosen.shape)
        lines.append(f"| {', '.join(t.axes)} | {t.what} | {t.sent_bytes / 1e6:,.1f} | {ms:,.1f} |")
    if result:
        lines += ["\n| axes | collective in the program | calls | MB per device and step |", "|---|---|---|---|"]
        for c in result.collectives:
            lines.append(f"| {', '.join(c.axes)} | {c.kind} | {c.count} | {c.sent_bytes / 1e6:,.1f} |")
    return "\n".join(lines)


def time_lines(cfg: RunConfig, chosen: Candidate, hardware: Hardware) -> str:
    """The range of the step time, what it is made of, and the whole run."""
    time, tokens = chosen.time, cfg.train.batch_size * cfg.data.seq_len
    mfu = "MFU unknown" if time.mfu is None else f"MFU {time.mfu[0]:.0%} to {time.mfu[1]:.0%}"
    rates = [tokens / s for s in (time.worst_s, time.best_s)]
    days = [cfg.train.steps * s / 86400 for s in (time.best_s, time.worst_s)]
    return (
        f"Step {time.best_s:.3g} to {time.worst_s:.3g} s (work {time.work_s:.3g} s, sending {time.sending_s:.3g} s), "
        f"{mfu}, {rates[0]:,.0f} to {rates[1]:,.0f} tokens/s;\n{cfg.train.steps:,} steps: {days[0]:.3g} to "
        f"{days[1]:.3g} days.\n"
        "Work at the rates measured on one H100 (docs/performance.md); sending all hidden behind it, or none of it."
    )


def candidate_table(
    cfg: RunConfig, found: Sequence[Candidate], chosen: Candidate, hardware: Hardware, result: Compiled | None
) -> str:
    """The fastest meshes that fit; temporaries are those of the compiled mesh, scaled by parameters and tokens."""
    lines = ["| mesh | state GiB | peak GiB | step s | MFU | |", "|---|---|---|---|---|---|"]
    fitting = [(c, _peak(cfg, c, chosen, result)) for c in found]
    fitting = [(c, peak) for c, peak in fitting if peak <= hardware.usable_bytes]
    for c, peak in fitting[:SHOWN]:
        mfu = "" if c.time.mfu is None else f"{c.time.mfu[0]:.0%} to {c.time.mfu[1]:.0%}"
        mark = "compiled" if result and c.shape == chosen.shape else ""
        peak_gib = f"{peak / GIB:.1f}" if result else "?"
        times = f"{c.time.best_s:.3g} to {c.time.worst_s:.3g}"
        lines.append(f"| {c.label} | {c.state.total / GIB:.1f} | {peak_gib} | {times} | {mfu} | {mark} |")
    basis = "peaks scaled from the compiled mesh" if result else "by parameters and optimizer alone"
    lines.append(
        f"\n{len(fitting)} of {len(found)} meshes fit, {basis}; the fastest {min(len(fitting), SHOWN)} are shown."
    )
    return "\n".join(lines)


def _peak(cfg: RunConfig, c: Candidate, chosen: Candidate, result: Compiled | None) -> float:
    """Gradients as large as the parameters (twice with microbatches); the rest in proportion to the tokens."""
    if not result:
        return c.state.total
    copies = 2 if cfg.train.grad_accum > 1 else 1
    rest = max(0.0, result.temporary_bytes - copies * chosen.state.parameters)
    return c.state.total + copies * c.state.parameters + rest * c.tokens / chosen.tokens
