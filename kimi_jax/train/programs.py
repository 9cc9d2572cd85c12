"""How a training step is compiled, and where compiled programs stay for the next start."""

import os

import jax

from kimi_jax.data.prepare import cache_folder

SCHEDULER = "xla_gpu_enable_latency_hiding_scheduler"


def compile_step(lowered: jax.stages.Lowered, num_devices: int) -> jax.stages.Compiled:
    """Compiles a step for a number of devices.

    XLA's scheduler that hides communication takes a third of the time; on one GPU there is nothing to hide, and it is
    left out, unless XLA_FLAGS says otherwise.
    """
    alone = num_devices == 1 and jax.default_backend() == "gpu" and SCHEDULER not in os.environ.get("XLA_FLAGS", "")
    return lowered.compile(compiler_options={SCHEDULER: False} if alone else None)


def keep_programs() -> None:
    """On a GPU, makes jax keep compiled programs in a folder of the cache, unless JAX_COMPILATION_CACHE_DIR names one.

    Compiling a training step takes a minute and more, finding it again what tracing takes. Algorithms that XLA chose by
    measuring stay the same, too. CPU programs are not kept: they are made for one machine's instruction set.
    """
    if jax.default_backend() == "gpu" and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "programs"))
