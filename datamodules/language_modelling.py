"""Stage 1 data: text, image-caption pairs and interleaved documents, mixed by tokens 5:5:2 (paper section 3.2).

Every row has the same length, so mixing rows 5:5:2 mixes tokens 5:5:2 up to padding, and with `weights_of: tokens`
without that.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import cast

import torch

from datamodules.data_config import DataConfig, Source
from datamodules.datamodule import MixtureDataModule
from datamodules.errors import SampleError
from datamodules.mixture import MAX_ATTEMPTS, Request, SampleSource
from datamodules.order import Permutation, mix
from datamodules.packing import Document, PackedRow, Packer
from datamodules.sample import CaptionSample, InterleavedSample, Sample, TextSample
from kosmosg.batches import LanguageModellingBatch, ReadReport
from kosmosg.models.image_decoder import ImageDecoder
from kosmosg.prompt import PromptBatch, PromptEncoder

LOOK_AHEAD = 8  # documents asked of an object store at once


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
    """Tokens of every row, T."""
    caption_first: float = 0.0
    """Probability that a caption stands before its image instead of after it (0 … 1)."""

    def __post_init__(self):
        super().__post_init__()
        if self.sequence_length < 8:
            raise ValueError(f"sequence_length={self.sequence_length} must be at least 8 tokens.")
        if not 0 <= self.caption_first <= 1:
            raise ValueError(f"caption_first={self.caption_first} must lie in 0 … 1.")


class PackedRows:
    """Builds rows of one source: the row's own sample first, then those that follow it until the row is full.

    In text the following documents are those of the shards' order. Pairs and interleaved documents follow each other
    in an order of their own every epoch, since neighbours in a shard are often alike.
    """

    def __init__(self, name: str, source: SampleSource, packer: Packer, seed: int, caption_first: float):
        self.name, self.source, self.packer = name, source, packer
        self.seed, self.caption_first = seed, caption_first

    def __call__(self, requests: Sequence[Request], report: ReadReport) -> list[tuple[PackedRow, str] | SampleError]:
        """See `RowBuilder`."""
        return [self._build(request, report) for request in requests]

    def tokens(self, row: PackedRow) -> int:
        """See `RowBuilder`."""
        return len(row.prompt)

    def _build(self, request: Request, report: ReadReport) -> tuple[PackedRow, str] | SampleError:
        failed = len(report.errors)
        row = self.packer.pack(self._documents(request, report), report)
        if row is not None:
            return row, row.documents[0]
        # The mixture counts the error it is given, so it must not stand in the report already.
        return report.errors.pop() if len(report.errors) > failed else self._nothing(request)

    def _documents(self, request: Request, report: ReadReport) -> Iterator[Document]:
        size = len(self.source)
        follow = Permutation(size, mix(self.seed, 4, request.epoch)) if self.source.kind != TextSample.kind else int
        failed = len(report.errors)
        for step in range(size):
            if len(report.errors) - failed >= MAX_ATTEMPTS:
                return
            if step % LOOK_AHEAD == 0:
                ahead = range(step, min(step + LOOK_AHEAD, size))
                self.source.shards.prefetch([follow((request.index + k) % size) for k in ahead])
            report.reads += 1
            try:
                document = self._document(self.source[follow((request.index + step) % size)], request.random)
            except SampleError as error:
                report.errors.append(error)
                continue
            if step == 0 and document.divisible:
                # A document of several rows would else never be read beyond its first.
                document.units = document.units[request.random.choice(self.packer.row_starts(document)) :]
            yield document

    def _document(self, sample: Sample, random: Random) -> Document:
        packer = self.packer
        if isinstance(sample, TextSample):
            document = Document(packer.sentences(sample.text), True)
        elif isinstance(sample, CaptionSample):
            if sample.image is None:
                raise SampleError("missing_member", sample.shard, sample.key, "no jpg, png or webp")
            caption, image = packer.words(sample.caption), [packer.image(sample.image)]
            pair = caption + image if random.random() < self.caption_first else image + caption
            document = Document(pair, False)
        else:
            segments = cast(InterleavedSample, sample).segments
            nested = [packer.sentences(item) if isinstance(item, str) else [packer.image(item)] for item in segments]
            document = Document([unit for units in nested for unit in units], True)
        if not document.units:
            raise SampleError("empty_text", sample.shard, sample.key, "no token is left after tokenisation")
        document.shard, document.key = sample.shard, sample.key
        return document

    def _nothing(self, request: Request) -> SampleError:
        return SampleError("empty_row", self.source.shards.pattern, str(request.index), "no document could be used")


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
        """Text, captions, interleaved."""
        return {"text": self.config.text, "captions": self.config.captions, "interleaved": self.config.interleaved}

    def builder(self, name: str, pattern: str) -> PackedRows:
        """Packed rows of one source."""
        kind = {"text": TextSample.kind, "captions": CaptionSample.kind, "interleaved": InterleavedSample.kind}[name]
        return PackedRows(
            name, self.open_source(pattern, kind), self.packer, self.config.seed, self.config.caption_first
        )

    def collate(self, rows: list[PackedRow], report: ReadReport) -> LanguageModellingBatch:
        """Rows → batch; all are T long."""
        prompt = PromptBatch.stack([row.prompt for row in rows], self.packer.tokenizer.pad_id, len(rows[0].labels))
        return LanguageModellingBatch(prompt=prompt, labels=torch.stack([row.labels for row in rows]), report=report)
