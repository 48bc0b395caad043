"""Convert a published set to shards.

    kosmosg data convert text corpus/ data/text column=text
    kosmosg data convert mmc4 docs/ data/mmc4 store=images/ min_similarity=0.24
    kosmosg data convert tsv laion/ data/captions rows=laion images.min_side=384

Settings are YAML files or key=value; later ones override earlier ones. --keys CONVERTER lists them. Resumable: a
restart continues after the last complete shard. OUTPUT/PREFIX.conversion.json records what was dropped, filtered and
skipped, and why.
"""

import argparse
from pathlib import Path
from pkgutil import resolve_name

from datamodules.sources import CONVERTERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("converter", metavar="CONVERTER", choices=CONVERTERS, help=", ".join(CONVERTERS))
    parser.add_argument("input", metavar="INPUT", type=Path, help="file or folder, as published")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder of the shards")
    parser.add_argument("settings", metavar="SETTING", nargs="*", help="YAML file or key=value")
    parser.add_argument("--keys", action=_Keys, choices=CONVERTERS, metavar="CONVERTER", help="list its settings")


class _Keys(argparse.Action):
    """Print the settings of a converter and exit. Only this converter is imported."""

    def __call__(self, parser, namespace, values, option_string=None):
        from kosmosg.config import describe_schema

        print(describe_schema(resolve_name(CONVERTERS[str(values)]).schema), flush=True)
        parser.exit()


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from datamodules.sources.conversion import convert
    from kosmosg.config import load_config

    kind = resolve_name(CONVERTERS[arguments.converter])
    converter = kind(arguments.input, load_config(arguments.settings, kind.schema))
    done = convert(arguments.converter, converter, arguments.output, Console(stderr=True))
    print(f"{done.records:,} records read, {done.samples:,} samples written in {len(done.shards):,} shard(s)")
    if done.examples:
        print(f"{done}; more in '{arguments.output}/{converter.config.prefix}.conversion.json'")
    print(f"written to '{arguments.output}/{converter.config.prefix}-*.tar'")
    return 0
