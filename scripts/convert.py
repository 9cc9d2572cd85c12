"""Converts checkpoints: python scripts/convert.py to-hf RUN OUT_DIR."""

import argparse
import re
import signal
import sys
from pathlib import Path

from kimi_jax.errors import exit_on_user_error
from kimi_jax.interop.hf_export import export_run

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def byte_size(text: str) -> int:
    """Parses 5GB, 500MB, 20KB or a number of bytes."""
    match = re.fullmatch(r"(\d+)([KMG]B)?", text.upper())
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"got {text!r}, must be like 5GB, 500MB or a number of bytes")
    return int(match[1]) * UNITS[match[2] or ""]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Convert checkpoints.")
    commands = parser.add_subparsers(required=True)
    to_hf = commands.add_parser("to-hf", help="write a run as a directory that transformers and vLLM load")
    to_hf.add_argument("run", metavar="RUN", help="a run directory")
    to_hf.add_argument("out_dir", metavar="OUT_DIR", help="the new directory")
    to_hf.add_argument("--step", type=int, help="of the run's checkpoint (default: the newest)")
    to_hf.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the dtype that the model computes in")
    to_hf.add_argument("--shard-size", type=byte_size, default="5GB", help="of one file (default: %(default)s)")
    to_hf.set_defaults(run_command=convert_to_hf)
    return parser.parse_args()


def convert_to_hf(arguments: argparse.Namespace) -> None:
    """Exports and says what was written."""
    out_dir = export_run(
        arguments.run,
        arguments.out_dir,
        step=arguments.step,
        dtype=arguments.dtype,
        shard_bytes=arguments.shard_size,
    )
    for file in sorted(Path(out_dir).iterdir()):
        print(f"{file.stat().st_size:>15,} bytes  {file}")


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a half-written directory is removed
    arguments = parse_arguments()
    arguments.run_command(arguments)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
