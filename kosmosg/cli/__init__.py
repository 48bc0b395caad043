"""kosmosg COMMAND …: the commands for users of the model. Training and evaluation are train.py and evaluate.py.

A command is a module with `add_arguments(parser)` and `run(arguments) -> int`. It imports what it needs inside `run`,
for `--help` answers at once and torch takes seconds. Other packages add commands by an entry point in the group
`kosmosg.commands`, whose name is the command's and whose value is such a module.
"""

import argparse
import importlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from types import ModuleType

COMMANDS = {
    "convert": "kosmosg.cli.convert",
    "export": "kosmosg.cli.export",
    "generate": "kosmosg.cli.generate",
    "inspect": "kosmosg.cli.inspect",
}
COMMAND_GROUP = "kosmosg.commands"
MISTAKE, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 a mistake, told on stderr, 130 interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be bytes that are no text
    arguments = build_parser().parse_args(argv)
    # Read when the libraries are imported; our own loaders report weights themselves.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    try:
        return arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"kosmosg: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("kosmosg: interrupted.", file=sys.stderr)
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """One subcommand for each command; the first line of a module's docstring is its help."""
    parser = argparse.ArgumentParser(prog="kosmosg", description="KOSMOS-G: images and text as a prompt.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module in command_modules():
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


def command_modules() -> Iterator[tuple[str, ModuleType]]:
    """Our commands, then those that installed packages add, each by name."""
    yield from ((name, importlib.import_module(module)) for name, module in COMMANDS.items())
    added = {entry.name: entry for entry in entry_points(group=COMMAND_GROUP) if entry.name not in COMMANDS}
    yield from ((name, added[name].load()) for name in sorted(added))
