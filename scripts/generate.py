"""Continues text with a trained model: python scripts/generate.py --checkpoint DIR --prompt TEXT."""

import argparse
import signal
import sys
import time

from kimi_jax.errors import exit_on_user_error
from kimi_jax.generate.api import Generator, Settings, load_generator


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Continue text with a trained model.")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a run, or an exported directory")
    parser.add_argument("--prompt", required=True, action="append", metavar="TEXT", help="repeat it for a batch")
    parser.add_argument("--step", type=int, help="of a run's checkpoint (default: the newest)")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, help="default: %(default)s")
    parser.add_argument("--top-k", type=int, help="default: all tokens")
    parser.add_argument("--seed", type=int, default=0, help="prompt i of a batch takes seed + i (default: %(default)s)")
    parser.add_argument("--no-stream", action="store_true", help="print each text when it is whole, as for a batch")
    return parser.parse_args()


def report(message: str) -> None:
    """Prints beside the text, so that a pipe gets the text alone."""
    print(message, file=sys.stderr)


def stream(generator: Generator, prompt: str, settings: Settings) -> None:
    """Prints a prompt and what follows it as it comes."""
    print(prompt, end="", flush=True)
    start = first = time.perf_counter()
    for count, piece in enumerate(generator.stream(prompt, settings)):
        first = time.perf_counter() if count == 0 else first
        print(piece, end="", flush=True)
    print()
    rate = (count - 1) / max(time.perf_counter() - first, 1e-9)  # the last piece holds no token
    report(f"{count} tokens; the first after {first - start:.2f} s, then {max(rate, 0):.1f} tokens/s")


def print_batch(generator: Generator, prompts: list[str], settings: Settings) -> None:
    """Prints prompts and what follows them, one after the other."""
    batch = generator.generate(prompts, settings)
    for prompt, completion in zip(prompts, batch.completions, strict=True):
        print(prompt + completion.text)
        report(f"{len(completion.token_ids)} tokens, ended by {completion.ended_by}")
    report(f"the first tokens after {batch.prefill_s:.2f} s, then {batch.tokens_per_s:.1f} tokens/s over all prompts")


def main() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the script without a traceback
    arguments = parse_arguments()
    settings = Settings(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        seed=arguments.seed,
    )
    generator = load_generator(arguments.checkpoint, step=arguments.step)
    if arguments.no_stream or len(arguments.prompt) > 1:
        print_batch(generator, arguments.prompt, settings)
    else:
        stream(generator, arguments.prompt[0], settings)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
