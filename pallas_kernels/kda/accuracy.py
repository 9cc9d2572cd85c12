"""Prints the error of every value and gradient against float64, case by case: the table in docs/kda.md."""

import argparse

import jax

from pallas_kernels.kda.api import IMPLEMENTATIONS
from pallas_kernels.kda.cases import GRID, Case, exact, make_inputs, run_with_gradients
from pallas_kernels.testing import error_ratio

COLUMNS = ("o", "final_state", "dq", "dk", "dv", "dg", "dbeta", "da_log", "ddt_bias", "dinitial_state")


def errors(case: Case, implementation: str) -> dict[str, float]:
    """Returns the error ratio of each value and gradient of one case."""
    inputs = make_inputs(case)
    want = exact(case, inputs)
    got = jax.jit(run_with_gradients, static_argnums=(0, 2))(case.call, inputs, implementation)
    return {name: error_ratio(got[name], want[name]) for name in want}


def format_row(case: Case, measured: dict[str, float]) -> str:
    """Formats one line of the table; an error beyond the tolerance of its case ends in an exclamation mark."""
    cells = []
    for name in COLUMNS:
        beyond = name in measured and not measured[name] <= case.tolerance[name]
        cells.append(f"{measured[name]:.1e}{'!' * beyond}" if name in measured else "")
    return f"| {case.name} | " + " | ".join(cells) + " |"


def main() -> None:
    """Command line: python -m pallas_kernels.kda.accuracy [--reduced] [--implementation NAME] [--cases TEXT]."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--implementation", default="chunked", choices=IMPLEMENTATIONS)
    parser.add_argument("--reduced", action="store_true", help="fewer tokens and heads, as in the default tests")
    parser.add_argument("--cases", default="", help="only cases whose name contains this text")
    options = parser.parse_args()
    print("| case | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    worst: dict[str, float] = {}
    for case in (case for case in GRID if options.cases in case.name):
        measured = errors(case.reduced() if options.reduced else case, options.implementation)
        print(format_row(case, measured), flush=True)
        worst |= {name: max(error, worst.get(name, 0.0)) for name, error in measured.items()}
    print("| **largest** | " + " | ".join(f"**{worst[name]:.1e}**" if name in worst else "" for name in COLUMNS) + " |")


if __name__ == "__main__":
    main()
