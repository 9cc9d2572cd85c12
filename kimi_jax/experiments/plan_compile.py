"""Compiles a training step ahead of time for devices that are not there, and says what it needs and sends.

`python -m kimi_jax.experiments.plan_compile` reads a request (JSON) from standard input and writes its findings (JSON).
With JAX's CUDA plugin installed the program is that of the GPUs, without it that of as many simulated CPU devices.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from kimi_jax.config.train import RunConfig
from kimi_jax.data.pipeline import BATCH_DTYPES
from kimi_jax.errors import UserError, exit_on_user_error
from kimi_jax.experiments.plan_collectives import Collective, read_collectives
from kimi_jax.experiments.plan_hardware import Hardware, compiler_target, read_hardware, topology_name
from kimi_jax.parallel.mesh import build_mesh, check_run
from kimi_jax.parallel.rules import batch_sharding
from kimi_jax.train.programs import compile_step
from kimi_jax.train.state import Recipe
from kimi_jax.train.step import build_train_step
from kimi_jax.train.xla_flags import apply
from pallas_kernels import hopper

WITHOUT_A_GPU = "--xla_gpu_autotune_level=0"  # algorithms are not measured
QUICKLY = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # CPU code that never runs


@dataclass(frozen=True)
class Compiled:
    """What the compiler said of one device's part of the training step.

    Args:
      target: the kind of device it was compiled for.
      argument_bytes: state and batch.
      temporary_bytes: everything else at its peak: gradients, activations, gathered weights.
      flops: of the compiled program, as XLA counts; kernels not included.
      collectives: see `read_collectives`.
      seconds: taken.
    """

    target: str
    argument_bytes: int
    temporary_bytes: int
    flops: float
    collectives: tuple[Collective, ...]
    seconds: float

    @property
    def peak_bytes(self) -> int:
        return self.argument_bytes + self.temporary_bytes


def compile_elsewhere(cfg: RunConfig, hardware: Hardware) -> Compiled:
    """Compiles in a process of its own, which sees the devices of `hardware` and runs nothing.

    Raises:
      UserError: the config does not fit the devices, or the compiler gave up.
    """
    environment = dict(os.environ) | {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    environment["JAX_NUM_CPU_DEVICES"] = str(hardware.count)
    apply(cfg.train.flags, environment)  # as training does
    environment["XLA_FLAGS"] += f" {WITHOUT_A_GPU} {QUICKLY}"
    command = [sys.executable, "-m", "kimi_jax.experiments.plan_compile"]
    request = json.dumps({"config": cfg.model_dump(mode="json"), "hardware": str(hardware)})
    child = subprocess.run(command, input=request, env=environment, capture_output=True, text=True, check=False)
    if child.returncode:
        lines = [line for line in child.stderr.splitlines() if line.strip()] or ["no message"]
        problems = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        raise UserError(problems or f"plan: the training step did not compile: {lines[-1][:200]}")
    found = json.loads(child.stdout.splitlines()[-1])
    collectives = tuple(Collective(c["kind"], tuple(c["axes"]), *_numbers(c)) for c in found.pop("collectives"))
    return Compiled(**found, collectives=collectives)


def _numbers(collective: dict) -> tuple[int, int]:
    return collective["count"], collective["sent_bytes"]


def compile_here(cfg: RunConfig, hardware: Hardware) -> Compiled:
    """Compiles the training step for devices of that kind, as training does; everything in it is a shape."""
    devices, target = describe_devices(hardware)
    mesh = build_mesh(cfg.mesh, devices)
    check_run(mesh, cfg)
    recipe, start = Recipe(cfg), time.perf_counter()
    shape, sharding = (cfg.train.batch_size, cfg.data.seq_len), batch_sharding(mesh)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in BATCH_DTYPES.items()}
    state = recipe.abstract_state(mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(build_train_step(recipe), donate_argnums=0, out_shardings=(shardings, None))
    on_gpu = hopper.compiling_for(hardware.gpu.capability) if target != "cpu" else contextlib.nullcontext()
    with jax.set_mesh(mesh), on_gpu:
        compiled = compile_step(step.lower(state, batch), mesh)
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
    return Compiled(
        target=target,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        flops=costs.get("flops", 0.0),
        collectives=tuple(read_collectives(compiled.as_text(), dict(mesh.shape))),
        seconds=time.perf_counter() - start,
    )


def describe_devices(hardware: Hardware) -> tuple[Sequence[jax.Device], str]:
    """(devices to compile for, what they are): the GPUs if JAX's CUDA plugin is installed, else simulated CPUs."""
    jax.devices()  # registers the plugins
    try:
        described = {"topology": topology_name(hardware), "target_config": compiler_target(hardware.gpu)}
        return topologies.get_topology_desc(platform="cuda", **described).devices, hardware.gpu.kind
    except NotImplementedError:
        return jax.devices(), "cpu"


def main() -> None:
    request = json.load(sys.stdin)
    cfg, hardware = RunConfig.model_validate(request["config"]), read_hardware(request["hardware"])
    print(json.dumps(dataclasses.asdict(compile_here(cfg, hardware))))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
