"""The data sets of Toyland: each is a folder, written as a whole, with a record of the settings it was built from.

Samples are drawn in chunks, by worker processes, and written in order, so that the files do not depend on the number of
processes.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from datamodules.errors import DataError
from datamodules.images import encode_png
from datamodules.sample import SCHEMA_VERSION
from datamodules.shard_writer import ShardWriter
from datamodules.toyland import samples
from datamodules.toyland.config import ToylandData
from kosmosg.files import write_bytes

RECORD = "toyland.json"
"""File in every finished folder that records what it was built from."""
FOLDER = Path(__file__).parent
NOT_HASHED = ("__init__.py", "__main__.py", "config.py")
"""Source files on which the data do not depend, apart from the settings, which are in `RECORD`."""
LABELS = "labels"
"""Key of a subject's labels among its files; dreambench.json collects them."""
CHUNK = 64
"""Samples per task of a process."""

Members = dict[str, bytes]


@dataclass(frozen=True)
class DataSet:
    """One folder of the output: a set of shards, DreamBench or COCO."""

    name: str
    path: str
    """Relative to the output folder."""
    splits: dict[str, int]
    """Number of samples of each split."""
    seed: int
    options: Any
    samples_per_shard: int

    def chunks(self, split: str) -> list["Chunk"]:
        """Return the chunks of a split, in order."""
        return chunks(self.name, split, self.splits[split], self.seed, self.options)

    def record(self) -> dict[str, Any]:
        """Return everything that the content depends on, including a hash of the code."""
        shards = {"samples_per_shard": self.samples_per_shard} if self.name in samples.MAKERS else {}
        values = {f"{self.name}.{key}": value for key, value in asdict(self.options).items()}
        return values | shards | {"seed": self.seed, "schema": SCHEMA_VERSION, "world": world_hash()}

    def exists(self, output: Path) -> bool:
        """Whether the folder exists and was built from the same settings.

        Raises:
            DataError: the folder was built from other settings, or not by this command.
        """
        folder = output / self.path
        if not folder.exists():
            return False
        remedy = "Remove it (`make clean-toyland` removes all of Toyland's data and runs) or set another output=…"
        try:
            before = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(
                f"'{folder}' has no readable {RECORD}, so it was not written by this command. {remedy}"
            ) from error
        now = self.record()
        changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        if changed:
            changes = ", ".join(f"{key} was {before.get(key)!r} and is now {now.get(key)!r}" for key in changed)
            raise DataError(f"'{folder}' was built from something else: {changes}. {remedy}")
        return True

    def write(self, folder: Path, drawn: Iterator[list[Members]]) -> Iterator[int]:
        """Write all files into an empty folder and yield the number of samples after each chunk.

        Args:
            drawn: the drawn chunks of all splits in order; those of later data sets may follow.
        """
        write = {"dreambench": self._write_dreambench, "coco": self._write_coco}.get(self.name, self._write_shards)
        yield from write(folder, drawn)
        write_bytes(folder / RECORD, _json(self.record()))

    def _write_shards(self, folder: Path, drawn: Iterator[list[Members]]) -> Iterator[int]:
        for split in self.splits:
            with ShardWriter(folder, split, self.samples_per_shard) as writer:
                for chunk in islice(drawn, len(self.chunks(split))):
                    for members in chunk:
                        writer.write(Drawn(members))  # type: ignore[arg-type]
                    yield len(chunk)

    def _write_dreambench(self, folder: Path, drawn: Iterator[list[Members]]) -> Iterator[int]:
        subjects = iter(samples.subject_names(self.options))
        labels = {}
        for chunk in islice(drawn, len(self.chunks("subjects"))):
            for members in chunk:
                subject = next(subjects)
                labels[subject] = json.loads(members.pop(LABELS))
                (folder / subject / "others").mkdir(parents=True)
                for name, content in members.items():
                    (folder / subject / name).write_bytes(content)
            yield len(chunk)
        (folder / "dreambench.json").write_bytes(_json(samples.dreambench_facts(labels)))

    def _write_coco(self, folder: Path, drawn: Iterator[list[Members]]) -> Iterator[int]:
        (folder / "val2014").mkdir()
        captions: list[str] = []
        for chunk in islice(drawn, len(self.chunks("scenes"))):
            for members in chunk:
                captions.append(members["txt"].decode())
                (folder / "val2014" / samples.coco_file_name(len(captions))).write_bytes(members["png"])
            yield len(chunk)
        (folder / "annotations").mkdir()
        annotations = folder / "annotations" / "captions_val2014.json"
        annotations.write_bytes(_json(samples.coco_annotations(captions)))


@dataclass
class Drawn:
    """A sample that was already encoded by the process that drew it, with the interface that ShardWriter needs."""

    members: Members
    key: str = ""

    def encode(self) -> Members:
        """Return the members."""
        return self.members


def data_sets(config: ToylandData) -> list[DataSet]:
    """Return all data sets of a configuration, in the order of writing."""
    common = {"seed": config.seed, "samples_per_shard": config.samples_per_shard}
    sets = []
    for name in samples.MAKERS:
        options = getattr(config, name)
        splits = {"train": options.train, "val": options.val}
        sets.append(DataSet(name, f"shards/{name}", splits, options=options, **common))
    subjects = {"subjects": config.dreambench.objects + config.dreambench.live}
    sets.append(DataSet("dreambench", "dreambench", subjects, options=config.dreambench, **common))
    sets.append(DataSet("coco", "coco", {"scenes": config.coco.images}, options=config.coco, **common))
    return sets


def world_hash() -> str:
    """Hash the code that generates the data, so that data of an older version are recognised."""
    digest = hashlib.sha256()
    for file in sorted(FOLDER.glob("*.py")):
        if file.name not in NOT_HASHED:
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _json(record: dict) -> bytes:
    return json.dumps(record, indent=1, ensure_ascii=False).encode()


@dataclass(frozen=True)
class Chunk:
    """Samples `numbers` of a split of a data set."""

    data_set: str
    split: str
    numbers: range
    seed: int
    options: Any


def chunks(data_set: str, split: str, count: int, seed: int, options: Any) -> list[Chunk]:
    """Divide the samples of a split into chunks, in order."""
    starts = range(0, count, CHUNK)
    return [Chunk(data_set, split, range(start, min(start + CHUNK, count)), seed, options) for start in starts]


def draw_chunk(chunk: Chunk) -> list[Members]:
    """Draw the samples of a chunk, each as files (name or suffix → bytes)."""
    return [_draw(chunk, number) for number in chunk.numbers]


def _draw(chunk: Chunk, number: int) -> Members:
    rng = samples.sample_generator(chunk.seed, chunk.data_set, chunk.split, number)
    if chunk.data_set == "dreambench":
        kind = list(samples.subject_names(chunk.options).values())[number]
        images, labels = samples.subject_files(rng, kind, chunk.options.images)
        return {name: encode_png(image) for name, image in images.items()} | {LABELS: _json(labels)}
    if chunk.data_set == "coco":
        image, line = samples.coco_image(rng, number)
        return {"png": encode_png(image), "txt": line.encode()}
    return samples.MAKERS[chunk.data_set](rng, chunk.options).encode()
