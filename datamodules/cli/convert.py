"""Convert a published layout to shards.

    kosmosg data convert text corpus/ data/text column=text
    kosmosg data convert mmc4 docs/ data/mmc4 store=images/ min_similarity=0.24
    kosmosg data convert tsv laion/ data/captions rows=laion images.min_side=384

Settings are YAML files or key=value, later wins; --keys LAYOUT lists them. Started again, it goes on at the last
complete shard. OUTPUT/PREFIX.conversion.json tells what was left out, and why.
"""

import argparse
from pathlib import Path

SCHEMAS = {
    "captions": "datamodules.sources.captions:CaptionsConfig",
    "instructpix2pix": "datamodules.sources.instructpix2pix:InstructPix2PixConfig",
    "mmc4": "datamodules.sources.interleaved:Mmc4Config",
    "obelics": "datamodules.sources.interleaved:InterleavedConfig",
    "openimages": "datamodules.sources.openimages:OpenImagesConfig",
    "text": "datamodules.sources.text:TextConfig",
    "tsv": "datamodules.sources.released_tsv:ReleasedTsvConfig",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from datamodules.cli.lazy_help import SchemaHelp

    parser.add_argument("layout", metavar="LAYOUT", choices=SCHEMAS, help=", ".join(SCHEMAS))
    parser.add_argument("input", metavar="INPUT", type=Path, help="file or folder, as published")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder of the shards")
    parser.add_argument("settings", metavar="SETTING", nargs="*", help="YAML file or key=value")
    parser.add_argument("--keys", action=SchemaHelp, schemas=SCHEMAS, metavar="LAYOUT", help="list a layout's settings")


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from datamodules.sources.conversion import convert
    from datamodules.sources.layouts import LAYOUTS
    from kosmosg.config import load_config

    kind = LAYOUTS[arguments.layout]
    layout = kind(arguments.input, load_config(arguments.settings, kind.schema))
    journal = convert(arguments.layout, layout, arguments.output, Console(stderr=True))
    counts = journal.counts
    print(f"{counts['reads']:,} records read, {journal.samples:,} samples written in {len(journal.shards):,} shard(s)")
    told = (("dropped", counts["dropped"]), ("filtered", counts["filtered"]), ("left out of samples", journal.left_out))
    for name, reasons in told:
        if reasons:
            print(f"{name}: " + ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items())))
    print(f"written to '{arguments.output}/{layout.config.prefix}-*.tar'")
    return 0
