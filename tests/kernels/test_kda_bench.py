"""The KDA bench: what it counts, and that a wrong result gets no time."""

import dataclasses
import sys

import pytest

from pallas_kernels.dispatch import Implementation
from pallas_kernels.kda import api, bench, reference
from scripts import bench as script


def test_bytes_and_operations_of_one_token_and_head():
    case = next(iter(bench.bench_cases().values()))
    token_heads = case.batch * case.time * case.heads
    assert bench.floor_bytes(case, both=False) / token_heads == 5 * 128 * 2  # q, k, v, g in, o out
    assert (
        bench.floor_bytes(case, both=True) / token_heads == 14 * 128 * 2
    )  # again q, k, v, g and do in, dq, dk, dv, dg out
    assert bench.operations(case, both=True) == 3 * bench.operations(case, both=False)


def test_a_wrong_result_and_a_missing_peer_get_no_time(monkeypatch):
    def wrong(*args, **kwargs):
        o, state = reference.chunk_kda(*args, **kwargs)
        return o, state * 1.02

    cases = {
        name: dataclasses.replace(case, time=64, heads=1, value_heads=1, key_dim=16, value_dim=16)
        for name, case in list(bench.bench_cases().items())[:1]
    }
    table = {"wrong": Implementation(wrong), "reference": Implementation(reference.chunk_kda)}
    monkeypatch.setattr(api, "IMPLEMENTATIONS", table)
    monkeypatch.setitem(sys.modules, "torch", None)
    (case,) = cases.values()
    ours, peer = bench.measure(case, ("fla",))
    assert ours.forward_ms is None and ours.note.startswith("WRONG, so no time: error ratio of final_state")
    assert peer.forward_ms is None and "torch" in peer.note
    assert "WRONG" in bench.table([ours, peer], cases, "another GPU")


def test_unknown_names_and_a_missing_gpu_are_said_in_one_line(monkeypatch, capsys):
    for arguments, expected in ((["--cases", "T1-H1"], "--cases='T1-H1' matches none of"), ([], "needs an NVIDIA GPU")):
        monkeypatch.setattr(sys, "argv", ["bench.py", "kda", *arguments])
        monkeypatch.setattr(script.jax, "default_backend", lambda: "cpu")
        with pytest.raises(SystemExit) as stopped:
            script.main()
        assert stopped.value.code == 2
        assert expected in capsys.readouterr().err
