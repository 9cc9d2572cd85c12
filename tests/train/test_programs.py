"""How a step is compiled for one GPU and for several, and that programs are kept on GPUs alone."""

from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from kimi_jax.errors import UserError
from kimi_jax.train.programs import KEPT_BYTES, SCHEDULER, compile_step, keep_programs

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_enable_xla_caches",
)


class Lowered:
    """Returns the options it is compiled with."""

    def compile(self, compiler_options):
        return compiler_options


@pytest.mark.parametrize(
    ("platform", "num_devices", "flags", "left_out"),
    [("gpu", 1, "", True), ("gpu", 2, "", False), ("cpu", 1, "", False), ("gpu", 1, f"--{SCHEDULER}=true", False)],
)
def test_the_scheduler_is_left_out_where_nothing_travels(monkeypatch, platform, num_devices, flags, left_out):
    monkeypatch.setenv("XLA_FLAGS", flags)
    devices = np.array([SimpleNamespace(platform=platform)] * num_devices)
    mesh = SimpleNamespace(size=num_devices, devices=devices)
    assert compile_step(Lowered(), mesh) == ({SCHEDULER: False} if left_out else None)


def test_the_compiler_knows_the_option():
    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    assert lowered.compile(compiler_options={SCHEDULER: False})(1.0) == 2.0


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """A process that has set nothing; jax's settings are as before after it."""
    former = {name: getattr(jax.config, name) for name in SETTINGS}
    monkeypatch.setenv("KIMI_JAX_CACHE", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_MAX_SIZE", raising=False)
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_compilation_cache_max_size", -1)
    yield
    for name, value in former.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.parametrize(
    ("backend", "folder", "kept"), [("cpu", None, None), ("gpu", "mine", "mine"), ("gpu", None, "programs")]
)
def test_where_programs_are_kept(monkeypatch, tmp_path, settings, backend, folder, kept):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    jax.config.update("jax_compilation_cache_dir", folder)
    keep_programs()
    ours = kept == "programs"
    assert jax.config.jax_compilation_cache_dir == (str(tmp_path / "programs") if ours else kept)
    assert jax.config.jax_compilation_cache_max_size == (KEPT_BYTES if ours else -1)


def test_what_is_kept_is_bounded(monkeypatch, settings):
    """Jax needs a library for it, without which it keeps nothing."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    keep_programs()
    monkeypatch.undo()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    folder, kept = Path(jax.config.jax_compilation_cache_dir), []
    for factor in (2.0, 3.0):
        jax.jit(lambda x, factor=factor: x * factor).lower(1.0).compile()
        files = list(folder.glob("*-cache"))
        kept.append(files)
        jax.config.update("jax_compilation_cache_max_size", int(1.5 * files[0].stat().st_size))
        compilation_cache.reset_cache()
    assert [len(files) for files in kept] == [1, 1] and kept[0] != kept[1]


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize backend 'x'\nmore")])
def test_a_platform_that_is_not_there_is_one_line(monkeypatch, error):
    def refuse():
        raise error

    monkeypatch.setattr(jax, "default_backend", refuse)
    with pytest.raises(UserError, match=r"^JAX_PLATFORMS=\w+: no such device: (its package|Unable)[^\n]*$"):
        keep_programs()
