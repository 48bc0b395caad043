"""Toyland's pictures in shards, and curations of them that take seconds."""

import hashlib
import json
from pathlib import Path
from typing import Any

from datamodules.storage.indexed_shards import IndexedShards

from datamodules.curation.__main__ import main
from datamodules.sample import ConstructedSample, decode
from datamodules.toyland.config import Captions
from datamodules.toyland.samples import caption_sample, sample_generator
from tests.conftest import REPOSITORY
from tests.datamodules import worlds

TOYLAND = str(REPOSITORY / "configs" / "curation" / "toyland.yaml")
IMAGES = 16


def write_toyland(folder: Path, count: int = IMAGES) -> str:
    """Caption shards of scenes 0 … count - 1, ten to a shard."""
    samples = [caption_sample(sample_generator(0, "captions", "train", i), Captions()) for i in range(count)]
    for i, sample in enumerate(samples):
        sample.key = f"{i:09d}"
    return worlds.write(folder, "train", samples, per_shard=10)


def curate(shards: str, output: Path, *more: str) -> int:
    """Chunks of four images, by Toyland's ground truth."""
    rest = ("input.chunk_size=4", "report.sheet=2", "min_bad_count=1", *more)
    return main([TOYLAND, f"input.shards={shards}", f"output={output}", *rest])


def digests(output: Path) -> dict[str, str]:
    """Of the shards, their indexes and the manifest: what must not depend on who worked, how often and how long."""
    files = sorted(path for path in output.iterdir() if path.is_file() and path.name != ".lock")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def manifest(output: Path) -> dict[str, Any]:
    return json.loads((output / "train.manifest.json").read_text())


def samples(output: Path) -> list[tuple[ConstructedSample, dict[str, Any]]]:
    """Every sample and its json."""
    shards, found = IndexedShards(str(output / "train-*.tar")), []
    for i in range(len(shards)):
        shard, key, members = shards.read(i)
        sample = decode(members, shard, key, kind="constructed")
        assert isinstance(sample, ConstructedSample)
        found.append((sample, json.loads(members["json"])))
    return found
