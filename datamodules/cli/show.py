"""Show one sample of some shards: its members, its words in order and the sizes of its pictures.

    kosmosg data show data/edit/train-000000.tar
    kosmosg data show 'laion/*.tar' --key 000000042 --output sample/

SHARDS is a path, a glob or a brace list. What a sample says is printed with control characters escaped.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", metavar="SHARDS", help="path, glob or brace list of tars")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--index", type=int, default=0, metavar="I", help="number of the sample; default: 0")
    which.add_argument("--key", metavar="K", help="key of the sample; the first that has it")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write its members as files")


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from datamodules.checks.terminal import show_sample
    from datamodules.errors import SampleError
    from datamodules.storage.shards import IndexedShards

    shards = IndexedShards(arguments.shards)
    index = arguments.index if arguments.key is None else find_key(shards, arguments.key)
    if not 0 <= index < len(shards):
        raise ValueError(f"--index is {index}; '{arguments.shards}' has samples 0 … {len(shards) - 1}")
    shard, key, members = shards.read(index)
    try:
        show_sample(Console(), shard, key, index, members)
    except SampleError as error:
        print(f"not usable: {error}")
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        for number, (suffix, content) in enumerate(members.items()):
            # A suffix is the tar's: one that is no plain name gives no path.
            plain = suffix.replace(".", "").isalnum() and suffix.isascii()
            (arguments.output / (suffix if plain else f"member{number}")).write_bytes(content)
        print(f"{len(members)} files written to '{arguments.output}'")
    return 0


def find_key(shards, key: str) -> int:
    """Number of the first sample of this key. Raises ValueError: there is none."""
    from datamodules.errors import SampleError

    for number in range(len(shards)):
        try:
            found = shards.read(number, frozenset())[1]
        except SampleError as error:
            found = error.key
        if found == key:
            return number
    raise ValueError(f"none of {len(shards)} samples has the key '{key}'")
