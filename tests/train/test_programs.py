"""How a step is compiled for one GPU and for several, and that programs are kept on GPUs alone."""

import jax
import pytest

from kimi_jax.train.programs import SCHEDULER, compile_step, keep_programs


class Lowered:
    """Returns the options it is compiled with."""

    def compile(self, compiler_options):
        return compiler_options


@pytest.mark.parametrize(
    ("backend", "num_devices", "flags", "left_out"),
    [("gpu", 1, "", True), ("gpu", 2, "", False), ("cpu", 1, "", False), ("gpu", 1, f"--{SCHEDULER}=true", False)],
)
def test_the_scheduler_is_left_out_where_nothing_travels(monkeypatch, backend, num_devices, flags, left_out):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert compile_step(Lowered(), num_devices) == ({SCHEDULER: False} if left_out else None)


def test_the_compiler_knows_the_option():
    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    assert lowered.compile(compiler_options={SCHEDULER: False})(1.0) == 2.0


@pytest.mark.parametrize(
    ("backend", "folder", "kept"), [("cpu", None, None), ("gpu", "mine", "mine"), ("gpu", None, "programs")]
)
def test_where_programs_are_kept(monkeypatch, tmp_path, backend, folder, kept):
    former = jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setenv("KIMI_JAX_CACHE", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", folder)
    try:
        keep_programs()
        found = jax.config.jax_compilation_cache_dir
    finally:
        jax.config.update("jax_compilation_cache_dir", former)
    assert found == (str(tmp_path / "programs") if kept == "programs" else kept)
