"""The data sets, each a folder that is written as a whole, what their content depends on, and the processes that draw.

Samples are drawn in chunks over processes and written in order, so the files are the same for any number of processes.
"""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datamodules.errors import DataError
from datamodules.images import encode_png
from datamodules.processes import interrupts_delayed
from datamodules.sample import SCHEMA_VERSION
from datamodules.shard_writer import ShardWriter
from datamodules.toyland import samples
from datamodules.toyland.config import ToylandData
from kosmosg.files import write_bytes

RECORD = "toyland.json"
"""In every finished folder: what it was built from."""
FOLDER = Path(__file__).parent
NO_CONTENT = ("__init__.py", "__main__.py", "config.py")
"""Files here that no written byte depends on: the docstring, the command, and the settings, which `RECORD` holds."""
LABELS = "labels"
"""Beside the files of a subject: what a judge should see of it, which dreambench.json gathers."""
CHUNK = 64
"""Samples that a process draws between two reports."""

Members = dict[str, bytes]
Draw = Callable[[Iterable["Chunk"]], Iterator[list[Members]]]


@dataclass(frozen=True)
class DataSet:
    """One folder under the output: five of shards, DreamBench and COCO."""

    name: str
    """Also the folder of shards under shards/."""
    path: str
    """Relative to the output."""
    splits: dict[str, int]
    """Samples of each split."""
    seed: int
    options: Any
    samples_per_shard: int

    def chunks(self, split: str) -> list["Chunk"]:
        """The samples of one split, in order."""
        return chunks(self.name, split, self.splits[split], self.seed, self.options)

    def record(self) -> dict[str, Any]:
        """Everything the content depends on; the code of the world by its hash."""
        shards = {"samples_per_shard": self.samples_per_shard} if self.name in samples.MAKERS else {}
        values = {f"{self.name}.{key}": value for key, value in asdict(self.options).items()}
        return values | shards | {"seed": self.seed, "schema": SCHEMA_VERSION, "world": world_hash()}

    def exists(self, output: Path) -> bool:
        """Whether the folder is there and complete, from the same settings.

        Raises:
            DataError: it was written from other settings, or not by this command.
        """
        folder = output / self.path
        if not folder.exists():
            return False
        remedy = "Remove it (`make clean-toyland` removes all of Toyland's data and runs) or set another output=…"
        try:
            found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(
                f"'{folder}' has no readable {RECORD}, so it was not written by this command. {remedy}"
            ) from error
        wanted = self.record()
        changed = [key for key in sorted(found.keys() | wanted.keys()) if found.get(key) != wanted.get(key)]
        if changed:
            changes = ", ".join(f"{key} was {found.get(key)!r} and is now {wanted.get(key)!r}" for key in changed)
            raise DataError(f"'{folder}' was built from something else: {changes}. {remedy}")
        return True

    def write(self, folder: Path, draw: Draw) -> Iterator[int]:
        """Write all files into an empty folder; yields how many samples were added at every step."""
        write = {"dreambench": self._write_dreambench, "coco": self._write_coco}.get(self.name, self._write_shards)
        yield from write(folder, draw)
        write_bytes(folder / RECORD, _json(self.record()))

    def _write_shards(self, folder: Path, draw: Draw) -> Iterator[int]:
        for split in self.splits:
            with ShardWriter(folder, split, self.samples_per_shard) as writer:
                for drawn in draw(self.chunks(split)):
                    for members in drawn:
                        writer.write(Drawn(members))  # type: ignore[arg-type]
                    yield len(drawn)

    def _write_dreambench(self, folder: Path, draw: Draw) -> Iterator[int]:
        subjects = iter(samples.subject_names(self.options))
        labels = {}
        for drawn in draw(self.chunks("subjects")):
            for members in drawn:
                subject = next(subjects)
                labels[subject] = json.loads(members.pop(LABELS))
                (folder / subject / "others").mkdir(parents=True)
                for name, content in members.items():
                    (folder / subject / name).write_bytes(content)
            yield len(drawn)
        (folder / "dreambench.json").write_bytes(_json(samples.dreambench_facts(labels)))

    def _write_coco(self, folder: Path, draw: Draw) -> Iterator[int]:
        (folder / "val2014").mkdir()
        captions: list[str] = []
        for drawn in draw(self.chunks("scenes")):
            for members in drawn:
                captions.append(members["txt"].decode())
                (folder / "val2014" / samples.coco_file_name(len(captions))).write_bytes(members["png"])
            yield len(drawn)
        (folder / "annotations").mkdir()
        annotations = folder / "annotations" / "captions_val2014.json"
        annotations.write_bytes(_json(samples.coco_annotations(captions)))


@dataclass
class Drawn:
    """A sample that was encoded where it was drawn; what ShardWriter needs of a sample."""

    members: Members
    key: str = ""

    def encode(self) -> Members:
        """As they are."""
        return self.members


def data_sets(config: ToylandData) -> list[DataSet]:
    """In the order of writing."""
    rest = {"seed": config.seed, "samples_per_shard": config.samples_per_shard}
    found = []
    for name in samples.MAKERS:
        options = getattr(config, name)
        splits = {"train": options.train, "val": options.val}
        found.append(DataSet(name, f"shards/{name}", splits, options=options, **rest))
    subjects = {"subjects": config.dreambench.objects + config.dreambench.live}
    found.append(DataSet("dreambench", "dreambench", subjects, options=config.dreambench, **rest))
    found.append(DataSet("coco", "coco", {"scenes": config.coco.images}, options=config.coco, **rest))
    return found


def world_hash() -> str:
    """Of the code that draws, words and writes everything: data of an older Toyland are not taken for today's."""
    digest = hashlib.sha256()
    for file in sorted(FOLDER.glob("*.py")):
        if file.name not in NO_CONTENT:
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _json(record: dict) -> bytes:
    return json.dumps(record, indent=1, ensure_ascii=False).encode()


@dataclass(frozen=True)
class Chunk:
    """Samples `numbers` of one data set's split."""

    data_set: str
    split: str
    numbers: range
    seed: int
    options: Any


def chunks(data_set: str, split: str, count: int, seed: int, options: Any) -> list[Chunk]:
    """All samples of a split, in order."""
    starts = range(0, count, CHUNK)
    return [Chunk(data_set, split, range(start, min(start + CHUNK, count)), seed, options) for start in starts]


def draw_chunk(chunk: Chunk) -> list[Members]:
    """Each sample as files: name or suffix → bytes."""
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


@contextmanager
def drawing(processes: int | None) -> Iterator[Draw]:
    """A function that draws chunks in their order, on `processes` processes (None: one for each CPU core).

    Raises:
        DataError: a process was killed.
    """
    count = processes or os.cpu_count() or 1
    if count == 1:
        yield lambda todo: map(draw_chunk, todo)
        return
    # Spawned, not forked: the parent has threads (progress bar, torch), which a fork would leave half-copied.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, context)

    def draw(todo: Iterable[Chunk]) -> Iterator[list[Members]]:
        with interrupts_delayed():
            return pool.map(draw_chunk, todo)  # starts the processes

    try:
        yield draw
    except BrokenProcessPool as error:
        raise DataError(
            f"one of {count} drawing processes was killed, perhaps for want of memory; set processes to fewer and "
            "start again, finished data sets are kept."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
