"""PNG sheets for a README: rows of inputs and outputs, with headers."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from evaluation.protocols.requests import read_image

CELL, GAP, MARGIN, DIVIDER = 128, 6, 14, 14  # pixels
FONT_SIZE, LINE, LETTER = 13, 17, 7
INK, FAINT, PAPER, RULE = (28, 32, 38), (112, 118, 128), (255, 255, 255), (212, 215, 220)


def sheet(
    columns: Sequence[str], rows: Sequence[Sequence[Path | Image.Image | str]], *, inputs: int = 1
) -> Image.Image:
    """Images in rows under column headers; the first `inputs` columns stand apart from the others.

    Args:
        rows: as long as `columns`; a text is written into its cell.
    """
    headers = [textwrap.wrap(text, CELL // LETTER) or [""] for text in columns]
    head = max(map(len, headers)) * LINE + GAP if any(columns) else 0
    lefts = [MARGIN + i * (CELL + GAP) + (DIVIDER if i >= inputs else 0) for i in range(len(columns))]
    page = Image.new("RGB", (lefts[-1] + CELL + MARGIN, MARGIN + head + len(rows) * (CELL + GAP) - GAP + MARGIN), PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=FONT_SIZE)
    for number, (left, lines) in enumerate(zip(lefts, headers, strict=True)):
        top = MARGIN + head - GAP - len(lines) * LINE
        for line in lines:
            draw.text((left + CELL / 2, top), line, fill=FAINT if number < inputs else INK, font=font, anchor="ma")
            top += LINE
    if 0 < inputs < len(columns):
        x = lefts[inputs] - (DIVIDER + GAP) // 2
        draw.line([(x, MARGIN), (x, page.height - MARGIN)], fill=RULE)
    for number, row in enumerate(rows):
        for left, cell in zip(lefts, row, strict=True):
            top = MARGIN + head + number * (CELL + GAP)
            if isinstance(cell, str):
                lines = "\n".join(textwrap.wrap(cell, CELL // LETTER))
                draw.multiline_text((left, top + CELL / 2), lines, fill=INK, font=font, anchor="lm")
            else:
                page.paste(fit(cell), (left, top))
    return page


def contact_sheet(pictures: Sequence[Path | Image.Image], captions: Sequence[str], columns: int = 10) -> Image.Image:
    """Pictures in rows of `columns`, each with a line of text below."""
    step, wide = CELL + LINE + 2 * GAP, min(columns, len(pictures))
    size = (2 * MARGIN + wide * (CELL + GAP) - GAP, 2 * MARGIN + -(-len(pictures) // columns) * step - GAP)
    page = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=FONT_SIZE)
    for place, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = MARGIN + place % columns * (CELL + GAP), MARGIN + place // columns * step
        page.paste(fit(picture), (left, top))
        line = textwrap.shorten(caption, CELL // LETTER, placeholder="…")
        draw.text((left + CELL / 2, top + CELL + GAP), line, fill=FAINT, font=font, anchor="ma")
    return page


def fit(picture: Path | Image.Image, side: int = CELL) -> Image.Image:
    """The picture at the size of a cell; whole multiples of small pictures keep their pixels sharp."""
    image = picture.convert("RGB") if isinstance(picture, Image.Image) else read_image(picture)
    sharp = side % image.width == 0 and image.width == image.height
    if not sharp:
        shorter = min(image.size)
        left, top = (image.width - shorter) // 2, (image.height - shorter) // 2
        image = image.crop((left, top, left + shorter, top + shorter))
    return image.resize((side, side), Image.Resampling.NEAREST if sharp else Image.Resampling.LANCZOS)
