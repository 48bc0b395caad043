"""Pictures in rows and columns with their texts, as one image."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from kosmosg.image_processing import CLIP_MEAN, CLIP_STD

CELL, GAP, TEXT_WIDTH, HEADER = 128, 6, 190, 22  # pixels
FONT_SIZE, LETTER_WIDTH = 13, 7
INK, FAINT, PAPER = (20, 20, 20), (120, 120, 120), (255, 255, 255)


@dataclass
class Row:
    """A text, the images it speaks of, and what was made of them."""

    text: str
    inputs: list[Image.Image]
    outputs: list[Image.Image]


def to_image(pixels: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Image.Image:
    """A normalised tensor 3×H×W as a picture; by default CLIP's normalisation is undone."""
    shape = (3, 1, 1)
    values = pixels.float().cpu() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    return Image.fromarray((values.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def contact_sheet(rows: Sequence[Row], titles: Sequence[str]) -> Image.Image:
    """Text, inputs and outputs from left to right; `titles` head the columns of outputs."""
    inputs = max((len(row.inputs) for row in rows), default=0)
    width = TEXT_WIDTH + (inputs + len(titles)) * (CELL + GAP) + GAP
    sheet = Image.new("RGB", (width, HEADER + len(rows) * (CELL + GAP)), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=FONT_SIZE)
    heads = ["prompt", *(["input"] * min(1, inputs)), *titles]
    lefts = [GAP, *([TEXT_WIDTH] * min(1, inputs)), *(_left(inputs + i) for i in range(len(titles)))]
    for head, left in zip(heads, lefts, strict=True):
        draw.text((left, GAP // 2), head, fill=FAINT, font=font)
    for number, row in enumerate(rows):
        top = HEADER + number * (CELL + GAP)
        lines = textwrap.wrap(row.text, (TEXT_WIDTH - 2 * GAP) // LETTER_WIDTH)
        draw.multiline_text((GAP, top), "\n".join(lines), fill=INK, font=font)
        for column, image in [*enumerate(row.inputs), *enumerate(row.outputs, start=inputs)]:
            sheet.paste(_fit(image), (_left(column), top))
    return sheet


def _left(column: int) -> int:
    return TEXT_WIDTH + column * (CELL + GAP)


def _fit(image: Image.Image) -> Image.Image:
    # Miniature pictures are enlarged in whole steps, so that what the model drew is not smoothed over.
    enlarge = image.width < CELL and CELL % image.width == 0
    return image.convert("RGB").resize((CELL, CELL), Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS)
