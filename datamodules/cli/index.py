"""Write the shards.json that training needs, for shards from other programs.

    kosmosg data index laion
    kosmosg data index 'read-only/{00000..01241}.tar' --output cc12m.json
    kosmosg data index 's3://bucket/laion/*.tar' --output laion.json

It lists how many samples each shard holds. SHARDS is a folder, a path, a glob, a brace list or a URL. Counts come from
img2dataset's NNNNN_stats.json; tars without it are scanned, for which shards in an object store are downloaded once.
Resumable: shards listed with the same name and size are not counted again. Unreadable shards are reported and not
listed, and the exit status is 1. fsspec takes a store's credentials and options from the environment.
"""

import argparse
import os
import sys
from collections import defaultdict
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", metavar="SHARDS", help="folder, path, glob, brace list or URL of tars")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write whole paths or URLs to this file; "
                        "default: shards.json in the folder of the tars")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    from concurrent.futures import ThreadPoolExecutor

    from rich.console import Console
    from rich.progress import track

    from datamodules.errors import ShardError, printable
    from datamodules.remote import RemoteConfig
    from datamodules.shards import (
        LISTING,
        ListingError,
        find_listed,
        index_shard,
        read_listing,
        save_listing,
        write_listing,
    )

    pattern, output = arguments.shards, arguments.output
    if output is not None and output.suffix != ".json":
        raise ValueError(f"--output is '{output}'; allowed: a file that ends in .json")
    store, urls = find_shards(pattern)
    if store is not None and output is None:
        raise ValueError(f"'{pattern}' is in an object store, which is only read; set --output FILE.json")
    unfinished = [output.with_name(f"{output.name}.unfinished")] if output else []
    listings = {output} if output else {Path(url).parent / LISTING for url in urls}
    known: dict[str, dict] = {}
    for listing in (*unfinished, *sorted(listings)):
        folder = listing.parent if listing.exists() else next(one for one in listing.parents if one.exists())
        if not os.access(folder, os.W_OK):
            raise ValueError(f"'{folder}' is not writable; set --output FILE.json in a writable folder")
        try:
            listed = read_listing(str(listing)) if listing.exists() else []
        except ListingError as error:
            damaged = listing.replace(listing.with_name(f"{listing.name}.damaged"))
            print(printable(f"moved to '{damaged}' and written again: {error}"), file=sys.stderr)
            continue
        known |= {str(listing.parent / one["name"]) if output is None else one["name"]: one for one in listed}
    replaced = {str(path.absolute()) for path in find_listed(pattern)} if output is None else set()
    records: dict[str, dict] = {}
    failed: dict[str, Exception] = {}

    def index(url: str) -> None:
        try:
            records[url] = index_shard(url, store, known.get(url))
        except (ShardError, OSError) as error:
            failed[url] = error

    def save(complete: bool) -> None:
        counted = sorted(records.items())
        if output is not None:
            save_listing(output if complete else unfinished[0], [record | {"name": url} for url, record in counted])
            return
        by_folder = defaultdict(list)
        for url, record in counted:
            by_folder[Path(url).parent].append(record)
        for listing in listings:
            folder = listing.parent
            write_listing(folder, by_folder[folder], lambda name: complete and str(folder / name) in replaced)  # noqa: B023

    pool = ThreadPoolExecutor(RemoteConfig().connections)
    try:
        for _ in track(pool.map(index, urls), "shards", len(urls), console=Console(stderr=True)):
            pass
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        save(complete=False)  # so that shards counted before an interrupt need not be counted again
        raise
    if not records:
        raise next(iter(failed.values()))
    save(complete=True)
    for listing in unfinished:
        listing.unlink(missing_ok=True)
    for url, error in sorted(failed.items()):
        print(printable(f"not listed: {url}: {error}"), file=sys.stderr)
    samples = sum(record["samples"] for record in records.values())
    print(f"{samples:,} samples in {len(records):,} shard(s), listed in {', '.join(sorted(map(str, listings)))}")
    return 1 if failed else 0


def find_shards(pattern: str) -> tuple:
    """Return the store of a pattern (None if it is local) and the paths or URLs of its shards.

    Raises:
        ShardError: no shard matches, or the protocol is not that of a store.
    """
    from webdataset.shardlists import expand_urls

    from datamodules.errors import ShardError
    from datamodules.remote import STORES, RemoteConfig
    from datamodules.shards import SCHEME, find_tars, open_store

    scheme = SCHEME.match(pattern)
    store = open_store(pattern, RemoteConfig([scheme[1]] if scheme and scheme[1] in STORES else []))
    if store is None:
        return None, [str(path.absolute()) for path in find_tars(pattern)]
    urls = set()
    for url in expand_urls(pattern):
        if url.partition("?")[0].endswith(".tar") and "*" not in url:
            urls.add(url)
            continue
        # Some stores list names without the protocol.
        names = store.filesystem.glob(url if "*" in url else f"{url.rstrip('/')}/*.tar")
        urls |= {name if SCHEME.match(name) else f"{store.protocol}://{name.lstrip('/')}" for name in names}
    if not urls:
        raise ShardError(f"no shard at '{pattern}'")
    return store, sorted(urls)
