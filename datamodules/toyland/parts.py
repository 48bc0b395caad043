"""The folders that are built one by one, each as a whole, and what their content depends on."""

import hashlib
import inspect
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from datamodules.errors import DataError
from datamodules.sample import SCHEMA_VERSION
from datamodules.shards import ShardWriter
from datamodules.toyland import evaluation_sets, samples
from datamodules.toyland.config import ToylandData
from datamodules.toyland.drawing import Chunk, Draw, Members, chunks
from kosmosg.files import write_bytes
from kosmosg.toyland import kinds, language, looks, scene, settings, shapes

RECORD = "toyland.json"
"""In every finished folder: what it was built from."""
WORLD: tuple[ModuleType, ...] = (shapes, looks, kinds, settings, scene, language, samples, evaluation_sets)


@dataclass(frozen=True)
class Part:
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

    def chunks(self, split: str) -> list[Chunk]:
        """The work of one split."""
        return chunks(self.name, split, self.splits[split], self.seed, self.options)

    def record(self) -> dict[str, Any]:
        """Everything the content depends on; the code of the world by its hash."""
        shards = {"samples_per_shard": self.samples_per_shard} if self.name in samples.MAKERS else {}
        values = {f"{self.name}.{key}": value for key, value in asdict(self.options).items()}
        return values | shards | {"seed": self.seed, "schema": SCHEMA_VERSION, "world": world_hash()}

    def stands(self, output: Path) -> bool:
        """Whether the folder is there and whole, from the same settings.

        Raises:
            DataError: it is there from other settings, or it is none of ours.
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
            told = ", ".join(f"{key} was {found.get(key)!r} and is now {wanted.get(key)!r}" for key in changed)
            raise DataError(f"'{folder}' was built from something else: {told}. {remedy}")
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
        names = evaluation_sets.subject_names(self.options)
        subjects = iter(names)
        for drawn in draw(self.chunks("subjects")):
            for members in drawn:
                subject = folder / next(subjects)
                subject.mkdir()
                for name, content in members.items():
                    (subject / name).write_bytes(content)
            yield len(drawn)
        (folder / "dreambench.json").write_bytes(_json(evaluation_sets.dreambench_facts(names)))

    def _write_coco(self, folder: Path, draw: Draw) -> Iterator[int]:
        (folder / "val2014").mkdir()
        captions: list[str] = []
        for drawn in draw(self.chunks("scenes")):
            for members in drawn:
                captions.append(members["txt"].decode())
                (folder / "val2014" / evaluation_sets.coco_file_name(len(captions))).write_bytes(members["png"])
            yield len(drawn)
        (folder / "annotations").mkdir()
        annotations = folder / "annotations" / "captions_val2014.json"
        annotations.write_bytes(_json(evaluation_sets.coco_annotations(captions)))


@dataclass
class Drawn:
    """A sample that was encoded where it was drawn; what ShardWriter needs of a sample."""

    members: Members
    key: str = ""

    def encode(self) -> Members:
        """As they are."""
        return self.members


def all_parts(config: ToylandData) -> list[Part]:
    """In the order of building."""
    rest = {"seed": config.seed, "samples_per_shard": config.samples_per_shard}
    parts = []
    for name in samples.MAKERS:
        options = getattr(config, name)
        splits = {"train": options.train, "val": options.val}
        parts.append(Part(name, f"shards/{name}", splits, options=options, **rest))
    subjects = {"subjects": config.dreambench.objects + config.dreambench.live}
    parts.append(Part("dreambench", "dreambench", subjects, options=config.dreambench, **rest))
    parts.append(Part("coco", "coco", {"scenes": config.coco.images}, options=config.coco, **rest))
    return parts


def world_hash() -> str:
    """Of the code that draws and words everything: data of an older Toyland are not taken for today's."""
    return hashlib.sha256("".join(inspect.getsource(module) for module in WORLD).encode()).hexdigest()[:16]


def _json(record: dict) -> bytes:
    return json.dumps(record, indent=1, ensure_ascii=False).encode()
