"""The first run: train the small hybrid, compare it with bigrams of the same bytes, let it write, export it."""

import statistics
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from kimi_jax.config.load import load
from kimi_jax.config.train import RunConfig
from kimi_jax.data.entropy import evaluated_runs, order1_bits_per_byte
from kimi_jax.data.pipeline import build_dataset
from kimi_jax.errors import UserError
from kimi_jax.generate.api import Settings, load_generator
from kimi_jax.interop.hf_export import export_run
from kimi_jax.train.loop import Result, train
from kimi_jax.train.metrics import read_metrics

PROMPT = "import "
SAMPLE = Settings(max_new_tokens=250, temperature=0.7, top_p=0.95, seed=1)
MARGIN = 0.2  # the model must need this share fewer bits per byte than the bigram table


@dataclass(frozen=True)
class Outcome:
    """What the quickstart shows at its end."""

    result: Result
    model_bits: float
    """Bits per byte of the model on the validation batches."""
    bigram_bits: float
    """Order-1 entropy of the very bytes that `model_bits` covers."""
    tokens_per_s: float
    sample: str
    export: Path

    @property
    def beats_bigrams(self) -> bool:
        return self.model_bits <= (1 - MARGIN) * self.bigram_bits


def run(config: Path, run_dir: Path) -> int:
    """Trains, or goes on with, the run; prints the table when it is finished.

    Returns:
      Exit code: 0; 1 if the model does not beat the bigram table by `MARGIN`; 128 + signal if it was stopped.

    Raises:
      UserError: the config or the run directory is unusable.
    """
    cfg = load(config, [], RunConfig)
    result = train(cfg, run_dir)
    if not result.finished:
        return result.exit_code
    outcome = _finish(cfg, result)
    _show(outcome, Console())
    return 0 if outcome.beats_bigrams else 1


def _finish(cfg: RunConfig, result: Result) -> Outcome:
    export = result.run_dir.path / f"export-{result.step}"
    if not export.exists():
        export_run(result.run_dir.path, export)
    batches = build_dataset(cfg.data, batch_size=cfg.train.batch_size).validation_batches(cfg.train.validation.batches)
    generator = load_generator(export)
    records = read_metrics(result.run_dir.metrics)
    rates = [record["tokens_per_s"] for record in records if record.get("tokens_per_s")]
    return Outcome(
        result=result,
        model_bits=_last_validation(records),
        bigram_bits=order1_bits_per_byte(evaluated_runs(batches, generator.tokenizer)),
        tokens_per_s=statistics.median(rates or [0.0]),
        sample=PROMPT + "".join(generator.stream(PROMPT, SAMPLE)),
        export=export,
    )


def _last_validation(records: list[dict]) -> float:
    for record in reversed(records):
        if "validation_bits_per_byte" in record:
            return record["validation_bits_per_byte"]
    raise UserError("quickstart: metrics.jsonl has no validation; remove the run directory and start again")


def _show(outcome: Outcome, console: Console) -> None:
    run_dir, gain = outcome.result.run_dir, 1 - outcome.model_bits / outcome.bigram_bits
    verdict = f"{gain:.0%} fewer" + ("" if outcome.beats_bigrams else f"; [red]should be {MARGIN:.0%} at least[/red]")
    table = Table(title="Kimi Linear quickstart", show_header=False, title_justify="left")
    table.add_row("validation", f"[bold]{outcome.model_bits:.3f}[/bold] bits per byte")
    table.add_row(
        "bigram entropy of the same bytes", f"{outcome.bigram_bits:.3f} bits per byte; the model needs {verdict}"
    )
    table.add_row("parameters", f"{outcome.result.num_params:,}")
    table.add_row("training", f"{outcome.result.step} steps, {outcome.tokens_per_s:,.0f} tokens/s (median)")
    table.add_row("loss curve", escape(str(run_dir.loss_plot)))
    table.add_row("checkpoint", escape(str(run_dir.checkpoints)))
    table.add_row("export (safetensors)", escape(str(outcome.export)))
    console.print(Panel(escape(outcome.sample), title=f"sample after {PROMPT!r}", title_align="left"))
    console.print(table)
