"""Tokenises and packs text, JSONL and Parquet into the records that training reads: see docs/data.md."""

import argparse
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from kimi_jax.errors import UserError, exit_on_user_error, plain_interrupts
from kimi_jax.train.signals import exit_on_sigterm

with plain_interrupts():  # these take seconds
    from kimi_jax.data import sources
    from kimi_jax.data.prepare import TRAIN, VALIDATION, Plan, prepare
    from kimi_jax.data.records import Manifest
    from kimi_jax.data.tokenizers import load_tokenizer


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="text, .jsonl or .parquet files, or folders of them")
    parser.add_argument("--tokenizer", required=True, help="'bytes', a tokenizer.json, or a tiktoken.model (Kimi)")
    parser.add_argument("--seq-len", type=int, required=True, help="tokens per training example")
    parser.add_argument("--output", type=Path, required=True, help="new folder, for train/ and validation/")
    parser.add_argument("--text-field", default="text", help="JSONL field or Parquet column (default: %(default)s)")
    parser.add_argument("--validation-percent", type=float, default=0.0, help="documents held out (default: none)")
    parser.add_argument("--seed", type=int, default=0, help="another seed holds out other documents")
    return parser.parse_args()


def show(manifests: dict[str, Manifest], output: Path, console: Console) -> None:
    """Prints what was written, and the config section that reads it."""
    table = Table("", title=str(output))
    for split in manifests:
        table.add_column(split, justify="right")
    rows: dict[str, Callable[[Manifest], str]] = {
        "documents": lambda m: f"{m.documents:,}",
        "empty documents, left out": lambda m: f"{m.empty_documents:,}",
        "bytes of text": lambda m: f"{m.bytes:,}",
        "tokens": lambda m: f"{m.tokens:,}",
        "bytes per token": lambda m: f"{m.bytes / m.tokens:.2f}",
        "records": lambda m: f"{m.records:,}",
        "bytes on disk": lambda m: f"{sum(part.bytes for part in m.parts):,}",
    }
    for name, cell in rows.items():
        table.add_row(name, *map(cell, manifests.values()))
    console.print(table)
    entry = manifests[TRAIN].tokenizer
    validation = f", validation: {output / VALIDATION}" if VALIDATION in manifests else ""
    console.print(f"tokenizer: {entry.kind}, vocab_size {entry.vocab_size:,}, hash {entry.fingerprint[:12]}")
    section = f"data: {{kind: records, seq_len: {manifests[TRAIN].seq_len}, train: {output / TRAIN}{validation}}}"
    console.print(section, soft_wrap=True, markup=False, highlight=False)


def main() -> None:
    args = parse_args()
    plan = Plan(args.seq_len, args.validation_percent, args.seed)
    tokenizer = load_tokenizer(args.tokenizer)
    files = sources.find_files(args.inputs)
    documents = sources.read_documents(files, text_field=args.text_field)
    console = Console()
    columns = (
        TextColumn("tokenise and pack"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("", total=sum(file.size for file in files))
            manifests = prepare(
                documents,
                tokenizer,
                plan,
                args.output,
                source=" ".join(args.inputs),
                advance=lambda input_bytes: progress.advance(task, input_bytes),
            )
    except FileExistsError as error:
        raise UserError(f"output {args.output}: exists already; name a new folder, or remove it") from error
    except OSError as error:
        raise UserError(f"{error.filename or args.output}: {error.strerror or error}") from error
    show(manifests, args.output, console)


if __name__ == "__main__":
    with exit_on_user_error(), exit_on_sigterm():
        main()
