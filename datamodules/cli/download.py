"""Download the images that a published list names.

    kosmosg data download openimages train-images-boxable-with-rotation.csv images user_agent="me@example.org"
    kosmosg data download mmc4 docs/ images host_delay=1
    kosmosg data download urls captions.parquet images column=URL

Lists: mmc4, obelics, openimages (hash-checked), urls (any table with a column of URLs). Settings are YAML files or
key=value; --keys lists them. Started again, it fetches what is missing; FOLDER/failures.jsonl names every dead link.
"""

import argparse
from pathlib import Path

LISTS = ("mmc4", "obelics", "openimages", "urls")
SCHEMAS = {"": "datamodules.sources.download_config:DownloadConfig"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from datamodules.cli.lazy_help import SchemaHelp

    parser.add_argument("layout", metavar="LIST", choices=LISTS, help=", ".join(LISTS))
    parser.add_argument("input", metavar="INPUT", type=Path, help="file or folder, as published")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where the images go")
    parser.add_argument("settings", metavar="SETTING", nargs="*", help="YAML file or key=value")
    parser.add_argument("--json", action="store_true", help="the summary as JSON")
    parser.add_argument("--keys", action=SchemaHelp, schemas=SCHEMAS, help="list the settings")


def run(arguments: argparse.Namespace) -> int:
    import json

    from rich.console import Console

    from datamodules.sources.download import FAILURES, Downloader
    from datamodules.sources.download_config import DownloadConfig
    from datamodules.sources.url_lists import wanted_images
    from kosmosg.config import load_config

    config = load_config(arguments.settings, DownloadConfig)
    images = wanted_images(arguments.layout, arguments.input, config.column)
    done = Downloader(arguments.folder, config, Console(stderr=True)).run(images)
    if arguments.json:
        print(json.dumps(done.summary(), indent=1))
        return 0
    print(
        f"{done.listed:,} listed: {done.fetched:,} fetched ({done.bytes / 1e6:,.1f} MB), {done.there:,} there already"
    )
    if done.known_dead:
        print(f"{done.known_dead:,} known to be dead and not asked for (try_dead_again=true asks again)")
    if done.failed:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in done.failed.most_common())
        print(f"{done.failed.total():,} failed: {reasons}; each is named in '{arguments.folder / FAILURES}'")
    return 0
