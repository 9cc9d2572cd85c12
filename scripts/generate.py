"""Continues text with a trained model: python scripts/generate.py --checkpoint DIR --prompt TEXT."""

import argparse
import functools
import signal
import sys
import time
from pathlib import Path

from kimi_jax.errors import exit_on_user_error, plain_interrupts

with plain_interrupts():  # these take seconds
    from kimi_jax.data.chat import encode_chat
    from kimi_jax.data.json_files import read_json_list
    from kimi_jax.generate.api import Generator, Prompt, Settings, load_generator
    from kimi_jax.train.programs import keep_programs
    from kimi_jax.train.xla_flags import take_memory


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Continue text with a trained model.")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a run, an imported or a public one")
    parser.add_argument("--prompt", required=True, action="append", metavar="TEXT", help="repeat it for a batch")
    parser.add_argument("--chat", action="store_true", help="each prompt is a user's turn in Kimi's chat format")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: what the system says first")
    parser.add_argument("--tools", type=Path, metavar="FILE", help="with --chat: a JSON list of function schemas")
    parser.add_argument("--step", type=int, help="of a run's checkpoint (default: the newest)")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, help="default: %(default)s")
    parser.add_argument("--top-k", type=int, help="default: all tokens")
    parser.add_argument("--seed", type=int, default=0, help="prompt i of a batch takes seed + i (default: %(default)s)")
    parser.add_argument("--no-stream", action="store_true", help="print each text when it is whole, as for a batch")
    arguments = parser.parse_args()
    if not arguments.chat and (arguments.system or arguments.tools):
        parser.error("--system and --tools need --chat")
    return arguments


def chat_prompt(generator: Generator, arguments: argparse.Namespace, text: str) -> Prompt:
    """Lays out one user's turn, after the tools and the system's words."""
    system = [{"role": "system", "content": arguments.system}] if arguments.system else []
    tools = read_json_list(arguments.tools) if arguments.tools else ()
    return encode_chat(generator.tokenizer, [*system, {"role": "user", "content": text}], tools)


def report(message: str) -> None:
    """Prints beside the text, so that a pipe gets the text alone."""
    print(message, file=sys.stderr)


def stream(generator: Generator, prompt: Prompt, shown: str, settings: Settings) -> None:
    """Prints what is `shown` of a prompt, and what follows it as it comes."""
    print(shown, end="", flush=True)
    start = first = time.perf_counter()
    for count, piece in enumerate(generator.stream(prompt, settings)):
        first = time.perf_counter() if count == 0 else first
        print(piece, end="", flush=True)
    print()
    rate = (count - 1) / max(time.perf_counter() - first, 1e-9)  # the last piece holds no token
    report(f"{count} tokens; the first after {first - start:.2f} s, then {max(rate, 0):.1f} tokens/s")


def print_batch(generator: Generator, prompts: list[Prompt], shown: list[str], settings: Settings) -> None:
    """Prints what is `shown` of each prompt and what follows it, one after the other."""
    batch = generator.generate(prompts, settings)
    for start, completion in zip(shown, batch.completions, strict=True):
        print(start + completion.text)
        report(f"{len(completion.token_ids)} tokens, ended by {completion.ended_by}")
    report(f"the first tokens after {batch.prefill_s:.2f} s, then {batch.tokens_per_s:.1f} tokens/s over all prompts")


def main() -> None:
    sys.stdout.reconfigure(errors="replace")  # the text may hold what the terminal's encoding does not
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the script without a traceback
    arguments = parse_arguments()
    settings = Settings(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        seed=arguments.seed,
    )
    take_memory()
    keep_programs()
    generator = load_generator(arguments.checkpoint, step=arguments.step)
    encode = functools.partial(chat_prompt, generator, arguments) if arguments.chat else generator.encode
    prompts = [encode(text) for text in arguments.prompt]  # all of them before any is printed
    shown = [""] * len(prompts) if arguments.chat else arguments.prompt
    if arguments.no_stream or len(prompts) > 1:
        print_batch(generator, prompts, shown, settings)
    else:
        stream(generator, prompts[0], shown[0], settings)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
