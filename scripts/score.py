"""Scores given tokens: python scripts/score.py --checkpoint DIR --tokens TOKENS.npy --logits OUT.npy."""

import argparse
import time
from pathlib import Path

from kimi_jax.errors import exit_on_user_error, plain_interrupts, positive
from kimi_jax.train.signals import exit_on_sigterm

with plain_interrupts():  # these take seconds
    from kimi_jax.generate.score import BATCH_SIZE
    from kimi_jax.generate.score_files import score_files
    from kimi_jax.train.programs import keep_programs
    from kimi_jax.train.xla_flags import take_memory


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write the logits and log-likelihoods of given tokens.")
    add = parser.add_argument
    add("--checkpoint", required=True, type=Path, metavar="DIR", help="a run, an imported or a public one")
    add("--tokens", required=True, type=Path, metavar="NPY", help="int32 [B, T]; -1 is padding, anywhere in a row")
    add("--segment-ids", type=Path, metavar="NPY", help="int32 [B, T]: documents of packed rows, 0 is padding")
    add("--logits", type=Path, metavar="NPY", help="the file for float32 [B, T, vocabulary]: of the token after each")
    add("--log-likelihood", type=Path, metavar="NPY", help="the file for float32 [B, T]: of each token given the past")
    add("--step", type=int, help="of a run's checkpoint (default: the newest)")
    add("--dtype", choices=("float32", "bfloat16"), help="compute dtype (default: the model's)")
    add("--batch-size", type=positive, default=BATCH_SIZE, metavar="N", help="rows at a time (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    take_memory()
    keep_programs()
    start = time.perf_counter()
    num_documents, num_tokens = score_files(**vars(arguments))
    seconds = time.perf_counter() - start
    print(f"{num_tokens:,} tokens of {num_documents:,} documents in {seconds:.1f} s, loading and compiling included")


if __name__ == "__main__":
    with exit_on_user_error(), exit_on_sigterm():
        main()
