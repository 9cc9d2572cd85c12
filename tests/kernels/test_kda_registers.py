"""Registers that the kernels of KDA spill, as ptxas counts them: on any machine with JAX's CUDA plugin, GPU or not."""

import dataclasses
import re

import jax
import pytest

from kimi_jax.experiments.plan_compile import describe_devices
from kimi_jax.experiments.plan_hardware import read_hardware
from pallas_kernels import hopper
from pallas_kernels.kda import step_kda
from pallas_kernels.kda.cases import Case, make_gate, make_inputs, run_with_gradients

pytestmark = pytest.mark.slow

WHOLE = Case("whole", 1, 1024, 16, 16, 128, 128, dtype="bfloat16", gate="softplus", normalize_qk=True)
CASES = {
    "softplus": WHOLE,
    "bounded-packed": dataclasses.replace(WHOLE, gate="lower_bound", lengths=(700, 300)),
    "narrow": dataclasses.replace(WHOLE, key_dim=64, value_dim=64),
}
CUT = dataclasses.replace(WHOLE, time=8192, heads=8, value_heads=8)  # into segments of time
# Bytes per thread, the most that may be; measured: 88 and 156 to 184 (ptxas of CUDA 13.0), 0 for the others.
SPILLED = {"kda_prepare": 96, "kda_recurrence": 0, "kda_reverse_chain": 0, "kda_chunk_gradients": 200}
SPILLED_CUT = SPILLED | {"kda_segment_maps": 0}


@pytest.fixture
def compile_for_hopper(monkeypatch, capfd):
    """Compiles a function of arrays; returns bytes spilled per thread by kernel, the most if it has several forms."""
    devices, target = describe_devices(read_hardware("1xh100"))
    if target == "cpu":
        pytest.skip("needs JAX's CUDA plugin: pip install jax-cuda13-plugin jax-cuda13-pjrt")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    sharding = jax.sharding.SingleDeviceSharding(devices[0])

    def compile_and_count(function, arguments):
        described = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
        with hopper.compiling_for(hopper.CAPABILITY):
            jax.jit(function).lower(*described).compile()
        report = "".join(capfd.readouterr())
        print(report)
        kernels = re.findall(r"Function properties for (\w+)_mosaic_gpu_kernel\s.*?(\d+) bytes spill stores", report)
        return {name: max(int(n) for other, n in kernels if other == name) for name, _ in kernels}

    return compile_and_count


@pytest.mark.parametrize(
    ("case", "limits"), [*((case, SPILLED) for case in CASES.values()), (CUT, SPILLED_CUT)], ids=[*CASES, "cut"]
)
def test_registers_of_forward_and_backward(case, limits, compile_for_hopper):
    spilled = compile_for_hopper(lambda x: run_with_gradients(case, x, "mosaic_gpu"), [make_inputs(case)])
    assert spilled.keys() == limits.keys()
    assert all(spilled[name] <= limits[name] for name in spilled), spilled


def test_registers_of_the_step(compile_for_hopper):
    inputs = make_inputs(WHOLE)

    def step(inputs):
        return step_kda(*(x[:, 0] for x in inputs[:5]), inputs.initial_state, gate=make_gate(WHOLE, inputs))

    assert compile_for_hopper(step, [inputs]) == {"kda_step": 0}
