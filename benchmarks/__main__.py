"""Measure: python -m benchmarks {stage1|stage2|stage3|sampling|loader|evaluation|processes|all} [form] [key=value …]

    python -m benchmarks stage2                        # the CPU size: about a minute
    python -m benchmarks stage3 size=gpu --json        # full size on a GPU
    python -m benchmarks all --write                   # all but the loader's, into the tables of docs/performance.md

Forms: --json, --markdown, --write; tables for the terminal without one. `size=cpu|gpu|tiny` names the file of
benchmarks/sizes/ that the rest is laid over. In the JSON, `ratio` (median, low, high) says how many times faster than
the released way the project's default is, and `levers` what each does alone.
"""

import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# Read at import: libraries that talk about themselves between our tables.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from benchmarks.report import markdown, print_result, with_section
from kosmosg.config import ConfigError

BENCHMARKS = ("stage1", "stage2", "stage3", "sampling", "loader", "evaluation", "processes")
ALL = tuple(name for name in BENCHMARKS if name != "loader")
FORMS = ("--json", "--markdown", "--write")
PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 measured, 2 a mistake in the arguments."""
    rest = [argument for argument in arguments if argument not in FORMS]
    if not rest or rest[0] not in (*BENCHMARKS, "all"):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        for name in ALL if rest[0] == "all" else rest[:1]:
            # Read when asked for: the loader's benchmark needs what the others do not.
            module = importlib.import_module(f"benchmarks.{name}")
            result, as_markdown = module.measure(rest[1:]), getattr(module, "markdown", markdown)
            if "--json" in arguments:
                print(json.dumps(result), flush=True)
            elif "--markdown" in arguments:
                print(as_markdown(result), flush=True)
            elif "--write" in arguments:
                PAGE.write_text(with_section(PAGE.read_text(), f"{name} {result['size']}", as_markdown(result)))
                print(f"{name} is in '{PAGE}'.", flush=True)
            else:
                getattr(module, "print_result", print_result)(result)
    except ConfigError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
