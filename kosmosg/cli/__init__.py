"""kosmosg COMMAND …: the commands for users of the model. Training and evaluation are train.py and evaluate.py.

A command is a module with `add_arguments(parser)` and `run(arguments) -> int`. It imports what it needs inside `run`,
for `--help` answers at once and torch takes seconds. Commands of other rooms are found in a clone of the repository;
where the package is installed by itself, they say so.
"""

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

COMMANDS = {
    "app": "kosmosg.cli.app",
    "convert": "kosmosg.cli.convert",
    "export": "kosmosg.cli.export",
    "generate": "kosmosg.cli.generate",
    "inspect": "kosmosg.cli.inspect",
    "push": "kosmosg.cli.push",
    "data": "datamodules.cli",
}
MISTAKE, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 a mistake, told on stderr, 130 interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be bytes that are no text
    # Read when the libraries are imported; our own loaders report weights themselves.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    try:
        arguments = build_parser().parse_args(argv)
        status = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, such as `head`, has exited; the rest of the output is discarded
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"kosmosg: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("kosmosg: interrupted.", file=sys.stderr)
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """One subcommand for each command; the first line of a module's docstring is its help."""
    parser = argparse.ArgumentParser(prog="kosmosg", description="KOSMOS-G: images from prompts with text and images.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, path in COMMANDS.items():
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError as error:
            if path.startswith("kosmosg.") or error.name not in (path, path.partition(".")[0]):
                raise
            _add_command_of_clone(commands, name)
            continue
        text = module.__doc__ or ""
        command = commands.add_parser(
            name,
            help=text.partition("\n")[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _add_command_of_clone(commands: Any, name: str) -> None:
    def refuse(_: argparse.Namespace) -> int:
        raise ValueError(
            f"'{name}' is run from a clone of the repository (there: pip install -e .); "
            "the installed package holds the model alone."
        )

    # No character begins an option, so everything that follows the name is taken and answered alike.
    command = commands.add_parser(name, help="only in a clone of the repository", add_help=False, prefix_chars="\0")
    command.add_argument("arguments", nargs="*")
    command.set_defaults(run=refuse)
