"""Converts checkpoints and compares them: python scripts/convert.py to-hf | from-hf | verify | plan."""

import argparse
import re
import sys
from pathlib import Path

from kimi_jax.errors import exit_on_user_error
from kimi_jax.train.signals import exit_on_sigterm

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def byte_size(text: str) -> int:
    """Parses 5GB, 500MB, 20KB or a number of bytes."""
    match = re.fullmatch(r"(\d+)([KMG]B)?", text.upper())
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"got {text!r}, must be like 5GB, 500MB or a number of bytes")
    return int(match[1]) * UNITS[match[2] or ""]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Convert and compare checkpoints.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add = lambda name, run, text: _add(commands, name, run, text)

    to_hf = add("to-hf", convert_to_hf, "write a checkpoint as a directory that transformers loads")
    to_hf.add_argument("run", metavar="RUN", help="a run directory or an imported one")
    to_hf.add_argument("out_dir", metavar="OUT_DIR", help="the new directory")
    to_hf.add_argument("--step", type=int, help="of the run's checkpoint (default: the newest)")
    to_hf.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the dtype that the model computes in")
    to_hf.add_argument("--shard-size", type=byte_size, default="5GB", help="of one file (default: %(default)s)")

    from_hf = add("from-hf", convert_from_hf, "write a public checkpoint as a directory that train.init_from takes")
    from_hf.add_argument("hf_dir", metavar="HF_DIR", help="config.json, safetensors, tokenizer")
    from_hf.add_argument("out_dir", metavar="OUT_DIR", help="the new directory")

    verify = add("verify", verify_checkpoints, "compare the models and tensors of two directories; exit code 1: differ")
    verify.add_argument("a", metavar="DIR_A", help="a run, an imported or a public directory")
    verify.add_argument("b", metavar="DIR_B", help="likewise")
    verify.add_argument("--logits", action="store_true", help="also run random tokens through both, in float32")

    plan = add("plan", plan_loading, "print what loading a public checkpoint onto GPUs needs; only headers are read")
    plan.add_argument("hf_dir", metavar="HF_DIR", help="config.json, and safetensors or at least their headers")
    plan.add_argument("--devices", type=int, nargs="+", default=(1, 2, 8), metavar="N", help="default: 1 2 8")
    plan.add_argument("--memory-gb", type=float, default=80.0, metavar="GB", help="of a device (default: %(default)s)")
    plan.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="default: %(default)s")
    return parser.parse_args()


def _add(commands, name: str, run, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.set_defaults(run_command=run)
    return parser


def convert_to_hf(arguments: argparse.Namespace) -> int:
    """Exports and says what was written."""
    from kimi_jax.interop.hf_export import export_run

    out_dir = export_run(
        arguments.run,
        arguments.out_dir,
        step=arguments.step,
        dtype=arguments.dtype,
        shard_bytes=arguments.shard_size,
    )
    _list_entries(out_dir)
    return 0


def convert_from_hf(arguments: argparse.Namespace) -> int:
    """Imports and says what was written."""
    from kimi_jax.interop.imported import import_directory

    out_dir = import_directory(arguments.hf_dir, arguments.out_dir)
    _list_entries(out_dir)
    print(f"to train from it: base: {out_dir}/model.yaml and train.init_from: {out_dir}")
    return 0


def verify_checkpoints(arguments: argparse.Namespace) -> int:
    """Prints every difference, or that there is none."""
    from kimi_jax.interop.verify import compare_checkpoints

    comparison = compare_checkpoints(arguments.a, arguments.b)
    print(comparison.report())
    if arguments.logits:
        from kimi_jax.generate.compare import compare_logits

        print(compare_logits(arguments.a, arguments.b).report())
    return 0 if comparison.equal else 1


def plan_loading(arguments: argparse.Namespace) -> int:
    """Prints a table."""
    from kimi_jax.interop.load_plan import plan_table

    print(plan_table(Path(arguments.hf_dir), arguments.devices, arguments.memory_gb * 10**9, arguments.dtype))
    return 0


def _list_entries(folder: Path) -> None:
    for entry in sorted(folder.iterdir()):
        files = [entry] if entry.is_file() else [file for file in entry.rglob("*") if file.is_file()]
        print(f"{sum(file.stat().st_size for file in files):>15,} bytes  {entry}")


def main() -> int:
    arguments = parse_arguments()
    return arguments.run_command(arguments)


if __name__ == "__main__":
    with exit_on_user_error(), exit_on_sigterm():
        sys.exit(main())
