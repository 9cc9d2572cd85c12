"""XLA's and NCCL's settings: added where nobody chose, left alone where somebody did, one line if unknown."""

import pytest

from kimi_jax.config.train import Flags
from kimi_jax.errors import UserError
from kimi_jax.train import xla_flags
from kimi_jax.train.xla_flags import DEFAULTS, MEMORY, PRESETS, apply, check_nccl, check_xla


def test_defaults_are_added_once(monkeypatch):
    monkeypatch.setattr(xla_flags, "check_xla", lambda text: None)
    environment = {"XLA_FLAGS": "--xla_dump_to=dumps"}
    apply(Flags(), environment)
    apply(Flags(), environment)
    assert environment["XLA_FLAGS"].split() == ["--xla_dump_to=dumps", *(f"--{k}={v}" for k, v in DEFAULTS.items())]


def test_a_users_choice_stays(monkeypatch):
    monkeypatch.setattr(xla_flags, "check_xla", lambda text: None)
    environment = {"XLA_FLAGS": "--xla_gpu_enable_triton_gemm=true"}
    apply(Flags(), environment)
    assert environment["XLA_FLAGS"] == "--xla_gpu_enable_triton_gemm=true"


@pytest.mark.parametrize("name", [None, *MEMORY])
def test_the_memory_taken_is_said_once(name, monkeypatch):
    """jax does not start with both names set."""
    monkeypatch.setattr(xla_flags, "check_xla", lambda text: None)
    environment = {} if name is None else {name: "0.5"}
    apply(Flags(), environment)
    said = {name: environment[name] for name in MEMORY if name in environment}
    assert said == ({"XLA_CLIENT_MEM_FRACTION": "0.92"} if name is None else {name: "0.5"})


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KIMI_JAX_CACHE", str(tmp_path))
    return tmp_path


def test_the_config_comes_before_the_preset(cache, monkeypatch):
    checked = []
    monkeypatch.setattr(xla_flags, "check_xla", checked.append)
    library = cache / "libnccl.so.2"
    library.write_bytes(b"\x7fELF\0NCCL_NVLS_ENABLE\0NCCL_DEBUG\0")
    monkeypatch.setattr(xla_flags, "find_nccl", lambda: library)
    environment = {"XLA_FLAGS": "--xla_dump_to=dumps", "NCCL_DEBUG": "INFO", "NCCL_VERSION": "set by an image"}
    key = "xla_gpu_enable_pipelined_all_gather"
    flags = Flags(preset="overlap", xla={key: "false"}, nccl={"NCCL_DEBUG": "WARN", "NCCL_NVLS_ENABLE": "0"})
    apply(flags, environment)
    assert checked == [environment["XLA_FLAGS"]]
    assert f"--{key}=false" in checked[0] and f"--{key}=true" not in checked[0]
    assert {name: environment[name] for name in flags.nccl} == {"NCCL_DEBUG": "INFO", "NCCL_NVLS_ENABLE": "0"}


def test_what_xla_does_not_know_is_one_line(cache, monkeypatch):
    """A process of its own tries them: XLA would abort this one."""
    known = " ".join(f"--{name}={value}" for preset in (DEFAULTS, *PRESETS.values()) for name, value in preset.items())
    check_xla(known)
    assert len(list((cache / "xla_flags").iterdir())) == 1
    with pytest.raises(UserError, match=r"jaxlib .* refuses them: Unknown flag in XLA_FLAGS: --xla_nonsense=1$"):
        check_xla(f"{known} --xla_nonsense=1")
    monkeypatch.setattr(xla_flags.subprocess, "run", None)  # a second try of what passed starts no process
    check_xla(known)


def test_what_nccl_does_not_know_is_one_line(tmp_path):
    library = tmp_path / "libnccl.so.2"
    library.write_bytes(b"\x7fELF\0NCCL_NVLS_ENABLE\0NCCL_DEBUG\0")
    check_nccl(["NCCL_DEBUG", "NCCL_NVLS_ENABLE"], library)
    check_nccl(["NCCL_NVLS_ENABEL"], None)
    message = "NCCL_NVLS_ENABEL: libnccl.so.2 knows no such variable; did you mean NCCL_NVLS_ENABLE?"
    with pytest.raises(UserError, match=message):
        check_nccl(["NCCL_DEBUG", "NCCL_NVLS_ENABEL"], library)
