"""Write the image URLs of a published set, for img2dataset to download.

    kosmosg data urls mmc4 docs/ urls.parquet
    kosmosg data urls openimages train-images-boxable-with-rotation.csv urls.parquet

OUTPUT has the column `url`, and for Open Images also `md5`. docs/data.md shows how to download them with img2dataset.
"""

import argparse
from pathlib import Path

SETS = ("mmc4", "obelics", "openimages")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("set", metavar="SET", choices=SETS, help=", ".join(SETS))
    parser.add_argument("input", metavar="INPUT", type=Path, help="file or folder, as published")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="Parquet file")


def run(arguments: argparse.Namespace) -> int:
    from datamodules.sources.url_lists import write_url_list

    written, unreadable = write_url_list(arguments.set, arguments.input, arguments.output)
    print(f"{written:,} URLs written to '{arguments.output}'; {unreadable:,} records were unreadable")
    return 0
