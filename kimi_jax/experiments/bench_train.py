"""Compares training steps: ours and the peers' on one configuration, each in a process of its own."""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from kimi_jax.config.load import load, validate
from kimi_jax.config.train import RunConfig
from kimi_jax.config.yaml_files import apply_overrides
from kimi_jax.errors import UserError
from kimi_jax.interop.hf_config import from_public, to_public
from kimi_jax.interop.public_config import json_fields, read_public
from kimi_jax.models.counts import count_flops
from kimi_jax.train.bench import Measurement, Request
from kimi_jax.train.bench_peers import PeerRequest
from kimi_jax.train.devices import model_flops_utilization

PUBLIC_RUN = {  # what a config.json does not say
    "data": {"kind": "records", "train": "unused", "seq_len": 4096},
    "optim": {"kind": "adamw", "peak_lr": 1e-4, "schedule": {"kind": "constant"}, "clip_norm": None},
    "train": {"steps": 1000, "batch_size": 8},
}
NO_GRAPHS = "--xla_gpu_enable_command_buffer="  # in a CUDA graph the profiler cannot tell which instruction a kernel is
COLUMNS = ("step ms", "min", "max", "tokens/s", "MFU", "peak GiB", "compile s", "loss first, last")


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: a measurement, or why there is none."""

    name: str
    cfg: RunConfig
    measured: Measurement | None
    note: str = ""


def read_config(path: Path, overrides: Sequence[str]) -> RunConfig:
    """Reads a run's YAML file, or a config.json of kimi_linear with 8 sequences of 4096 tokens and AdamW around it.

    Raises:
      UserError: the file or an override is not valid.
    """
    if path.suffix != ".json":
        return load(path, overrides, RunConfig)
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no readable JSON file: {error}") from error
    model = from_public(read_public(data, source=str(path))).model_dump(mode="json")
    return validate(apply_overrides({"model": model, **PUBLIC_RUN}, overrides), RunConfig, source=str(path))


def at_length(cfg: RunConfig, length: int) -> RunConfig:
    """The same tokens per step in sequences of another length.

    Raises:
      UserError: the length does not divide the tokens of a step.
    """
    tokens = cfg.train.batch_size * cfg.data.seq_len
    if tokens % length:
        raise UserError(f"--lengths: {length} does not divide the {tokens} tokens of a step")
    data = cfg.model_dump(mode="json")
    data["data"]["seq_len"], data["train"]["batch_size"] = length, tokens // length
    return RunConfig.model_validate(data)


def compare(
    cfgs: Sequence[RunConfig], peers: Sequence[str], *, steps: int, profiled: int, document: int
) -> Iterator[Row]:
    """Measures ours, then each peer, for each configuration; a profiled step of ours runs without CUDA graphs."""
    for cfg in cfgs:
        request = Request(cfg.model_dump(mode="json"), steps=steps, profiled=profiled, document=document)
        yield _measured("kimi_jax", cfg, "kimi_jax.train.bench", request)
        for peer in peers:
            public = to_public(cfg.model, dtype="bfloat16", max_length=cfg.data.seq_len, eos=None, pad=None)
            sizes = {"rows": cfg.train.batch_size, "length": cfg.data.seq_len, "steps": steps}
            yield _measured(peer, cfg, "kimi_jax.train.bench_peers", PeerRequest(peer, json_fields(public), **sizes))


def _measured(name: str, cfg: RunConfig, module: str, request: Request | PeerRequest) -> Row:
    environment = dict(os.environ)
    if getattr(request, "profiled", 0):
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {NO_GRAPHS}"
    text, command = json.dumps(dataclasses.asdict(request)), [sys.executable, "-m", module]
    child = subprocess.run(command, input=text, env=environment, capture_output=True, text=True, check=False)
    if child.returncode:
        reasons = [line for line in child.stderr.splitlines() if line.strip() and not line.startswith(" ")]
        return Row(name, cfg, None, (reasons or ["no message"])[-1][:160])
    return Row(name, cfg, Measurement(**json.loads(child.stdout.splitlines()[-1])))


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [f"| sequence x batch | | {' | '.join(COLUMNS)} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for row in rows:
        shape = f"{row.cfg.data.seq_len} x {row.cfg.train.batch_size}"
        cells = _cells(row.cfg, row.measured) if row.measured else [row.note, *[""] * (len(COLUMNS) - 1)]
        lines.append(f"| {shape} | {row.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(cfg: RunConfig, m: Measurement) -> list[str]:
    median = statistics.median(m.step_ms)
    rate = m.tokens / median * 1e3
    utilization = model_flops_utilization(rate / m.devices, count_flops(cfg.model, cfg.data.seq_len).total, m.device)
    return [
        *(f"{x:.2f}" for x in (median, min(m.step_ms), max(m.step_ms))),
        f"{rate:,.0f}",
        "unknown" if utilization is None else f"{utilization:.1%}",
        "unknown" if m.peak_bytes is None else f"{m.peak_bytes / 2**30:.2f}",
        f"{m.compile_s:.1f}",
        f"{m.losses[0]:.3f}, {m.losses[-1]:.3f}",
    ]
