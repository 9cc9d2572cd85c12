"""Benches: what they count, what they print, and that a wrong result gets no time."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest

from pallas_kernels import peers, timing
from pallas_kernels.dispatch import Implementation
from pallas_kernels.gated_norm import bench as norm_bench
from pallas_kernels.kda import api, bench, bench_peers, bench_step, reference
from pallas_kernels.short_conv import bench as conv_bench
from scripts import bench as script


def test_bytes_and_operations_of_one_token_and_head():
    case = next(iter(bench.CASES.values()))
    token_heads = case.batch * case.time * case.heads
    forward, both = (bench.work(case, both=both) for both in (False, True))
    assert forward.moved_bytes / token_heads == 5 * 128 * 2  # q, k, v, g in, o out
    assert both.moved_bytes / token_heads == 14 * 128 * 2  # again q, k, v, g and do in, dq, dk, dv, dg out
    assert both.operations == 3 * forward.operations


def test_a_wrong_result_and_a_missing_peer_get_no_time(monkeypatch):
    def wrong(*args, **kwargs):
        o, state = reference.chunk_kda(*args, **kwargs)
        return o, state * 1.02

    case = dataclasses.replace(
        next(iter(bench.CASES.values())), time=64, heads=1, value_heads=1, key_dim=16, value_dim=16
    )
    monkeypatch.setattr(api, "IMPLEMENTATIONS", {"wrong": Implementation(wrong)} | api.IMPLEMENTATIONS)
    monkeypatch.setitem(sys.modules, "torch", None)
    rows = list(bench.measure(case, ("wrong",), ("fla",)))
    ours, peer = rows
    assert ours.ms is None and ours.note.startswith("WRONG, so no time: error ratio of final_state")
    assert peer.ms is None and "torch" in peer.note
    assert "WRONG" in timing.table(rows, "another GPU")


def test_ratios_are_to_our_fastest_of_the_same_call():
    work = timing.Work(moved_bytes=2_940_000_000, operations=10**12)
    rows = [
        timing.Row("a", "forward", "slow", True, work, ms=4.0, compiled_gb=1.5),
        timing.Row("a", "forward", "fast", True, work, ms=2.0),
        timing.Row("a", "forward", "peer", False, work, ms=1.0),
        timing.Row("a", "backward", "slow", True, work, ms=9.0),
    ]
    slow, fast, peer, backward = timing.table(rows, "NVIDIA H100 80GB HBM3").splitlines()[2:]
    assert slow == "| a | forward | slow | 4.000 | 2.00 | 735 | 250.0 | 25% | 1.50 |  |"
    assert "| 2.000 | 1.00 | 1470 | 500.0 | 50% |" in fast
    assert "| 1.000 | 0.50 |" in peer and "| 9.000 | 1.00 |" in backward


def test_fla_reads_the_fixed_settings_unless_told_otherwise(monkeypatch, capsys):
    monkeypatch.setattr(peers, "write_fla_settings", peers.write_fla_settings.__wrapped__)
    monkeypatch.setattr(os, "environ", {"FLA_CACHE_MODE": "disabled"})
    peers.pin_fla(bench_peers.FLA_SETTINGS)
    assert os.environ == {"FLA_CACHE_MODE": "disabled"} and not capsys.readouterr().err
    monkeypatch.setattr(os, "environ", {})
    peers.pin_fla(bench_peers.FLA_SETTINGS)
    files = list(Path(os.environ["FLA_CONFIG_DIR"]).iterdir())
    assert {file.stem for file in files} == set(bench_peers.FLA_SETTINGS)
    assert all({"kwargs", "num_warps", "num_stages"} <= set(json.loads(f.read_text())["default_config"]) for f in files)
    assert "FLA_CACHE_MODE=disabled" in capsys.readouterr().err


TINY = {
    conv_bench: conv_bench.Case("tiny", 1, 16, 128, packed=True),
    norm_bench: norm_bench.Case("tiny", 1, 16, 2, 64),
    bench_step: bench_step.Case("tiny", 1),
}


@pytest.mark.parametrize("module", TINY, ids=lambda module: module.__name__.removeprefix("pallas_kernels."))
def test_repeated_calls_are_checked_and_a_missing_peer_is_said(module, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(timing, "QUEUED_MS", 1)
    plain = "xla" if "xla" in module.IMPLEMENTATIONS else "reference"
    rows = list(module.measure(TINY[module], (plain,), module.PEERS))
    ours, others = [row for row in rows if row.ours], [row for row in rows if not row.ours]
    assert ours and all(row.ms > 0 for row in ours), [row.note for row in ours]
    assert others and all("torch" in row.note for row in others)
    monkeypatch.setattr(module, "TOLERANCE", dict.fromkeys(module.TOLERANCE, -1.0))
    assert all("WRONG" in row.note for row in module.measure(TINY[module], (plain,), ()))


@pytest.mark.parametrize("command", script.COMMANDS)
def test_unknown_names_and_a_missing_gpu_are_said_in_one_line(command, monkeypatch, capsys):
    for arguments, expected in ((["--cases", "T1-H1"], "--cases='T1-H1' matches none of"), ([], "needs an NVIDIA GPU")):
        monkeypatch.setattr(sys, "argv", ["bench.py", command, *arguments])
        monkeypatch.setattr(script.jax, "default_backend", lambda: "cpu")
        with pytest.raises(SystemExit) as stopped:
            script.main()
        assert stopped.value.code == 2
        assert expected in capsys.readouterr().err


def test_a_whole_name_beats_a_part_of_others():
    assert script.chosen(("mosaic",), ["mosaic", "mosaic_2"], "--implementations") == ["mosaic"]
    assert script.chosen(("mos",), ["mosaic", "mosaic_2"], "--implementations") == ["mosaic", "mosaic_2"]
