"""Says what a run will need before anything is rented: memory per GPU, traffic, step time, and which meshes fit.

python scripts/plan.py CONFIG.yaml [a.b=c ...] --hardware 64xh100 [--mesh data=8,fsdp=8] [--no-compile]
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs here

from kimi_jax.config.load import load
from kimi_jax.config.train import RunConfig
from kimi_jax.errors import exit_on_user_error


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Plan a training run: memory, traffic, time, meshes.")
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="replaces one value of the config")
    parser.add_argument("--hardware", required=True, metavar="NxKIND", help="number and kind of GPUs, as 64xh100")
    parser.add_argument(
        "--mesh", metavar="AXIS=N,...", help="as data=8,fsdp=8 (default: the config's, or one that fits)"
    )
    parser.add_argument("--no-compile", action="store_true", help="count only, in seconds: no activations, no peak")
    return parser.parse_intermixed_args()


def main() -> None:
    arguments = parse_arguments()
    from kimi_jax.experiments.plan_hardware import read_hardware
    from kimi_jax.experiments.plan_run import parse_mesh, plan

    hardware = read_hardware(arguments.hardware)
    mesh = parse_mesh(arguments.mesh) if arguments.mesh else None
    cfg = load(arguments.config, arguments.overrides, RunConfig)
    print(plan(cfg, hardware, mesh, compiled=not arguments.no_compile))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
