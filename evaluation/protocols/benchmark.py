"""Base class of the benchmarks, which define image requests and what the images are compared with.

To add a benchmark, write a class and add it to `BENCHMARKS` (evaluation/benchmarks.py), with its columns in `METRICS`.
"""

import hashlib
import json
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
MAX_PROBLEMS = 10
MAX_PIXELS = 64_000_000
"""Maximum size of an image, as in shards: a small file can hold gigabytes of pixels."""
SEED_BYTES = 6  # seeds below 2**53 are exact in JSON readers of other languages
Value = TypeVar("Value")


class EvaluationError(ValueError):
    """An error that the user can fix; the message says how."""


class DataSetError(EvaluationError):
    """A data set differs from the published layout; names each missing subject or file."""


@dataclass(frozen=True)
class Request:
    """One image to generate.

    Args:
        index: position in the data set's fixed order, and name of the image.
        prompt: prompt of systems that read images, with `<i>` for each input image.
        text: prompt of text-only systems.
        inputs: image files, relative to the data set's folder.
        seed: seed of the image's noise.
        unit: unit that the bootstrap resamples: the subject or the caption.
    """

    index: int
    prompt: str
    text: str
    inputs: tuple[str, ...]
    seed: int
    unit: str


@dataclass(frozen=True)
class Crop:
    """Part of an image, with its box in pixels: left, top, right, bottom. Networks read it like a file."""

    file: Path
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Slot:
    """Expected content of one half of an image of two subjects; see Item."""

    box: tuple[float, float, float, float]
    kind: str
    given: Path
    others: tuple[Path, ...]


@dataclass(frozen=True)
class Item:
    """An image file with everything that metrics compare it with.

    Args:
        unit: unit that the bootstrap resamples, see Request.
        text: text for CLIP-T; empty if there is none.
        references: images for subject fidelity.
        real: whether it is a photo of the data set, which FID resizes like its reference images.
        group: template of the prompt, with `{}` for the subject; empty if there is none.
        parts: parts of a breakdown that it belongs to: kind of part → (part, unit that the bootstrap resamples).
        given: input image of the system, which the image may copy.
        others: portraits of other individuals of the same kind, which the image should not show.
        labels: expected labels by label group: the subject's, as changed by the prompt.
        words: labels that the prompt asks for, by label group.
        slots: left and right half of an image of two subjects.
        asked: data for the benchmark's own metrics, by name.
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
    """A prompt of a benchmark; see Request. `item` lacks only the image file."""

    prompt: str
    text: str
    inputs: tuple[str, ...]
    item: Item


class Benchmark:
    """A data set under a protocol, checked at construction.

    Args:
        folder: folder of the data set.

    Raises:
        DataSetError: names what is missing.
    """

    tables: ClassVar[dict[str, str]]
    """Titles of its tables by name; the first table has the benchmark's name."""
    protocol_type: ClassVar[type[Protocol]]
    prompts: list[Prompt]
    """All prompts, in a fixed order."""
    list_file: Path
    """List of its prompts in the data set's folder."""
    subjects: Mapping[str, Any] = {}
    """Subjects by name (`Request.unit`), each with a `class_noun` and a `kind`; empty if requests have none."""

    def __init__(self, protocol: Any, folder: Path):
        self.protocol, self.folder = protocol, folder
        self.repeats: int = getattr(protocol, "images_per_prompt", 1)

    def files(self) -> list[Path]:
        """Return all files that the scores depend on: by default the list of prompts and the input images."""
        return [self.list_file, *{self.folder / name for prompt in self.prompts for name in prompt.inputs}]

    def requests(self) -> list[Request]:
        """Return all requests; the repeats of a prompt are consecutive."""
        sampling = self.protocol.sampling
        return [
            Request(
                number * self.repeats + repeat,
                prompt.prompt,
                prompt.text,
                prompt.inputs,
                image_seed(sampling.seed, number, repeat, sampling.noise_period),
                prompt.item.unit,
            )
            for number, prompt in enumerate(self.prompts)
            for repeat in range(self.repeats)
        ]

    def item(self, request: Request, file: Path) -> Item:
        """Return the item of an image made for a request."""
        return replace(self.prompts[request.index // self.repeats].item, file=file)

    def baselines(self) -> dict[str, list[Item]]:
        """Return the items of rows without generated images, by row name."""
        return {}

    def references(self) -> list[Path]:
        """Return the real images of metrics that compare sets of images."""
        return []

    def kept_image(self, subject: str) -> Path:
        """Return the input image of a subject."""
        raise NotImplementedError(f"{type(self).__name__} has no subjects.")

    def check_networks(self, networks: Mapping[str, Any]) -> None:
        """Check that the networks know all labels and classes of the benchmark.

        Raises:
            EvaluationError: names what a network does not know.
        """

    def notes(self, bootstrap: Any, scores: Sequence[Any]) -> list[str]:
        """Return the notes below its tables.

        Args:
            bootstrap: an evaluation.scores.bootstrap.Bootstrap.
            scores: scores of its tables.
        """
        return []


def parse_rows(rows: Iterable, parse: Callable[[Any], Value], where: str, kind: str = "line") -> list[Value]:
    """Parse all rows.

    Raises:
        DataSetError: names each row for which `parse` raises KeyError, TypeError or ValueError.
    """
    parsed, problems = [], []
    for number, row in enumerate(rows, 1):
        try:
            parsed.append(parse(row))
        except (KeyError, TypeError, ValueError) as error:
            message = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
            problems.append(f"{kind} {number}: {message}")
    if problems:
        raise DataSetError(f"{where}: {list_problems(problems)}")
    return parsed


def list_problems(problems: Sequence[str]) -> str:
    """Join the first ten problems, with the number of the others."""
    more = f"; and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
    return "; ".join(problems[:MAX_PROBLEMS]) + more + "."


def read_rows(file: Path, lines: bool) -> list[dict[str, Any]]:
    """Read the objects of a JSON list, or of JSON lines.

    Raises:
        DataSetError: the file is missing, empty or of another structure.
    """
    if not file.is_file():
        raise DataSetError(f"'{file}' does not exist; see docs/evaluation.md for the expected layout.")

    def read(text: bytes) -> list[dict[str, Any]]:
        content: Any = json.loads(decode_text(text)) if text.strip() else []
        rows = [content] if lines and text.strip() else content
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"expected {'an object' if lines else 'a list of objects'}")
        return rows

    # Split at "\n" only: JSON strings may contain other line separators.
    texts = file.read_bytes().split(b"\n") if lines else [file.read_bytes()]
    rows = [row for parsed in parse_rows(texts, read, f"'{file}'") for row in parsed]
    if not rows:
        raise DataSetError(f"'{file}' is empty.")
    return rows


def inner_file(folder: Path, name: str) -> Path:
    """Return a file of the data set by relative name. Raises ValueError if it is missing or outside of the folder."""
    file, root = (folder / name).resolve(), folder.resolve()
    if not file.is_relative_to(root):
        raise ValueError(f"'{name}' lies outside of the folder")
    if not file.is_file():
        raise ValueError(f"the file '{name}' is missing")
    return folder / file.relative_to(root)


def image_seed(protocol_seed: int, index: int, repeat: int = 0, period: int | None = None) -> int:
    """Return the seed of one image: a hash of the protocol's seed, the prompt's index and the repeat.

    With `period`, prompts this far apart share their seeds.
    """
    position = index if period is None else index % period
    digest = hashlib.sha256(f"{protocol_seed}:{position}:{repeat}".encode()).digest()
    return int.from_bytes(digest[:SEED_BYTES], "big")


def spread(items: Sequence, count: int | None) -> list:
    """Return `count` evenly spaced items, in order; all items if `count` is None or larger."""
    if count is None or count >= len(items):
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def read_image(of: Path | str | Crop, upright: bool = False) -> Image.Image:
    """Read an image file or a crop of at least one pixel, in RGB.

    Args:
        upright: apply the EXIF orientation.

    Raises:
        DataSetError: the file is not a readable image.
    """
    file = of.file if isinstance(of, Crop) else of
    try:
        with Image.open(file, formats=FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise ValueError(f"{opened.width}×{opened.height}; at most {MAX_PIXELS} pixels are allowed")
            opened.load()  # before the file is closed
            image = rgb(opened, turn=upright)
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise DataSetError(f"'{file}' cannot be read as an image ({error}); restore it from the data set.") from error
    if not isinstance(of, Crop):
        return image
    left, top, right, bottom = map(round, of.box)
    left, top = min(max(left, 0), image.width - 1), min(max(top, 0), image.height - 1)
    return image.crop((left, top, max(left + 1, min(right, image.width)), max(top + 1, min(bottom, image.height))))
