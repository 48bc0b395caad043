"""A contact sheet of curated samples, to look at: target, then each entity with its background and on white."""

import random
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from datamodules.images import load
from datamodules.sample import ConstructedSample, decode
from datamodules.storage.indexed_shards import IndexedShards

CELL, GAP, TEXT, LINE, LETTERS = 128, 8, 210, 16, 30  # pixels; letters of a line
ENTITIES = 3
INK, FAINT = (28, 32, 38), (112, 118, 128)


def write_sheet(pattern: str, count: int, seed: int, file: Path) -> None:
    """Draw `count` samples of some shards, chosen by the seed, into a PNG."""
    shards = IndexedShards(pattern)
    chosen = sorted(random.Random(seed).sample(range(len(shards)), min(count, len(shards))))
    width = GAP + TEXT + (1 + 2 * ENTITIES) * (CELL + GAP)
    page = Image.new("RGB", (width, GAP + len(chosen) * (CELL + LINE + GAP)), (236, 238, 241))
    for place, number in enumerate(chosen):
        shard, key, members = shards.read(number)
        sample = decode(members, shard, key, kind="constructed")
        assert isinstance(sample, ConstructedSample)
        _draw(page, GAP + place * (CELL + LINE + GAP), sample)
    page.save(file)


def _draw(page: Image.Image, top: int, sample: ConstructedSample) -> None:
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=13)
    caption = textwrap.wrap(sample.caption, LETTERS)[:6]
    draw.multiline_text((GAP, top), "\n".join(caption), fill=INK, font=font)
    draw.text(
        (GAP, top + CELL - LINE), f"{sample.shard} {sample.key}", fill=FAINT, font=ImageFont.load_default(size=10)
    )
    left = GAP + TEXT
    page.paste(_fit(load(sample.target)), (left, top))
    for entity in sample.entities[:ENTITIES]:
        left += CELL + GAP
        draw.text((left, top + CELL + 1), entity.text, fill=INK, font=font)
        page.paste(_fit(load(entity.background)), (left, top))
        left += CELL + GAP
        page.paste(_fit(load(entity.white)), (left, top))


def _fit(image: Image.Image) -> Image.Image:
    small = max(image.size) <= CELL // 2
    return image.resize((CELL, CELL), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)
