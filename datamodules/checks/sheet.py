"""A contact sheet of shards: for each kind a row of samples, pictures with their words under them."""

import contextlib
import random
import textwrap
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from datamodules.errors import SampleError, ShardError
from datamodules.images import Limits, SampleImage, load
from datamodules.sample import (
    KINDS,
    CaptionSample,
    ConstructedSample,
    EditSample,
    ImageSample,
    InstructionSample,
    Sample,
    TextSample,
    decode,
)
from datamodules.storage.shards import IndexedShards, expand_pattern

PAGE, CELL, GAP, MARGIN, HEAD, LINE = 1400, 128, 4, 16, 34, 15  # pixels
FONT_SIZE, SMALL, LETTER = 12, 10, 6.3
MOST_LINES, MOST_PARTS, TRIES = 6, 6, 20
INK, FAINT, PAPER, RULE = (28, 32, 38), (112, 118, 128), (255, 255, 255), (212, 215, 220)


@dataclass
class Part:
    """One column of a card: a picture with the words that belong to it, or words alone."""

    text: str
    image: SampleImage | None = None


def draw_sheet(pattern: str, file: Path, *, columns: int = 9, seed: int = 0, limits: Limits | None = None) -> int:
    """Draw up to `columns` samples of each kind, fewer where they are wide, into a PNG; returns how many.

    Samples are drawn by the seed. What cannot be read, sample or shard, is passed over: the check counts those.

    Raises:
        SampleError: not one sample could be drawn.
    """
    limits = limits or Limits()
    cards = _cards(_readable(pattern, limits), columns, seed, limits)
    rows = [(kind, _fitting(cards[kind])) for kind in KINDS if cards.get(kind)]
    if not rows:
        raise SampleError("nothing_to_draw", pattern, "", f"none of {TRIES * columns} samples can be read")
    heights = [HEAD + max(_height(card) for card in listed) + MARGIN for _, listed in rows]
    width = max(sum(_width(card) + MARGIN for card in listed) for _, listed in rows) + MARGIN
    page = Image.new("RGB", (width, sum(heights) + MARGIN), PAPER)
    draw, top = ImageDraw.Draw(page), MARGIN
    for (kind, listed), height in zip(rows, heights, strict=True):
        draw.text((MARGIN, top), kind, fill=INK, font=ImageFont.load_default(size=FONT_SIZE + 3))
        draw.line([(MARGIN, top + 22), (width - MARGIN, top + 22)], fill=RULE)
        left = MARGIN
        for card in listed:
            _draw_card(page, left, top + HEAD, card)
            left += _width(card) + MARGIN
        top += height
    page.save(file)
    return sum(len(listed) for _, listed in rows)


def parts_of(sample: Sample, whole: bool = False) -> list[Part]:
    """A sample from left to right, as training reads it; the target last.

    Args:
        whole: all pairs, crops and segments, not only as many as a card takes.
    """
    most = None if whole else MOST_PARTS
    if isinstance(sample, TextSample):
        return [Part(sample.text)]
    if isinstance(sample, CaptionSample):
        return [Part(sample.caption, sample.image)]
    if isinstance(sample, EditSample):
        pairs = sample.pairs if whole else sample.pairs[:1]
        more = f" (+{len(sample.pairs) - 1} pairs)" if len(sample.pairs) > len(pairs) else ""
        texts = (sample.caption, f"to: {sample.instruction}{more}")
        return [Part(text, image) for pair in pairs for text, image in zip(texts, pair, strict=True)]
    if isinstance(sample, ConstructedSample):
        crops = [
            Part(f"{entity.text}, {name}", image)
            for entity in sample.entities
            for name, image in (("background", entity.background), ("white", entity.white))
        ]
        return [*crops[: most and most - 1], Part(f"target: {sample.caption}", sample.target)]
    if isinstance(sample, ImageSample):
        return [Part(sample.key, sample.image)]
    parts = [Part(item) if isinstance(item, str) else Part("", item) for item in sample.segments]
    if isinstance(sample, InstructionSample):
        return [*parts[: most and most - 1], Part("target", sample.target)]
    return parts[:most]


def _readable(pattern: str, limits: Limits) -> list[IndexedShards]:
    found = []
    for path in expand_pattern(pattern):
        with contextlib.suppress(ShardError):
            found.append(IndexedShards(str(path), limits))
    return found


def _cards(shards: list[IndexedShards], columns: int, seed: int, limits: Limits) -> dict[str, list[list]]:
    """Drawn samples of each kind; pictures are decoded here, so that a broken one costs its own sample alone."""
    ends = list(accumulate(map(len, shards)))
    total = ends[-1] if ends else 0
    draws = random.Random(seed)
    cards: dict[str, list[list]] = {}
    for number in draws.sample(range(total), min(total, TRIES * columns * len(KINDS))):
        place = bisect_right(ends, number)
        try:
            shard, key, members = shards[place].read(number - ends[place] + len(shards[place]))
            sample = decode(members, shard, key, limits=limits)
            card = cards.setdefault(sample.kind, [])
            if len(card) < columns:
                card.append([(_lines(part), _fit(part.image)) for part in parts_of(sample)])
        except SampleError:
            continue
    return cards


def _fitting(cards: list) -> list:
    """As many cards as a page is wide, two at least."""
    ends = accumulate(_width(card) + MARGIN for card in cards)
    return cards[: max(2, sum(end <= PAGE for end in ends))]


def _lines(part: Part) -> list[str]:
    wrapped = textwrap.wrap(part.text, int(CELL / LETTER))
    most = MOST_LINES if part.image is not None else (CELL + MOST_LINES * LINE) // LINE
    return [*wrapped[: most - 1], wrapped[most - 1][:-1] + "…"] if len(wrapped) > most else wrapped


def _fit(image: SampleImage | None) -> tuple[Image.Image, str] | None:
    """The whole picture within a cell, and its size in words."""
    if image is None:
        return None
    pixels = load(image)
    scale = CELL / max(pixels.size)
    size = tuple(max(1, round(side * scale)) for side in pixels.size)
    sharp = scale >= 2  # a miniature keeps its pixels
    how = Image.Resampling.NEAREST if sharp else Image.Resampling.LANCZOS
    return pixels.resize(size, how), f"{pixels.width} x {pixels.height}"  # type: ignore[arg-type]


def _width(card: Sequence) -> int:
    return len(card) * (CELL + GAP) - GAP


def _height(card: Sequence) -> int:
    return max((CELL + SMALL + 6 if fitted else 0) + len(lines) * LINE for lines, fitted in card)


def _draw_card(page: Image.Image, left: int, top: int, card: Sequence) -> None:
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=FONT_SIZE)
    for lines, fitted in card:
        below = top
        if fitted is not None:
            pixels, size = fitted
            page.paste(pixels, (left + (CELL - pixels.width) // 2, top + (CELL - pixels.height) // 2))
            draw.rectangle([left - 1, top - 1, left + CELL, top + CELL], outline=RULE)
            draw.text((left, top + CELL + 2), size, fill=FAINT, font=ImageFont.load_default(size=SMALL))
            below = top + CELL + SMALL + 6
        draw.multiline_text((left, below), "\n".join(lines), fill=INK, font=font, spacing=LINE - FONT_SIZE)
        left += CELL + GAP
