"""Small sets of every kind of sample, written by the project's own writer."""

import io
import tarfile
from functools import cache
from pathlib import Path

import torch
from PIL import Image

from datamodules.alignment import ClipTokens
from datamodules.sample import CaptionSample, ConstructedSample, EditSample, Entity, InterleavedSample, TextSample
from datamodules.shard_writer import ShardWriter
from datamodules.shards import find_tars, index_shard, write_listing
from kosmosg.image_processing import ClipImageTransform
from kosmosg.prompt import PromptEncoder
from kosmosg.tokenizer import Tokenizer
from tests import tiny

SIDE = 16
SLOTS = tiny.IMAGE_TOKENS


def image(level: int, side: int = SIDE) -> Image.Image:
    return Image.new("RGB", (side, side), (level % 256, level // 256 % 256, 7))


def png(level: int = 0) -> bytes:
    stream = io.BytesIO()
    image(level).save(stream, "PNG")
    return stream.getvalue()


def captions(n: int) -> list[CaptionSample]:
    return [CaptionSample(f"a small dog number {i}", image(i), key=f"c{i:05d}") for i in range(n)]


def texts(n: int) -> list[TextSample]:
    return [TextSample(f"A fish, {i}. It swims. The dog sleeps!", key=f"t{i:05d}") for i in range(n)]


def interleaved(n: int) -> list[InterleavedSample]:
    return [
        InterleavedSample(["Look. A dog.", image(i), "It swims.", image(i + 1), "The end."], key=f"i{i:05d}")
        for i in range(n)
    ]


def constructed(n: int) -> list[ConstructedSample]:
    entities = [Entity("fish", image(1), image(2)), Entity("dog", image(3), image(4))]
    return [
        ConstructedSample(f"a fish and a dog in the garden, {i}", entities, image(i), key=f"k{i:05d}") for i in range(n)
    ]


def edits(n: int) -> list[EditSample]:
    return [EditSample(f"a fish {i}", "make it night", image(i), image(i + 1), key=f"e{i:05d}") for i in range(n)]


def write(folder: Path, prefix: str, samples: list, per_shard: int = 8) -> str:
    with ShardWriter(folder, prefix, per_shard) as writer:
        for sample in samples:
            writer.write(sample)
    return str(folder / f"{prefix}-*.tar")


def add(tar: tarfile.TarFile, name: str, content: bytes = b"x") -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def write_members(path: Path, groups: list[tuple[str, dict[str, bytes]]], listed: bool = True) -> str:
    """A tar as other programs write it, then `listed`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in groups:
            for suffix, content in members.items():
                add(tar, f"{key}.{suffix}", content)
    if listed:
        index(path.parent)
    return str(path)


def index(folder: Path) -> str:
    """Lists the tars of a folder, as `kosmosg data index` does."""
    write_listing(folder, [index_shard(str(path)) for path in find_tars(str(folder))])
    return str(folder)


def encoder(tokenizer: Path) -> PromptEncoder:
    return PromptEncoder(Tokenizer.from_pretrained(tokenizer), ClipImageTransform(SIDE), SLOTS)


def clip() -> ClipTokens:
    """Captions → those ids and their lengths."""
    return ClipTokens(clip_tokenize)


clip_tokenizer = cache(tiny.clip_tokenizer)


def clip_tokenize(texts: list[str]) -> torch.Tensor:
    """CLIP ids, 77 positions."""
    return torch.tensor(clip_tokenizer()(list(texts), padding="max_length", truncation=True, max_length=77).input_ids)


class RecordedDraws:
    """The draws of a record in the place of `random.Random`; each must be asked for as it was recorded."""

    def __init__(self, draws: list):
        self.draws = list(draws)

    def random(self) -> float:
        kind, value = self.draws.pop(0)
        assert kind == "random"
        return value

    def randint(self, a: int, b: int) -> int:
        kind, low, high, value = self.draws.pop(0)
        assert (kind, low, high) == ("randint", a, b)
        return value
