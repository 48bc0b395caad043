"""Full-sentence packing: fill the rows of stage 1 with whole units of one or more documents (paper section 3.1).

A unit is a sentence, or an image with `<image>` and `</image>`. A document begins with `<s>` and ends with `</s>`. A
row is filled until the next unit does not fit; the remaining units of that document go into other rows.

A row packs up to T+1 tokens x_0 … x_T. `ids` are x_0 … x_{T-1} and `labels[t]` is x_{t+1}, the token after `ids[t]`.
The loss is on text tokens and `</s>`: labels of padding, `<image>`, image tokens, `</image>` and `<s>` are -100.
"""

import itertools
import re
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from datamodules.errors import FilteredSample, SampleError
from datamodules.images import SampleImage, load
from kosmosg.batches import ReadReport
from kosmosg.losses import IGNORED_LABEL
from kosmosg.prompt import EncodedPrompt, PromptEncoder

SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\s*\n\s*")


@dataclass
class Unit:
    """The smallest part of a document, never split: a sentence or an image."""

    ids: list[int]
    image: SampleImage | None = None


@dataclass
class Document:
    """The units of one sample in order. A document that is not `divisible` is packed whole or not at all."""

    units: list[Unit]
    divisible: bool
    shard: str = ""
    key: str = ""


@dataclass
class PackedRow:
    """One row.

    Attributes:
        prompt: the tokens, without padding.
        labels: (T,) int64.
        documents: `shard/key` of each document in the row.
    """

    prompt: EncodedPrompt
    labels: Tensor
    documents: list[str] = field(default_factory=list)


class Packer:
    """Splits segments into units and packs units into rows of a fixed length.

    Args:
        encoder: provides the tokenizer, the image transform and the number of tokens per image.
        sequence_length: T.

    Raises:
        ValueError: an image does not fit into a row.
    """

    def __init__(self, encoder: PromptEncoder, sequence_length: int):
        self.tokenizer, self.image_transform = encoder.tokenizer, encoder.image_transform
        self.image_ids = [self.tokenizer.image_id] * (1 + encoder.image_tokens) + [self.tokenizer.image_end_id]
        self.capacity = sequence_length + 1
        self.longest_unit = self.capacity - 2  # without <s> and </s>
        if self.longest_unit < len(self.image_ids):
            raise ValueError(
                f"sequence_length={sequence_length} cannot hold an image of {len(self.image_ids)} tokens between <s> "
                "and </s>."
            )

    def image(self, image: SampleImage) -> Unit:
        """Return an image as a unit, with `<image>` and `</image>`."""
        return Unit(self.image_ids, image)

    def text(self, text: str) -> Unit:
        """Return a whole text as one unit."""
        return Unit(self.tokenizer.encode(text))

    def sentences(self, text: str) -> list[Unit]:
        """Return the sentences of a text. Sentences longer than a row are cut; otherwise they could not be used."""
        units = []
        for sentence in SENTENCE_END.split(text):
            ids = self.tokenizer.encode(sentence)
            units += [Unit(ids[i : i + self.longest_unit]) for i in range(0, len(ids), self.longest_unit)]
        return units

    def skip(self, document: Document, fraction: float) -> Document:
        """Skip this fraction of a document's tokens: drop the units that end within it. Indivisible ones stay whole."""
        if document.divisible:
            ends = list(itertools.accumulate(len(unit.ids) for unit in document.units))
            document.units = document.units[bisect_right(ends, fraction * ends[-1]) :]
        return document

    def fit(self, document: Document, room: int) -> int:
        """Return how many units of a document fit into `room` tokens with `<s>`, and `</s>` after the last unit."""
        room -= 1
        for number, unit in enumerate(document.units):
            closing = number == len(document.units) - 1
            if len(unit.ids) + closing > room:
                return number if document.divisible else 0
            room -= len(unit.ids)
        return len(document.units)

    def pack(self, documents: Iterable[Document], report: ReadReport) -> PackedRow | None:
        """Fill one row with `documents` until one does not fit completely; None if none of them could be used.

        Only images of packed units are decoded. If one is unreadable, its document is skipped and the error is added to
        `report`.
        """
        packed: list[int] = []
        images: list[Tensor] = []
        names: list[str] = []
        for document in documents:
            count = self.fit(document, self.capacity - len(packed))
            if not count and not packed:
                detail = f"{sum(len(unit.ids) for unit in document.units)} tokens, at most {self.longest_unit}"
                report.errors.append(FilteredSample("too_long", document.shard, document.key, detail))
                continue
            units = document.units[:count]
            try:
                added = [self.image_transform(load(unit.image)) for unit in units if unit.image is not None]
            except SampleError as error:
                report.errors.append(error)
                continue
            if units:
                packed += [self.tokenizer.bos_id, *(i for unit in units for i in unit.ids)]
                images += added
                names.append(f"{document.shard}/{document.key}")
            if count < len(document.units):
                break
            packed.append(self.tokenizer.eos_id)
        return self._row(packed, images, names) if packed else None

    def _row(self, packed: list[int], images: list[Tensor], names: list[str]) -> PackedRow:
        tokenizer = self.tokenizer
        row = torch.full((self.capacity,), tokenizer.pad_id)
        row[: len(packed)] = torch.tensor(packed)
        ids, labels = row[:-1], row[1:]
        ignored = torch.tensor([tokenizer.pad_id, tokenizer.bos_id, tokenizer.image_id, tokenizer.image_end_id])
        labels = labels.masked_fill(torch.isin(labels, ignored), IGNORED_LABEL)
        # <image> and the image tokens after it have the same id; the first of each run is <image>.
        is_image = ids == tokenizer.image_id
        mask = is_image & torch.cat([torch.zeros(1, dtype=torch.bool), is_image[:-1]])
        length = min(len(packed), len(ids))
        return PackedRow(EncodedPrompt(ids[:length], mask[:length], images), labels, names)
