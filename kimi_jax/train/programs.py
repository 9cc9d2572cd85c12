"""How a training step is compiled, and where compiled programs stay for the next start."""

import os

import jax
from jax.sharding import Mesh

from kimi_jax.data.prepare import cache_folder
from kimi_jax.errors import UserError

SCHEDULER = "xla_gpu_enable_latency_hiding_scheduler"
KEPT_BYTES = 10 * 2**30  # of compiled programs; a training step takes 14 MB


def compile_step(lowered: jax.stages.Lowered, mesh: Mesh) -> jax.stages.Compiled:
    """Compiles a step for the devices of a mesh, which need not be there.

    XLA's scheduler that hides communication takes a third of the time; on one GPU there is nothing to hide, and it is
    left out, unless XLA_FLAGS says otherwise.
    """
    alone = mesh.size == 1 and mesh.devices.item().platform == "gpu"
    leave_out = alone and SCHEDULER not in os.environ.get("XLA_FLAGS", "")
    return lowered.compile(compiler_options={SCHEDULER: False} if leave_out else None)


def keep_programs() -> None:
    """On a GPU, makes jax keep compiled programs in a folder of the cache, unless JAX_COMPILATION_CACHE_DIR names one.

    Compiling a training step takes a minute and more, finding it again what tracing takes. Algorithms that XLA chose by
    measuring stay the same, too. CPU programs are not kept: they are made for one machine's instruction set. What was
    not used for longest goes when the folder is full; JAX_COMPILATION_CACHE_MAX_SIZE says otherwise.

    Raises:
      UserError: JAX_PLATFORMS names a platform that is not there.
    """
    if _default_backend() != "gpu" or jax.config.jax_compilation_cache_dir is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "programs"))
    if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
        jax.config.update("jax_compilation_cache_max_size", KEPT_BYTES)


def _default_backend() -> str:
    try:
        return jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # jax asserts where the package of a platform is not installed
        why = next(iter(str(error).splitlines()), "its package for jax is not installed")
        raise UserError(f"JAX_PLATFORMS={jax.config.jax_platforms}: no such device: {why}") from error
