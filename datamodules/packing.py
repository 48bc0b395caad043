"""Full-sentence packing: rows of stage 1 filled with whole units of one or more documents (paper section 3.1).

A unit is a sentence or an image with its marks. A document opens with `<s>` and closes with `</s>`. A row is filled
until the next unit does not fit; what is left of that document then comes in other rows.

Shift: a row packs up to T+1 tokens x_0 … x_T. `ids` are x_0 … x_{T-1} and `labels[t]` is x_{t+1}, the token after
`ids[t]`. A label is -100 where there is nothing to learn: padding, `<image>`, its tokens and `</image>` (the loss is on
text tokens only), and the `<s>` of the next document. `</s>` is learned.
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
    """What is never divided: the ids of a sentence, or an image."""

    ids: list[int]
    image: SampleImage | None = None


@dataclass
class Document:
    """Units of one sample in order. One that is not `divisible` is taken whole or not at all."""

    units: list[Unit]
    divisible: bool
    shard: str = ""
    key: str = ""


@dataclass
class PackedRow:
    """prompt: the tokens of the row, without padding; labels (T,) int64; documents: `shard/key` of each."""

    prompt: EncodedPrompt
    labels: Tensor
    documents: list[str] = field(default_factory=list)


class Packer:
    """Segments → units, units → rows of a fixed length.

    Args:
        encoder: its tokenizer, image transform and tokens per image are used.
        sequence_length: T.

    Raises:
        ValueError: a row would not hold even one image.
    """

    def __init__(self, encoder: PromptEncoder, sequence_length: int):
        self.tokenizer, self.image_transform = encoder.tokenizer, encoder.image_transform
        self.image_ids = [self.tokenizer.image_id] * (1 + encoder.image_tokens) + [self.tokenizer.image_end_id]
        self.capacity = sequence_length + 1
        self.longest_unit = self.capacity - 2  # beside <s> and </s>
        if self.longest_unit < len(self.image_ids):
            raise ValueError(
                f"sequence_length={sequence_length} cannot hold an image of {len(self.image_ids)} tokens between <s> "
                "and </s>."
            )

    def image(self, image: SampleImage) -> Unit:
        """An image with its marks."""
        return Unit(self.image_ids, image)

    def words(self, text: str) -> list[Unit]:
        """A text as one unit."""
        return [Unit(self.tokenizer.encode(text))]

    def sentences(self, text: str) -> list[Unit]:
        """The sentences of a text. One longer than a row is cut into pieces that fit: it would never be read."""
        units = []
        for sentence in SENTENCE_END.split(text):
            ids = self.tokenizer.encode(sentence)
            units += [Unit(ids[i : i + self.longest_unit]) for i in range(0, len(ids), self.longest_unit)]
        return units

    def rest(self, document: Document, fraction: float) -> Document:
        """The document from the unit on in which this fraction of its tokens is reached; all of one that is not
        `divisible`."""
        if document.divisible:
            ends = list(itertools.accumulate(len(unit.ids) for unit in document.units))
            document.units = document.units[bisect_right(ends, fraction * ends[-1]) :]
        return document

    def fit(self, document: Document, room: int) -> int:
        """How many units of the document go into `room` tokens, `<s>` included; `</s>` must fit after the last."""
        room -= 1
        for number, unit in enumerate(document.units):
            closing = number == len(document.units) - 1
            if len(unit.ids) + closing > room:
                return number if document.divisible else 0
            room -= len(unit.ids)
        return len(document.units)

    def pack(self, documents: Iterable[Document], report: ReadReport) -> PackedRow | None:
        """Fill one row; None if not even one unit of all `documents` could be used.

        Documents are taken until one does not fit whole. Images are decoded only of the units that take part; a
        document with an unreadable one is left out, and `report` takes the error.
        """
        packed: list[int] = []
        images: list[Tensor] = []
        names: list[str] = []
        for document in documents:
            count = self.fit(document, self.capacity - len(packed))
            if not count and not packed:
                detail = f"{sum(len(unit.ids) for unit in document.units)} tokens, a row takes {self.longest_unit}"
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
        ids, following = row[:-1], row[1:]
        not_learned = torch.tensor([tokenizer.pad_id, tokenizer.bos_id, tokenizer.image_id, tokenizer.image_end_id])
        labels = following.masked_fill(torch.isin(following, not_learned), IGNORED_LABEL)
        # <image> and the image tokens after it share an id: the first of a run is the mark.
        is_image = ids == tokenizer.image_id
        mask = is_image & torch.cat([torch.zeros(1, dtype=torch.bool), is_image[:-1]])
        length = min(len(packed), len(ids))
        return PackedRow(EncodedPrompt(ids[:length], mask[:length], images), labels, names)
