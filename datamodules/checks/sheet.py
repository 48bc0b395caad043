"""Divide samples into parts to display, and draw a contact sheet of some samples of each kind."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps

from datamodules.errors import SampleError
from datamodules.images import SampleImage, load
from datamodules.sample import (
    CaptionSample,
    ConstructedSample,
    EditSample,
    ImageSample,
    InstructionSample,
    Sample,
    TextSample,
)

COLUMNS, MAX_PARTS = 12, 6  # images per row, parts shown of a sample
MAX_LINES, LETTERS = 6, 20  # lines below an image, letters per line
CELL, GAP, HEAD, LINE, FONT_SIZE = 128, 4, 34, 15, 12  # pixels
HEIGHT = HEAD + CELL + (MAX_LINES + 2) * LINE
INK, RULE = (28, 32, 38), (212, 215, 220)


class Part(NamedTuple):
    """An image with its text, or only a text."""

    text: str
    image: SampleImage | None = None


def parts_of(sample: Sample) -> list[Part]:
    """Return the parts of a sample from left to right, the target last."""
    if isinstance(sample, TextSample):
        return [Part(sample.text)]
    if isinstance(sample, CaptionSample):
        return [Part(sample.caption, sample.image)]
    if isinstance(sample, ImageSample):
        return [Part(sample.key, sample.image)]
    if isinstance(sample, EditSample):
        texts = sample.caption, f"to: {sample.instruction}"
        return [Part(text, image) for pair in sample.pairs for text, image in zip(texts, pair, strict=True)]
    if isinstance(sample, ConstructedSample):
        crops = [
            Part(f"{entity.text}, {name}", image)
            for entity in sample.entities
            for name, image in (("background", entity.background), ("white", entity.white))
        ]
        return [*crops, Part(f"target: {sample.caption}", sample.target)]
    parts = [Part(item) if isinstance(item, str) else Part("", item) for item in sample.segments]
    return [*parts, Part("target", sample.target)] if isinstance(sample, InstructionSample) else parts


def draw_sheet(samples: Mapping[str, Sequence[Sample]], file: Path) -> None:
    """Draw a PNG with one row per kind, with as many samples as fit. Texts are below their images."""
    page = Image.new("RGB", (COLUMNS * (CELL + GAP) + GAP * COLUMNS, max(len(samples), 1) * HEIGHT), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=FONT_SIZE)
    for row, (kind, row_samples) in enumerate(samples.items()):
        top, left = row * HEIGHT, GAP
        draw.text((GAP, top + GAP), kind, fill=INK, font=font)
        draw.line([(GAP, top + HEAD - 2 * GAP), (page.width - GAP, top + HEAD - 2 * GAP)], fill=RULE)
        for sample in row_samples:
            try:
                parts = [Part(text, image and load(image)) for text, image in parts_of(sample)]
            except SampleError:  # with captions_only, images were not checked
                continue
            parts = parts if len(parts) <= MAX_PARTS else [*parts[: MAX_PARTS - 1], parts[-1]]
            if left + len(parts) * (CELL + GAP) > page.width:
                break
            for part in parts:
                _draw_part(page, draw, font, left, top + HEAD, part)
                left += CELL + GAP
            left += GAP
    page.save(file)


def _draw_part(page: Image.Image, draw: ImageDraw.ImageDraw, font, left: int, top: int, part: Part) -> None:
    max_lines = MAX_LINES if part.image is not None else HEIGHT // LINE - 3
    lines = textwrap.wrap(part.text, LETTERS, max_lines=max_lines, placeholder="…")
    if isinstance(pixels := part.image, Image.Image):
        tiny = 2 * max(pixels.size) <= CELL  # enlarged without blur
        method = Image.Resampling.NEAREST if tiny else Image.Resampling.LANCZOS
        page.paste(ImageOps.pad(pixels, (CELL, CELL), method, "white"), (left, top))
        draw.rectangle([left - 1, top - 1, left + CELL, top + CELL], outline=RULE)
        lines.insert(0, f"{pixels.width} x {pixels.height}")
        top += CELL + GAP
    draw.multiline_text((left, top), "\n".join(lines), fill=INK, font=font, spacing=LINE - FONT_SIZE)
