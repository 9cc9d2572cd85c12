"""Settings every test runs under: exact matrix products, no silent rank promotion, equal programs compiled once."""

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_runtest_setup(item):
    if item.get_closest_marker("multi_device") and jax.device_count() < 8:
        pytest.skip("needs eight devices: make test-multi-device")


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory) -> str:
    """Equal programs are compiled once per session, for all workers of `pytest -n` and subprocesses."""
    together = tmp_path_factory.getbasetemp().parent / "xla"
    folder = str(together if "PYTEST_XDIST_WORKER" in os.environ else tmp_path_factory.mktemp("xla"))
    settings = {
        "jax_compilation_cache_dir": folder,
        "jax_compilation_cache_max_size": 2**36,  # with a limit, entries are read and written under a lock
        "jax_persistent_cache_min_compile_time_secs": 0.5,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    former = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    yield folder
    for name, value in former.items():
        jax.config.update(name, value)
        del os.environ[name.upper()]


@pytest.fixture
def start_process() -> Iterator[Callable[..., subprocess.Popen]]:
    """`subprocess.Popen` for processes that do not outlive their test, however it ends."""
    with contextlib.ExitStack() as processes:

        def start(command: list[str], **options) -> subprocess.Popen:
            process = processes.enter_context(subprocess.Popen(command, **options))
            processes.callback(process.kill)  # comes before it is waited for
            return process

        yield start


@pytest.fixture(scope="module")
def quick_compilation():
    """For modules that compile many small programs and run each a few times: without XLA's costly passes."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
