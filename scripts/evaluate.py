"""Runs benchmarks on a checkpoint: python scripts/evaluate.py --checkpoint DIR --tasks arc_easy,lambada_openai."""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kimi_jax.errors import exit_on_user_error, plain_interrupts, positive

with plain_interrupts():  # these take seconds
    from kimi_jax.generate.evaluate import RESULTS, Evaluation, evaluate
    from kimi_jax.generate.score import BATCH_SIZE
    from kimi_jax.train.programs import keep_programs
    from kimi_jax.train.xla_flags import take_memory


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run tasks of lm-evaluation-harness on a checkpoint.")
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a run, an imported or a public one, with a tokenizer")
    add(
        "--tasks",
        required=True,
        type=lambda text: text.split(","),
        metavar="A,B",
        help="as `lm_eval ls tasks` has them",
    )
    add("--limit", type=positive, metavar="N", help="documents per task (default: all)")
    add("--num-fewshot", type=int, metavar="N", help="examples before each question (default: as the task says)")
    add("--include", type=Path, metavar="DIR", help="task files of your own")
    add("--output", type=Path, metavar="DIR", help=f"where {RESULTS} is written (default: nowhere)")
    add("--step", type=int, help="of a run's checkpoint (default: the newest)")
    add("--dtype", choices=("float32", "bfloat16"), help="compute dtype (default: the model's)")
    add("--batch-size", type=positive, default=BATCH_SIZE, metavar="N", help="rows at a time (default: %(default)s)")
    return parser.parse_args()


def print_evaluation(evaluation: Evaluation) -> None:
    """Prints the figures as a table, and what was saved by running shared beginnings once."""
    table = Table("task", "metric", "value", "standard error")
    for figure in evaluation.figures:
        stderr = "" if figure.stderr is None else f"{figure.stderr:.4f}"
        table.add_row(figure.task, figure.metric, f"{figure.value:.4f}", stderr)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if evaluation.num_requested:
        print(f"{evaluation.num_run:,} tokens run for requests of {evaluation.num_requested:,}")


def main() -> None:
    arguments = parse_arguments()
    take_memory()
    keep_programs()
    print_evaluation(evaluate(**vars(arguments)))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
