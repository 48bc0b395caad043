"""The command line `kosmosg COMMAND …` for users of a model; train.py and evaluate.py train and evaluate.

A command is a module with `add_arguments(parser)` and `run(arguments) -> int`. Heavy imports are inside `run`, so that
`--help` does not wait for torch. Commands of other packages need a clone of the repository.
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
USER_ERROR, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns 0, 2 after an error of the user (printed to stderr), or 130 after an interrupt."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may be bytes that are not valid text
    # The libraries read these at import. Their reports on weights are not needed: kosmosg checks weights itself.
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
        return USER_ERROR
    except KeyboardInterrupt:
        print("kosmosg: interrupted.", file=sys.stderr)
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """Add a subparser per command; the first line of the module's docstring is its help."""
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
            f"'{name}' needs a clone of the repository (there: pip install -e .); the installed package contains only "
            "the model."
        )

    # This prefix never occurs, so all further arguments are positional and ignored.
    command = commands.add_parser(name, help="only in a clone of the repository", add_help=False, prefix_chars="\0")
    command.add_argument("arguments", nargs="*")
    command.set_defaults(run=refuse)
