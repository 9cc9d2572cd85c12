"""Times kernels on this machine's GPU: python scripts/bench.py kda [--cases NAME,...] [--peers fla,flash_kda]."""

import argparse
import sys

import jax

from kimi_jax.errors import UserError, exit_on_user_error


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time kernels; a case whose result is wrong gets no time.")
    commands = parser.add_subparsers(required=True)
    kda = commands.add_parser("kda", help="Kimi Delta Attention, forward and backward")
    names = {"type": lambda text: tuple(filter(None, text.split(","))), "metavar": "NAME,..."}
    kda.add_argument("--cases", default=(), help="part of a case's name is enough (default: all)", **names)
    kda.add_argument("--peers", default=(), help="fla, flash_kda; must be importable", **names)
    kda.set_defaults(run_command=bench_kda)
    return parser.parse_args()


def gpu_name() -> str:
    """The kind of the first GPU.

    Raises:
      UserError: there is none, so that there is nothing to time.
    """
    if jax.default_backend() != "gpu":
        raise UserError(f"bench needs an NVIDIA GPU and finds only {jax.default_backend()}: nothing was timed")
    return jax.devices()[0].device_kind


def chosen(names: tuple[str, ...], known: list[str], what: str) -> list[str]:
    """Those of `known` that contain one of `names`; all of them for ().

    Raises:
      UserError: a name matches nothing.
    """
    unknown = [name for name in names if not any(name in k for k in known)]
    if unknown:
        raise UserError([f"{what}={name!r} matches none of: {', '.join(known)}" for name in unknown])
    return [k for k in known if not names or any(name in k for name in names)]


def bench_kda(arguments: argparse.Namespace) -> None:
    from pallas_kernels.kda import bench, bench_peers

    cases = bench.bench_cases()
    names = chosen(arguments.cases, list(cases), "--cases")
    peers = chosen(arguments.peers, list(bench_peers.PEERS), "--peers") if arguments.peers else []
    device = gpu_name()
    print(f"{device}, jax {jax.__version__}, median of {bench.REPEATS} x {bench.CALLS} queued calls", file=sys.stderr)
    rows = []
    for name in names:
        for row in bench.measure(cases[name], tuple(peers)):
            print(f"{row.case} {row.name}: {row.forward_ms or row.note}", file=sys.stderr)
            rows.append(row)
    print(bench.table(rows, cases, device))


def main() -> None:
    arguments = parse_arguments()
    with exit_on_user_error():
        arguments.run_command(arguments)


if __name__ == "__main__":
    main()
