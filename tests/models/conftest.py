"""Model tests compile many small programs and run each a few times: they skip XLA's costly optimisation passes."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
