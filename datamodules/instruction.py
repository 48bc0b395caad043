"""Stage 3 data: constructed : edit : caption = 2 : 2 : 1 (paper section 3.1), each a prompt and its target image.

Where a loss reads them, the captions of the targets come along, for the image decoder's text model.
With cached latents the target is the VAE's moments of it, read from beside the shards; the image is then not decoded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal, cast

import torch
from torch import Tensor

from datamodules.alignment import ClipTokens, WholeCaptions, caption_tokens
from datamodules.cached_latents import CachedLatents, latents_identity
from datamodules.data_config import DataConfig, Source
from datamodules.datamodule import MixtureDataModule
from datamodules.entities import Draws, EntityRules, entity_segments
from datamodules.errors import FilteredSample, SampleError
from datamodules.images import SampleImage, StoredImage, load
from datamodules.mixture import Request, RowBuilder
from datamodules.order import SampleOrder
from datamodules.reader import SampleReader
from datamodules.sample import CaptionSample, ConstructedSample, EditSample, InstructionSample, Sample
from datamodules.shards import ShardList
from kosmosg.batches import InstructionBatch, ReadReport
from kosmosg.image_processing import TargetTransform
from kosmosg.models.image_decoder import ImageDecoder
from kosmosg.prompt import EncodedPrompt, PromptEncoder, PromptTooLongError


@dataclass
class InstructionDataConfig(DataConfig):
    """Data of stage 3."""

    constructed: Source = field(default_factory=lambda: Source(weight=2))
    """Captions with segmented entities."""
    edit: Source = field(default_factory=lambda: Source(weight=2))
    """Image, instruction, edited image."""
    captions: Source = field(default_factory=lambda: Source(weight=1))
    """Image-caption pairs."""
    instructions: Source = field(default_factory=Source)
    """Prompts with any number of images (not in the paper)."""
    entities: EntityRules = field(default_factory=EntityRules)
    """How constructed samples become prompts."""
    edit_caption_drop: float = 0.5
    """Probability that the caption before the image to edit is emptied (0 … 1)."""
    min_image_side: int = 384
    """Pixels; image-caption pairs with a smaller width or height are left out (released-code.md, "Caption rows")."""
    max_pieces: int = 128
    """Longer captions of image-caption pairs are left out: SentencePiece pieces."""
    cached_latents: Literal["float32", "float16"] | None = None
    """Read the VAE's moments of the targets, which `python -m datamodules.cached_latents` wrote in this precision."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.edit_caption_drop <= 1:
            raise ValueError(f"edit_caption_drop={self.edit_caption_drop} must lie in 0 … 1.")
        for name, least in (("min_image_side", 0), ("max_pieces", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")


def edit_segments(sample: EditSample, caption_drop: float, draws: Draws) -> tuple[list[str | SampleImage], SampleImage]:
    """`caption image instruction` and the target: the caption emptied with probability `caption_drop` (first draw),
    the pair one of the sample's (second draw)."""
    caption = "" if draws.random() < caption_drop else sample.caption
    source, target = sample.pairs[draws.randint(0, len(sample.pairs) - 1)]
    return [*([caption] if caption else []), source, sample.instruction], target


InstructionRow = tuple[EncodedPrompt, Tensor, str]  # the prompt; its target, or the moments of it; the target's caption


class InstructionRows(RowBuilder[InstructionRow]):
    """Builds prompt and target of one source's samples. Prompts carry no `</s>`: the model never reads one."""

    def __init__(
        self,
        name: str,
        source: SampleReader,
        encoder: PromptEncoder,
        target_transform: TargetTransform,
        config: InstructionDataConfig,
        latents: CachedLatents | None = None,
    ):
        super().__init__(name, source)
        self.encoder, self.target_transform, self.config, self.latents = encoder, target_transform, config, latents

    def __call__(
        self, requests: Sequence[Request], report: ReadReport
    ) -> list[tuple[InstructionRow, str] | SampleError]:
        """See `RowBuilder`."""
        report.reads += len(requests)
        rows: list[tuple[InstructionRow, str] | SampleError] = []
        for request in requests:
            try:
                sample = self.source(request.lane, request.row, request.attempt)
                moments = None
                if self.latents is not None:
                    located = self.source.locate(request.lane, request.row, request.attempt)
                    moments = self.latents(located.shard, located.number)
                rows.append((self.build(sample, request.random, moments), f"{sample.shard}/{sample.key}"))
            except SampleError as error:
                rows.append(error)
        return rows

    def tokens(self, row: InstructionRow) -> int:
        """See `RowBuilder`."""
        return len(row[0])

    def build(self, sample: Sample, random: Random, moments: Tensor | None = None) -> InstructionRow:
        """One sample → prompt, target (3,H,W), or `moments`, those of it, and the target's caption.

        Raises:
            SampleError: an image cannot be decoded.
            FilteredSample: too long, too small, or see `entity_segments`.
        """
        segments, target = self.segments(sample, random)
        try:
            prompt = self.encoder([item if isinstance(item, str) else load(item) for item in segments])
        except PromptTooLongError as error:
            raise FilteredSample("prompt_too_long", sample.shard, sample.key, str(error)) from error
        if isinstance(sample, CaptionSample) and len(prompt) - 1 > self.config.max_pieces:
            detail = f"{len(prompt) - 1} pieces, at most {self.config.max_pieces}"
            raise FilteredSample("caption_too_long", sample.shard, sample.key, detail)
        if moments is not None:
            return prompt, moments, target_caption(sample)
        if self.latents is not None:
            load(target)  # raises why its latents were not cached
            detail = "readable, but it was not when latents were cached; write them anew"
            raise SampleError("missing_latents", sample.shard, sample.key, detail)
        return prompt, self.target_transform(load(target)), target_caption(sample)

    def segments(self, sample: Sample, random: Draws) -> tuple[list[str | SampleImage], SampleImage]:
        """The prompt's segments and the target, images not yet decoded."""
        if isinstance(sample, ConstructedSample):
            return entity_segments(sample, self.config.entities, random), sample.target
        if isinstance(sample, EditSample):
            return edit_segments(sample, self.config.edit_caption_drop, random)
        if isinstance(sample, InstructionSample):
            return sample.segments, sample.target
        sample = cast(CaptionSample, sample)
        if sample.image is None:
            raise SampleError("missing_member", sample.shard, sample.key, "no jpg, png or webp")
        width, height = sample.image.size() if isinstance(sample.image, StoredImage) else sample.image.size
        if min(width, height) < self.config.min_image_side:
            detail = f"{width}×{height}, at least {self.config.min_image_side} a side"
            raise FilteredSample("image_too_small", sample.shard, sample.key, detail)
        return [sample.caption], sample.image


def target_caption(sample: Sample) -> str:
    """What is known in words of a sample's target; empty for edits, whose captions are of the unedited image."""
    if isinstance(sample, ConstructedSample):
        return sample.description or sample.caption
    return sample.caption if isinstance(sample, CaptionSample) else ""


class InstructionData(MixtureDataModule):
    """Batches of stage 3. Dropping the condition is the LightningModule's part.

    Args:
        encoder: of the MLLM's prompts.
        target_transform: PIL image → the VAE's input.
        latents_identity: of the stage's VAE and of the transform, see `cached_latents.py`; needed with `cached_latents`
            alone.
        clip: captions → ids of the image decoder's text model, where a loss reads them.

    Raises:
        ValueError: cached latents are asked for, but not of which VAE.
    """

    Config = InstructionDataConfig
    config: InstructionDataConfig

    @classmethod
    def build(
        cls, config: InstructionDataConfig, encoder: PromptEncoder, image_size: int, decoder: ImageDecoder | None
    ) -> "InstructionData":
        assert decoder is not None
        transform = TargetTransform(image_size)
        precision = config.cached_latents
        identity = latents_identity(decoder.autoencoder, transform, precision) if precision else None
        return cls(config, encoder, transform, identity, caption_tokens(decoder) if decoder.has_text_model else None)

    def __init__(
        self,
        config: InstructionDataConfig,
        encoder: PromptEncoder,
        target_transform: TargetTransform,
        latents_identity: str | None = None,
        clip: ClipTokens | WholeCaptions | None = None,
    ):
        super().__init__(config)
        if config.cached_latents and latents_identity is None:
            raise ValueError("cached_latents needs latents_identity: of the VAE whose latents may be read.")
        self.encoder, self.target_transform, self.clip = encoder, target_transform, clip
        self.latents_identity = latents_identity

    def sources(self) -> dict[str, Source]:
        """Constructed, edit, captions, instructions."""
        names = ("constructed", "edit", "captions", "instructions")
        return {name: getattr(self.config, name) for name in names}

    def builder(self, name: str, shards: ShardList, order: SampleOrder) -> InstructionRows:
        """Rows of one source."""
        kinds = {"constructed": ConstructedSample.kind, "edit": EditSample.kind, "captions": CaptionSample.kind}
        kinds["instructions"] = InstructionSample.kind
        source = SampleReader(shards, order, kinds[name], self.config.limits)
        latents = None
        if self.config.cached_latents and self.latents_identity is not None:
            latents = CachedLatents(shards, self.latents_identity)
        return InstructionRows(name, source, self.encoder, self.target_transform, self.config, latents)

    def collate(self, rows: list[InstructionRow], report: ReadReport) -> InstructionBatch:
        """Rows → batch. A caption that the text model would be given cut counts as none."""
        prompts, targets, captions = zip(*rows, strict=True)
        text_ids = None
        if self.clip is not None:
            text_ids, lengths = self.clip(captions)
            told = [bool(words) and length <= self.clip.room for words, length in zip(captions, lengths, strict=True)]
            text_ids = text_ids.masked_fill(~torch.tensor(told)[:, None], -1)
        return InstructionBatch(
            prompt=self.encoder.collate(prompts), targets=torch.stack(targets), text_ids=text_ids, report=report
        )
