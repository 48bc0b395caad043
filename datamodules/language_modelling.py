"""Stage 1 data: text, image-caption pairs and interleaved documents, mixed by tokens 5:5:2 (paper section 3.2).

All rows have the same length, so the shares of rows are also the shares of tokens, apart from padding. With
`weights_of: tokens` they are exact.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import cast

import torch

from datamodules.data_config import DataConfig, Source
from datamodules.datamodule import MixtureDataModule
from datamodules.errors import SampleError
from datamodules.mixture import MAX_ATTEMPTS, MEASURED_ROWS, Request, RowBuilder
from datamodules.order import SampleOrder
from datamodules.packing import Document, PackedRow, Packer
from datamodules.reader import SampleReader
from datamodules.sample import CaptionSample, InterleavedSample, Sample, TextSample
from datamodules.shards import ShardList
from kosmosg.batches import LanguageModellingBatch, ReadReport
from kosmosg.models.image_decoder import ImageDecoder
from kosmosg.prompt import PromptBatch, PromptEncoder

MEASURED_SAMPLES = 4096


@dataclass
class LanguageModellingDataConfig(DataConfig):
    """Data of stage 1."""

    text: Source = field(default_factory=lambda: Source(weight=5))
    """Text documents."""
    captions: Source = field(default_factory=lambda: Source(weight=5))
    """Image-caption pairs."""
    interleaved: Source = field(default_factory=lambda: Source(weight=2))
    """Documents of texts and images."""
    sequence_length: int = 2048
    """Tokens per row, T."""
    caption_first: float = 0.0
    """Probability that a caption comes before its image instead of after it (0 … 1)."""

    def __post_init__(self):
        super().__post_init__()
        if self.sequence_length < 8:
            raise ValueError(f"sequence_length={self.sequence_length} must be at least 8 tokens.")
        if not 0 <= self.caption_first <= 1:
            raise ValueError(f"caption_first={self.caption_first} must lie in 0 … 1.")


class PackedRows(RowBuilder[PackedRow]):
    """Builds packed rows of one source.

    A row begins about where the previous one ended, so that an epoch of rows reads every document about once: with the
    measured `samples_per_row` s, row `r` of a lane begins in the lane's sample ⌊r·s⌋, at the fractional part of r·s of
    this document.
    """

    def __init__(self, name: str, source: SampleReader, packer: Packer, caption_first: float):
        super().__init__(name, source)
        self.packer, self.caption_first, self.samples_per_row = packer, caption_first, 0.0

    def __call__(self, requests: Sequence[Request], report: ReadReport) -> list[tuple[PackedRow, str] | SampleError]:
        """See `RowBuilder`."""
        return [self._build(request, report) for request in requests]

    def tokens(self, row: PackedRow) -> int:
        """See `RowBuilder`."""
        return len(row.prompt)

    def measure(self) -> float:
        """See `RowBuilder`. Packs the first documents one after the other without gaps."""
        rows, used, number = 0, 0, 0
        while rows < MEASURED_ROWS and number < MEASURED_SAMPLES:
            try:
                document = self._document(self.source(0, number), Random(number))
            except SampleError:
                document = Document([], True)
            number += 1
            while document.units:
                count = self.packer.fit(document, self.packer.capacity - used)
                used += 1 + sum(len(unit.ids) for unit in document.units[:count])
                document.units = document.units[count:] if count or used > 1 else []  # [] if too long for any row
                if document.units:
                    rows, used = rows + 1, 0
                else:
                    used += 1
        return number / (rows + used / self.packer.capacity)

    def _build(self, request: Request, report: ReadReport) -> tuple[PackedRow, str] | SampleError:
        failed = len(report.errors)
        row = self.packer.pack(self._documents(request, report), report)
        if row is not None:
            return row, row.documents[0]
        # The mixture reports the returned error, so it is removed from the report here.
        if len(report.errors) > failed:
            return report.errors.pop()
        return SampleError("empty_row", self.source.shards.pattern, f"row {request.row}", "no document could be used")

    def _documents(self, request: Request, report: ReadReport) -> Iterator[Document]:
        assert self.samples_per_row, "call MixtureDataModule.measure() first"
        fraction, first = math.modf(request.row * self.samples_per_row)
        failed = len(report.errors)
        for number in itertools.count(int(first) + MAX_ATTEMPTS * request.attempt):
            if len(report.errors) - failed >= MAX_ATTEMPTS:
                return
            report.reads += 1
            try:
                document = self._document(self.source(request.lane, number), request.random)
            except SampleError as error:
                report.errors.append(error)
                continue
            yield self.packer.skip(document, fraction) if number == first else document

    def _document(self, sample: Sample, random: Random) -> Document:
        packer = self.packer
        if isinstance(sample, TextSample):
            document = Document(packer.sentences(sample.text), True)
        elif isinstance(sample, CaptionSample):
            if sample.image is None:
                raise SampleError("missing_member", sample.shard, sample.key, "no jpg, png or webp")
            caption, image = [packer.text(sample.caption)], [packer.image(sample.image)]
            pair = caption + image if random.random() < self.caption_first else image + caption
            document = Document(pair, False)
        else:
            segments = cast(InterleavedSample, sample).segments
            nested = [packer.sentences(item) if isinstance(item, str) else [packer.image(item)] for item in segments]
            document = Document([unit for units in nested for unit in units], True)
        if not document.units:
            raise SampleError("empty_text", sample.shard, sample.key, "no token is left after tokenization")
        document.shard, document.key = sample.shard, sample.key
        return document


class LanguageModellingData(MixtureDataModule):
    """Batches of stage 1.

    Args:
        encoder: tokenizer, image transform and tokens per image of the model to train.
    """

    Config = LanguageModellingDataConfig
    config: LanguageModellingDataConfig

    @classmethod
    def build(
        cls, config: LanguageModellingDataConfig, encoder: PromptEncoder, image_size: int, decoder: ImageDecoder | None
    ) -> "LanguageModellingData":
        return cls(config, encoder)

    def __init__(self, config: LanguageModellingDataConfig, encoder: PromptEncoder):
        super().__init__(config)
        self.packer = Packer(encoder, config.sequence_length)

    def sources(self) -> dict[str, Source]:
        """Return the text, captions and interleaved sources."""
        return {"text": self.config.text, "captions": self.config.captions, "interleaved": self.config.interleaved}

    def builder(self, name: str, shards: ShardList, order: SampleOrder) -> PackedRows:
        """Return the row builder of a source."""
        kind = {"text": TextSample.kind, "captions": CaptionSample.kind, "interleaved": InterleavedSample.kind}[name]
        source = SampleReader(shards, order, kind, self.config.limits)
        return PackedRows(name, source, self.packer, self.config.caption_first)

    def collate(self, rows: list[PackedRow], report: ReadReport) -> LanguageModellingBatch:
        """Make a batch of rows, padded to T tokens."""
        prompt = PromptBatch.stack([row.prompt for row in rows], self.packer.tokenizer.pad_id, len(rows[0].labels))
        return LanguageModellingBatch(prompt=prompt, labels=torch.stack([row.labels for row in rows]), report=report)
