"""What is asked of a system (one image each), and what is scored."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from kosmosg.image_processing import FORMATS, rgb

SHOWN_PROBLEMS = 10
MOST_PIXELS = 64_000_000
"""Of an image, as in shards: a small file can hold gigabytes of pixels."""
SEED_BYTES = 6  # seeds stay below 2**53, which JSON readers in other languages keep exactly


class EvaluationError(ValueError):
    """Something that a user can put right; the message says what."""


class DataSetError(EvaluationError):
    """A data set that is not as published; names each subject or file that is missing."""


@dataclass(frozen=True)
class Request:
    """One image to be made.

    Args:
        index: position in the data set's fixed order; the image's name.
        prompt: fed to systems that read images, with `<i>` for each input.
        text: fed to systems that read text alone, and scored by CLIP-T.
        inputs: image files, relative to the data set's folder.
        seed: of the image's own noise.
        unit: what the bootstrap draws: the subject, or the caption.
    """

    index: int
    prompt: str
    text: str
    inputs: tuple[str, ...]
    seed: int
    unit: str


@dataclass(frozen=True)
class Slot:
    """What one half of an image of two subjects should show; see Item."""

    kind: str
    given: Path
    others: tuple[Path, ...]


@dataclass(frozen=True)
class Item:
    """An image file with all that metrics compare it with.

    Args:
        unit: what the bootstrap draws, see Request.
        text: what CLIP-T compares it with; empty where there is none.
        references: what subject fidelity is measured against.
        real: a photo of the data set, which FID resizes as its real side.
        group: of the prompt, for breakdowns: its template, with `{}` for the subject; empty where there is none.
        given: the input image that the system saw, of which it may be a copy.
        others: portraits of other individuals of the same kind, of which none should be in the image.
        labels: what a judge should see, by label group: of the subject, as the words change it.
        words: what the prompt's words ask for, by label group.
        slots: of an image of two subjects: the left half's, the right half's.
        asked: what else the benchmark's own metrics read, by name.
    """

    file: Path
    unit: str
    text: str
    references: tuple[Path, ...] = ()
    real: bool = False
    group: str = ""
    given: Path | None = None
    others: tuple[Path, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)
    slots: tuple[Slot, ...] = ()
    asked: Mapping[str, Any] = field(default_factory=dict)


def named_problems(problems: Sequence[str]) -> str:
    """The first ten, and how many more."""
    more = f"; and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
    return "; ".join(problems[:SHOWN_PROBLEMS]) + more + "."


def inner_file(folder: Path, name: str) -> Path:
    """A file that a list of the data set names, in its folder. Raises ValueError: there is none."""
    file, root = (folder / name).resolve(), folder.resolve()
    if not file.is_relative_to(root):
        raise ValueError(f"'{name}' lies outside of the folder")
    if not file.is_file():
        raise ValueError(f"the file '{name}' is missing")
    return folder / file.relative_to(root)


def image_seed(protocol_seed: int, index: int, repeat: int = 0, period: int | None = None) -> int:
    """The seed of one image: a hash of the protocol's seed, the prompt's index and which repeat of the prompt it is.

    With `period`, prompts that far apart share their seeds.
    """
    position = index if period is None else index % period
    digest = hashlib.sha256(f"{protocol_seed}:{position}:{repeat}".encode()).digest()
    return int.from_bytes(digest[:SEED_BYTES], "big")


def spread(items: Sequence, count: int | None) -> list:
    """`count` of `items`, evenly spread, in order; all of them where `count` is None or larger."""
    if count is None or count >= len(items):
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def read_image(file: Path | str, upright: bool = False) -> Image.Image:
    """The image in RGB.

    Args:
        upright: turn it as its EXIF orientation says.

    Raises:
        DataSetError: the file is no readable image; names it.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width}×{image.height}, at most {MOST_PIXELS} pixels are read")
            image.load()  # before the file is closed
            return rgb(image, turn=upright)
    except Exception as error:  # decoders of Pillow raise many kinds on damaged files
        raise DataSetError(f"'{file}' cannot be read as an image ({error}); restore it from the data set.") from error
