"""Toyland's images in shards, and curations that take seconds."""

import hashlib
import json
from pathlib import Path
from typing import Any

from datamodules.curation.__main__ import main
from datamodules.curation.config import Crops, Curation
from datamodules.curation.output import Output
from datamodules.curation.reading import list_sources
from datamodules.curation.report import Counts
from datamodules.curation.stages import Worker, groups, read_chunks
from datamodules.images import Limits
from datamodules.sample import ConstructedSample, decode
from datamodules.tar import read_shard
from datamodules.toyland.config import Captions
from datamodules.toyland.samples import caption_sample, sample_generator
from tests.conftest import REPOSITORY
from tests.datamodules import worlds

TOYLAND = str(REPOSITORY / "configs" / "curation" / "toyland.yaml")
IMAGES = 16
SMALL_CROPS = Crops(min_side=4)


def write_toyland(folder: Path, count: int = IMAGES) -> str:
    """Caption shards of scenes 0 … count - 1, ten to a shard."""
    samples = [caption_sample(sample_generator(0, "captions", "train", i), Captions()) for i in range(count)]
    for i, sample in enumerate(samples):
        sample.key = f"{i:09d}"
    return worlds.write(folder, "train", samples, per_shard=10)


def arguments(shards: str, output: Path, *more: str) -> list[str]:
    """Chunks of four images, by Toyland's ground truth."""
    return [TOYLAND, f"input.shards={shards}", f"output={output}", "input.chunk_size=4", "min_bad_count=1", *more]


def curate(shards: str, output: Path, *more: str) -> int:
    """By the command; its exit status."""
    return main(arguments(shards, output, *more))


def curate_here(config: Curation) -> Path:
    """The same in this process, without Ray."""
    output = Output(config)
    sources, fingerprint = list_sources(config.input)
    output.prepare(fingerprint)
    workers, counts = [Worker(group) for group in groups(config)], Counts(config, len(sources))
    for source in sources:
        for chunk in read_chunks(source, config):
            for worker in workers:
                chunk = worker(chunk)
            counts.add(output.publish(chunk))
    output.finish(counts.shards(), counts.summary())
    return output.folder


def digests(output: Path) -> dict[str, str]:
    """Of what must not depend on who worked, how often and how long: the shards, what lists them, the counts."""
    files = [*output.glob("*.tar"), *output.glob("*.json"), output / "curation" / "counts.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def counts(output: Path) -> dict[str, Any]:
    return json.loads((output / "curation" / "counts.json").read_text())


def samples(output: Path) -> list[tuple[ConstructedSample, dict[str, Any]]]:
    """Every sample and its json."""
    found = []
    for path in sorted(output.glob("train-*.tar")):
        for item in read_shard(str(path), Limits()):
            assert not isinstance(item, Exception)
            sample = decode(item[1], path.name, item[0], kind="constructed")
            assert isinstance(sample, ConstructedSample)
            found.append((sample, json.loads(item[1]["json"])))
    return found
