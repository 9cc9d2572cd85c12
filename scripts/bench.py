"""Times operators and training steps on this machine's GPU.

python scripts/bench.py kda [--cases NAME,...] [--peers NAME,...]
python scripts/bench.py train --config FILE [a.b=c ...] [--peers NAME,...] [--profile] [--lengths T,...]
"""

import argparse
import importlib
import sys
from pathlib import Path

from kimi_jax.errors import UserError, exit_on_user_error, plain_interrupts

with plain_interrupts():  # these take seconds
    import jax

# A command's module holds CASES (by name), IMPLEMENTATIONS and PEERS (names), and
# measure(case, implementations, peers), which yields rows of pallas_kernels.timing.
COMMANDS = {
    "kda": ("pallas_kernels.kda.bench", "Kimi Delta Attention: forward, and forward with backward"),
    "kda-step": ("pallas_kernels.kda.bench_step", "the decode step of Kimi Delta Attention"),
    "conv": ("pallas_kernels.short_conv.bench", "the short convolution with SiLU: forward, and backward alone"),
    "gated-norm": ("pallas_kernels.gated_norm.bench", "the gated RMS norm: forward, and backward alone"),
    "mla": ("pallas_kernels.mla.bench", "latent attention over whole sequences: forward, and forward with backward"),
    "moe": ("pallas_kernels.grouped_matmul.bench", "grouped products of experts, and rows on their way to them"),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time operators (one whose result is wrong gets no time) and steps.")
    words = lambda text: tuple(filter(None, text.split(",")))
    commands = parser.add_subparsers(required=True, dest="command")
    for name, (_, purpose) in COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=purpose)
        for option, default in (("cases", "all"), ("implementations", "all that accept the case"), ("peers", "none")):
            command.add_argument(
                f"--{option}",
                type=words,
                default=(),
                metavar="NAME,...",
                help=f"parts of names are enough (default: {default})",
            )
        command.set_defaults(run=bench_operator)
    add_train(commands, words)
    return parser.parse_args()


def add_train(commands, words) -> None:
    purpose = "Whole training steps on random tokens: ours, and PyTorch's on the same model"
    train = commands.add_parser("train", help=purpose, description=purpose)
    train.add_argument("--config", type=Path, required=True, metavar="FILE", help="a run's YAML, or config.json")
    train.add_argument("overrides", nargs="*", metavar="a.b=c", help="replaces one value of the config")
    train.add_argument("--peers", type=words, default=(), metavar="NAME,...", help="transformers, fla (default: none)")
    train.add_argument("--steps", type=int, default=20, help="timed steps (default: 20)")
    train.add_argument("--document", type=int, default=0, help="tokens per packed document (default: a row is one)")
    train.add_argument("--profile", action="store_true", help="print our kernels by part of the model")
    lengths = lambda text: tuple(map(int, words(text)))
    train.add_argument(
        "--lengths", type=lengths, default=(), metavar="T,...", help="the step's tokens in such sequences"
    )
    train.set_defaults(run=bench_train)


def gpu_name() -> str:
    """The kind of the first GPU.

    Raises:
      UserError: there is none, so that there is nothing to time.
    """
    if jax.default_backend() != "gpu":
        raise UserError(f"bench needs an NVIDIA GPU and finds only {jax.default_backend()}: nothing was timed")
    return jax.devices()[0].device_kind


def chosen(parts: tuple[str, ...], known: list[str], what: str) -> list[str]:
    """Those of `known` that equal one of `parts`, else contain it; all of them for ().

    Raises:
      UserError: a part matches nothing.
    """
    matches = {part: [k for k in known if k == part] or [k for k in known if part in k] for part in parts}
    unknown = [part for part, found in matches.items() if not found]
    if unknown:
        raise UserError([f"{what}={part!r} matches none of: {', '.join(known)}" for part in unknown])
    return [k for k in known if not parts or any(k in found for found in matches.values())]


def bench_operator(arguments: argparse.Namespace) -> None:
    from pallas_kernels import timing

    operator = importlib.import_module(COMMANDS[arguments.command][0])
    cases = chosen(arguments.cases, list(operator.CASES), "--cases")
    implementations = chosen(arguments.implementations, list(operator.IMPLEMENTATIONS), "--implementations")
    peers = chosen(arguments.peers, list(operator.PEERS), "--peers") if arguments.peers else []
    device = gpu_name()
    print(
        f"{device}, jax {jax.__version__}, median of {timing.REPEATS} queues of {timing.QUEUED_MS} ms", file=sys.stderr
    )
    rows = []
    for case in cases:
        for row in operator.measure(operator.CASES[case], implementations, peers):
            print(f"{row.case} {row.call} {row.name}: {row.ms or row.note}", file=sys.stderr)
            rows.append(row)
    print(timing.table(rows, device))


def bench_train(arguments: argparse.Namespace) -> None:
    """This process leaves the GPU alone: every measurement has one of its own."""
    from kimi_jax.experiments import bench_train as steps
    from kimi_jax.train.bench_peers import PEERS
    from pallas_kernels.kda.bench_peers import FLA_SETTINGS
    from pallas_kernels.peers import pin_fla

    peers = chosen(arguments.peers, list(PEERS), "--peers") if arguments.peers else []
    cfg = steps.read_config(arguments.config, arguments.overrides)
    cfgs = [steps.at_length(cfg, length) for length in arguments.lengths] or [cfg]
    if peers:
        pin_fla(FLA_SETTINGS)
    rows = []
    options = {"profiled": 2 if arguments.profile else 0, "document": arguments.document}
    for row in steps.compare(cfgs, peers, steps=arguments.steps, **options):
        line = steps.table([row]).splitlines()[-1]  # what is cut off later has said this
        print(f"{row.measured.device if row.measured else 'failed'} {line}", file=sys.stderr, flush=True)
        if row.measured and row.measured.profile:
            print(f"{row.measured.profile}\n")
        rows.append(row)
    print(steps.table(rows))


def main() -> None:
    arguments = parse_arguments()
    with exit_on_user_error():
        arguments.run(arguments)


if __name__ == "__main__":
    main()
