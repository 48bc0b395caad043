"""Instructions with any number of images: tables with columns for the prompt, its images and the target image.

docs/data.md lists settings for public data sets: MetaQuery-Instruct, Subjects200K, UNO-1M, X2I2, Echo-4o. Images are
paths in `store`, members of tars or zips there, or bytes in Parquet, also as the Hub's {"bytes", "path"}.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from datamodules.images import SampleImage, StoredImage
from datamodules.sample import InstructionSample
from datamodules.sources.converter import as_jpeg, at_least
from datamodules.sources.files import Record
from datamodules.sources.image_store import StoreConfig, StoreConverter
from datamodules.sources.tables import parse, text_of, value_of

HALVES = ("left", "right")


@dataclass
class InstructionsConfig(StoreConfig):
    """Settings of instructions."""

    prompt: str = "prompt"
    """Column of the prompt. In all column names, `a.b` is `b` inside `a`."""
    inputs: list[str] = field(default_factory=lambda: ["source_images"])
    """Columns of the input images, in order. Each contains one image, a list of images or null."""
    target: str = "target_image"
    """Column of the target image."""
    target_half: str | None = None
    """left or right: each row has one image of two halves; this half is the target and the other one the input.
    `target` is then ignored."""
    half_margin: int = 0
    """Pixels to cut off at each side of both halves."""
    placeholder: str | None = None
    """Regular expression of an image's placeholder in the prompt. If it has a group, this is the image's number from 1,
    as in `<img(\\d+)>`; otherwise images are used in order, as in `<image>`. Images without a placeholder come before
    the prompt."""

    def __post_init__(self):
        super().__post_init__()
        at_least("half_margin", self.half_margin, 0)
        if self.target_half not in (None, *HALVES):
            raise ValueError(f"target_half='{self.target_half}' must be null, left or right.")
        try:
            groups = re.compile(self.placeholder or "").groups
        except re.error as error:
            raise ValueError(f"placeholder='{self.placeholder}' is not a regular expression: {error}.") from error
        if groups > 1:
            raise ValueError(f"placeholder='{self.placeholder}' must have at most one group; use (?:…) for others.")


class Instructions(StoreConverter[InstructionsConfig]):
    """Converts rows to instruction samples."""

    schema = InstructionsConfig

    def __init__(self, source: Path, config: InstructionsConfig):
        super().__init__(source, config)
        self.columns = [config.prompt, *config.inputs, *([] if config.target_half else [config.target])]

    def samples(self, record: Record, skipped: Counter[str]) -> Iterable[InstructionSample]:
        config, row = self.config, parse(record)
        prompt = text_of(record, value_of(record, row, config.prompt), config.prompt)
        images = [self.store.image(record, config, value) for value in self._values(record, row)]
        if config.target_half:
            target, *images = self._halves(record, images)
        else:
            target = self.store.image(record, config, value_of(record, row, config.target))
        segments = self._segments(record, prompt, images)
        if not any(isinstance(segment, str) for segment in segments):
            raise record.error("empty_text", f"{config.prompt} contains no text")
        return [InstructionSample(segments, target)]

    def _values(self, record: Record, row: dict) -> Iterator[Any]:
        for column in self.config.inputs:
            value = value_of(record, row, column)
            yield from value if isinstance(value, list) else [] if value is None else [value]

    def _halves(self, record: Record, images: list[StoredImage]) -> list[StoredImage]:
        """Return the target half and the input half of the row's only image."""
        if len(images) != 1:
            raise record.error("invalid_field", f"{len(images)} images, target_half needs exactly one")
        pixels, margin = images[0].load(), self.config.half_margin
        half, height = pixels.width // 2, pixels.height
        if min(half, height) <= 2 * margin:
            raise record.error("invalid_field", f"{pixels.width}×{height} leaves nothing with half_margin={margin}")
        boxes = [(left + margin, margin, left + half - margin, height - margin) for left in (0, pixels.width - half)]
        halves = [as_jpeg(images[0], pixels.crop(box), self.config.images.quality) for box in boxes]
        return halves if self.config.target_half == "left" else halves[::-1]

    def _segments(self, record: Record, prompt: str, images: list[StoredImage]) -> list[str | SampleImage]:
        texts, numbers = [prompt], list[int]()
        if self.config.placeholder:
            pattern = re.compile(self.config.placeholder)
            parts = pattern.split(prompt)  # with a group: text, number, text, number, text
            texts = parts[:: pattern.groups + 1]
            numbers = [self._number(n) for n in parts[1::2]] if pattern.groups else list(range(len(texts) - 1))
        if not all(0 <= number < len(images) for number in numbers):
            listed = ", ".join(str(number + 1) for number in numbers)
            raise record.error("invalid_placeholder", f"the prompt mentions image {listed} of {len(images)}")
        segments: list[str | SampleImage] = [image for i, image in enumerate(images) if i not in numbers]
        for text, number in zip_longest(texts, numbers):
            segments += [text.strip()] if text.strip() else []
            segments += [] if number is None else [images[number]]
        return segments

    def _number(self, digits: str | None) -> int:
        return int(digits) - 1 if digits and digits.isdecimal() and len(digits) < 10 else -1
