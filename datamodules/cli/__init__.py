"""Data sets: convert published sets to shards; list, check and show shards.

    kosmosg data convert instructpix2pix clip-filtered-dataset data/edit
    kosmosg data check 'data/edit/train-*.tar' --sheet edit.png
    kosmosg data show data/edit/train-000000.tar --index 3
    kosmosg data index laion
    kosmosg data urls openimages train-images-boxable-with-rotation.csv urls.parquet

docs/data.md describes the published sets, their settings and the sample schema.
"""

import argparse

from datamodules.cli import check, convert, index, show, urls

COMMANDS = {"convert": convert, "urls": urls, "index": index, "check": check, "show": show}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        text = module.__doc__ or ""
        command = commands.add_parser(
            name,
            help=text.partition("\n")[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(data_command=module.run)


def run(arguments: argparse.Namespace) -> int:
    """Run the chosen command. Raises ValueError if the data or the arguments cannot be used."""
    from datamodules.errors import DataError, SampleError

    try:
        return arguments.data_command(arguments)
    except (DataError, SampleError) as error:
        raise ValueError(str(error)) from error
