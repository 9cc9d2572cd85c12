"""Trains a small Kimi Linear hybrid on real text, samples from it and exports it: make quickstart."""

import argparse
import sys
from pathlib import Path

from kimi_jax.errors import exit_on_user_error, plain_interrupts

ROOT = Path(__file__).parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a small Kimi Linear hybrid on real text, in minutes.")
    parser.add_argument("--config", type=Path, default=ROOT / "experiments" / "quickstart.yaml")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/quickstart"))
    arguments = parser.parse_args()

    with plain_interrupts():
        from kimi_jax.experiments.quickstart import run  # imports jax, which takes a second

    return run(arguments.config, arguments.run_dir)


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main())
