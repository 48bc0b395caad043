"""Show one sample: its files, its text in order and the sizes of its images.

    kosmosg data show data/edit/train-000000.tar
    kosmosg data show laion --key 000000042 --output sample/

SHARDS is a folder, a path, a glob or a brace list. Control characters in a sample's text are printed escaped.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", metavar="SHARDS", help="folder, path, glob or brace list of tars")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--index", type=int, default=0, metavar="I", help="number of the sample; default: 0")
    which.add_argument("--key", metavar="K", help="key of the sample; the first one with this key")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="also write its files into this folder")


def run(arguments: argparse.Namespace) -> int:
    from datamodules.checks.sheet import parts_of
    from datamodules.errors import SampleError, printable
    from datamodules.images import Limits, StoredImage, load
    from datamodules.sample import decode

    number, tar, group = find(arguments.shards, arguments.index, arguments.key)
    key, members = tar.read(group.begin, group.end, Limits())
    print(printable(f"{tar.name}, sample {number}, key '{key}'"))
    for name, content in members.items():
        print(printable(f"  {name:<18} {len(content):>9,} bytes"))
    try:
        sample = decode(members, tar.name, key)
        print(sample.kind)
        for text, image in parts_of(sample):
            name = image.name if isinstance(image, StoredImage) else ""
            size = f"[{name} {'×'.join(map(str, load(image).size))}] " if image is not None else ""
            print(printable(f"  {size}{text}"))
    except SampleError as error:
        print(f"not usable: {error}")
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        for i, (suffix, content) in enumerate(members.items()):
            # Suffixes come from the tar; those that are not plain names must not be used as paths.
            plain = suffix.replace(".", "").isalnum() and suffix.isascii()
            (arguments.output / (suffix if plain else f"member{i}")).write_bytes(content)
        print(f"{len(members)} files written to '{arguments.output}'")
    return 0


def find(pattern: str, index: int, key: str | None) -> tuple:
    """Find a sample by key, or by index if the key is None. Returns its number, tar and group.

    Raises:
        ValueError: there is no such sample.
    """
    from datamodules.errors import SampleError
    from datamodules.images import Limits
    from datamodules.shards import find_tars
    from datamodules.tar import OpenFiles, Tar, find_samples

    count, files = 0, OpenFiles()
    for tar in (Tar(path, files) for path in find_tars(pattern)):
        for group in find_samples(tar):
            try:
                if isinstance(group, SampleError):
                    raise group
                group_key = tar.read(group.begin, group.end, Limits(), frozenset())[0] if key is not None else None
            except SampleError as error:
                group_key = error.key
            if not isinstance(group, SampleError) and (count == index if key is None else group_key == key):
                return count, tar, group
            count += 1
    if key is None:
        raise ValueError(f"--index is {index}; '{pattern}' has samples 0 … {count - 1}")
    raise ValueError(f"none of {count} samples has the key '{key}'")
