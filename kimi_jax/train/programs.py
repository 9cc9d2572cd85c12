"""Where compiled programs stay, so that a run that goes on, or is like one before, need not compile them again."""

import jax

from kimi_jax.data.prepare import cache_folder


def keep_programs() -> None:
    """On a GPU, makes jax keep compiled programs in a folder of the cache, unless JAX_COMPILATION_CACHE_DIR names one.

    Compiling a training step takes a minute and more, finding it again what tracing takes. Algorithms that XLA chose by
    measuring stay the same, too. CPU programs are not kept: they are made for one machine's instruction set.
    """
    if jax.default_backend() == "gpu" and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "programs"))
