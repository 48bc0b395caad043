"""A benchmark: what is asked of every system, and what its images are compared with.

A new one is a class in a file and a line in `BENCHMARKS` (evaluation/benchmarks.py); its columns, a line in `METRICS`.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from PIL import Image

from evaluation.protocols.protocol import Protocol
from kosmosg.files import decode_text
from kosmosg.image_processing import FORMATS, rgb

REAL_IMAGES = "Real images"
COPY_OF_INPUT = "Copy of the input"
SHOWN_PROBLEMS = 10
MOST_PIXELS = 64_000_000
"""Of an image, as in shards: a small file can hold gigabytes of pixels."""
SEED_BYTES = 6  # seeds stay below 2**53, which JSON readers in other languages keep exactly
Value = TypeVar("Value")


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
        text: fed to systems that read text alone.
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
class Crop:
    """A part of an image, by its box in pixels: left, top, right, bottom. Networks look at it as at a file."""

    file: Path
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Slot:
    """What a part of an image of two subjects should show; see Item."""

    box: tuple[float, float, float, float]
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
        group: of the prompt: its template, with `{}` for the subject; empty where there is none.
        parts: what it counts for in breakdowns: by what → (part, the unit that the bootstrap draws there).
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
    parts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    given: Path | None = None
    others: tuple[Path, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)
    slots: tuple[Slot, ...] = ()
    asked: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """A prompt of a benchmark; see Request. `item` is what its images are compared with, its file left open."""

    prompt: str
    text: str
    inputs: tuple[str, ...]
    item: Item


class Benchmark(ABC):
    """A data set under a protocol, checked when it is made.

    Args:
        folder: holds the data set.

    Raises:
        DataSetError: what is missing there, by name.
    """

    tables: ClassVar[dict[str, str]]
    """The titles of its tables by name; the first one has the benchmark's own name."""
    protocol_type: ClassVar[type[Protocol]]
    prompts: list[Prompt]
    """All that is asked, in a fixed order."""
    subjects: Mapping[str, Any] = {}
    """Where requests are of single subjects (`Request.unit`): each with a `class_noun` and a `kind`."""

    def __init__(self, protocol: Any, folder: Path):
        self.protocol, self.folder = protocol, folder
        self.repeats: int = getattr(protocol, "images_per_prompt", 1)

    @abstractmethod
    def files(self) -> list[Path]:
        """Every file that a number depends on."""

    def requests(self) -> list[Request]:
        """Prompt by prompt, repeat by repeat."""
        sampling = self.protocol.sampling
        return [
            Request(
                number * self.repeats + repeat,
                asked.prompt,
                asked.text,
                asked.inputs,
                image_seed(sampling.seed, number, repeat, sampling.noise_period),
                asked.item.unit,
            )
            for number, asked in enumerate(self.prompts)
            for repeat in range(self.repeats)
        ]

    def item(self, request: Request, file: Path) -> Item:
        """The image that was made for a request, with all that metrics compare it with."""
        return replace(self.prompts[request.index // self.repeats].item, file=file)

    def baselines(self) -> dict[str, list[Item]]:
        """Rows that nobody draws, by name."""
        return {}

    def references(self) -> list[Path]:
        """The real side of metrics that compare sets of images."""
        return []

    def kept_image(self, subject: str) -> Path:
        """The one image of a subject that a model is given."""
        raise NotImplementedError(f"{type(self).__name__} has no subjects.")

    def check_networks(self, networks: Mapping[str, Any]) -> None:
        """Refuse networks that do not know what they will be asked.

        Raises:
            EvaluationError: says what they do not know.
        """
        return

    def notes(self, bootstrap: Any, scores: Sequence[Any]) -> list[str]:
        """What a reader of its tables must know.

        Args:
            bootstrap: evaluation.scores.bootstrap.Bootstrap.
            scores: of its tables.
        """
        return []


def read_all(rows: Iterable, read: Callable[[Any], Value], where: str, kind: str = "line") -> list[Value]:
    """`read` of every row.

    Raises:
        DataSetError: names each row for which it raises KeyError, TypeError or ValueError.
    """
    found, problems = [], []
    for number, row in enumerate(rows, 1):
        try:
            found.append(read(row))
        except (KeyError, TypeError, ValueError) as error:
            told = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
            problems.append(f"{kind} {number}: {told}")
    if problems:
        raise DataSetError(f"{where}: {named_problems(problems)}")
    return found


def named_problems(problems: Sequence[str]) -> str:
    """The first ten, and how many more."""
    more = f"; and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
    return "; ".join(problems[:SHOWN_PROBLEMS]) + more + "."


def read_rows(file: Path, lines: bool) -> list[dict[str, Any]]:
    """The objects of a JSON list, or one a line.

    Raises:
        DataSetError: there is no such file, or it holds something else.
    """
    if not file.is_file():
        raise DataSetError(f"'{file}' does not exist; see docs/evaluation.md for the layout that is expected.")

    def read(text: bytes) -> list[dict[str, Any]]:
        found: Any = json.loads(decode_text(text)) if text.strip() else []
        rows = [found] if lines and text.strip() else found
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"this is no {'object' if lines else 'list of objects'}")
        return rows

    # Lines end at "\n" alone: a string of JSON may hold other line separators.
    texts = file.read_bytes().split(b"\n") if lines else [file.read_bytes()]
    rows = [row for found in read_all(texts, read, f"'{file}'") for row in found]
    if not rows:
        raise DataSetError(f"'{file}' is empty.")
    return rows


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


def read_image(of: Path | str | Crop, upright: bool = False) -> Image.Image:
    """An image file, or at least one pixel of a part of it, in RGB.

    Args:
        upright: turn it as its EXIF orientation says.

    Raises:
        DataSetError: the file is no readable image; names it.
    """
    file = of.file if isinstance(of, Crop) else of
    try:
        with Image.open(file, formats=FORMATS) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise ValueError(f"{opened.width}×{opened.height}, at most {MOST_PIXELS} pixels are read")
            opened.load()  # before the file is closed
            image = rgb(opened, turn=upright)
    except Exception as error:  # decoders of Pillow raise many kinds on damaged files
        raise DataSetError(f"'{file}' cannot be read as an image ({error}); restore it from the data set.") from error
    if not isinstance(of, Crop):
        return image
    left, top, right, bottom = map(round, of.box)
    left, top = min(max(left, 0), image.width - 1), min(max(top, 0), image.height - 1)
    return image.crop((left, top, max(left + 1, min(right, image.width)), max(top + 1, min(bottom, image.height))))
