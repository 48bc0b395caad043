"""Stage 3 data: constructed : edit : caption = 2 : 2 : 1 (paper section 3.1), each a prompt and its target image.

Where a loss reads them, the captions of the targets come along, for the image decoder's text model.
With caches, a target is the VAE's moments of it and an image of a prompt its states in the vision encoder, read from
beside the shards; images are then not decoded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import cast

import torch
from torch import Tensor

from datamodules.alignment import ClipTokens, WholeCaptions, caption_tokens, not_cached
from datamodules.cache import Cache, Item
from datamodules.data_config import CACHED, DataConfig, Precision, Source
from datamodules.datamodule import MixtureDataModule
from datamodules.entities import Draws, EntityRules, entity_segments
from datamodules.errors import FilteredSample, SampleError
from datamodules.images import SampleImage, StoredImage, load
from datamodules.mixture import Request, RowBuilder
from datamodules.order import SampleOrder
from datamodules.reader import Located, SampleReader
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
    aspect_ratio_multiple: int | None = None
    """Targets are cropped to the nearest of eleven aspect ratios from 1:2 to 2:1, with about model.image_size² pixels
    and sides that are multiples of this; 64 is usual. null: to squares, as in the paper."""
    cached_latents: Precision | None = None
    """Read the VAE's moments of the targets, which `train.py cache` wrote in this precision; the posterior is still
    sampled in every step."""
    cached_vision: Precision | None = None
    """Read the states of the prompts' images before the vision encoder's last blocks, which train; as
    `cached_latents`. For the paper's MLLM."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.edit_caption_drop <= 1:
            raise ValueError(f"edit_caption_drop={self.edit_caption_drop} must lie in 0 … 1.")
        for name, least in (("min_image_side", 0), ("max_pieces", 1), ("aspect_ratio_multiple", 1)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")


def edit_segments(sample: EditSample, caption_drop: float, draws: Draws) -> tuple[list[str | SampleImage], SampleImage]:
    """`caption image instruction` and the target: the caption emptied with probability `caption_drop` (first draw),
    the pair one of the sample's (second draw)."""
    caption = "" if draws.random() < caption_drop else sample.caption
    source, target = sample.pairs[draws.randint(0, len(sample.pairs) - 1)]
    return [*([caption] if caption else []), source, sample.instruction], target


InstructionRow = tuple[EncodedPrompt, Tensor, str]  # the prompt; its target, or the moments of it; the target's caption


def target_images(sample: Sample) -> list[SampleImage]:
    """All that `InstructionRows.segments` may give as the target."""
    if isinstance(sample, EditSample):
        return [target for _, target in sample.pairs]
    image = sample.image if isinstance(sample, CaptionSample) else getattr(sample, "target", None)
    return [] if image is None else [image]


def input_images(sample: Sample) -> list[SampleImage]:
    """All that it may give as images of the prompt."""
    if isinstance(sample, EditSample):
        return [source for source, _ in sample.pairs]
    if isinstance(sample, ConstructedSample):
        return [image for entity in sample.entities for image in (entity.background, entity.white)]
    return [item for item in getattr(sample, "segments", []) if not isinstance(item, str)]


class CachedImages:
    """What a cache has of one sample's images.

    Args:
        images: of the sample, in the cache's order.
    """

    def __init__(self, cache: Cache, located: Located, images: list[SampleImage]):
        self.cache, self.located, self.images = cache, located, images

    def __call__(self, image: SampleImage, sample: Sample) -> Tensor:
        """Raises SampleError: it cannot be read, or could not when it should have been cached."""
        number = next(place for place, other in enumerate(self.images) if other is image)
        found = self.cache(self.located.shard, self.located.number, number)
        if found is None:
            load(image)  # raises why it was not cached
            raise not_cached(sample)
        (value,) = found.values()
        return value


class InstructionRows(RowBuilder[InstructionRow]):
    """Builds prompt and target of one source's samples. Prompts carry no `</s>`: the model never reads one."""

    def __init__(
        self,
        name: str,
        source: SampleReader,
        encoder: PromptEncoder,
        target_transform: TargetTransform,
        config: InstructionDataConfig,
        latents: Cache | None = None,
        vision: Cache | None = None,
    ):
        super().__init__(name, source)
        self.encoder, self.target_transform, self.config = encoder, target_transform, config
        self.latents, self.vision = latents, vision

    def __call__(
        self, requests: Sequence[Request], report: ReadReport
    ) -> list[tuple[InstructionRow, str] | SampleError]:
        """See `RowBuilder`."""
        report.reads += len(requests)
        rows: list[tuple[InstructionRow, str] | SampleError] = []
        for request in requests:
            try:
                sample = self.source(request.lane, request.row, request.attempt)
                located = self.source.locate(request.lane, request.row, request.attempt)
                rows.append((self.build(sample, request.random, located), f"{sample.shard}/{sample.key}"))
            except SampleError as error:
                rows.append(error)
        return rows

    def tokens(self, row: InstructionRow) -> int:
        """See `RowBuilder`."""
        return len(row[0])

    def build(self, sample: Sample, random: Random, located: Located | None = None) -> InstructionRow:
        """One sample → prompt, target (3,H,W) or the moments of it, and the target's caption.

        Args:
            located: where it is, and what was cached of it.

        Raises:
            SampleError: an image cannot be decoded.
            FilteredSample: too long, too small, or see `entity_segments`.
        """
        segments, target = self.segments(sample, random)
        states: list[Tensor] = []
        if self.vision is not None and located is not None:
            cached = CachedImages(self.vision, located, input_images(sample))
            states = [cached(item, sample) for item in segments if not isinstance(item, str)]
            blank = self.encoder.blank_image("")
            segments = [item if isinstance(item, str) else blank for item in segments]
        try:
            prompt = self.encoder([load(item) if isinstance(item, SampleImage) else item for item in segments])
        except PromptTooLongError as error:
            raise FilteredSample("prompt_too_long", sample.shard, sample.key, str(error)) from error
        if isinstance(sample, CaptionSample) and len(prompt) - 1 > self.config.max_pieces:
            detail = f"{len(prompt) - 1} pieces, at most {self.config.max_pieces}"
            raise FilteredSample("caption_too_long", sample.shard, sample.key, detail)
        if states:
            prompt = replace(prompt, images=states)
        if self.latents is not None and located is not None:
            moments = CachedImages(self.latents, located, target_images(sample))(target, sample)
            return prompt, moments, target_caption(sample)
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
        clip: captions → ids of the image decoder's text model, where a loss reads them.
    """

    Config = InstructionDataConfig
    config: InstructionDataConfig

    @classmethod
    def build(
        cls, config: InstructionDataConfig, encoder: PromptEncoder, image_size: int, decoder: ImageDecoder | None
    ) -> "InstructionData":
        assert decoder is not None
        transform = TargetTransform(image_size, config.aspect_ratio_multiple)
        for size in transform.sizes:
            decoder.latent_shape(torch.empty(1, 3, *size, device="meta"))  # raises where the VAE cannot divide them
        return cls(config, encoder, transform, caption_tokens(decoder) if decoder.has_text_model else None)

    def __init__(
        self,
        config: InstructionDataConfig,
        encoder: PromptEncoder,
        target_transform: TargetTransform,
        clip: ClipTokens | WholeCaptions | None = None,
    ):
        super().__init__(config)
        self.encoder, self.target_transform, self.clip = encoder, target_transform, clip

    def sources(self) -> dict[str, Source]:
        """Constructed, edit, captions, instructions."""
        names = ("constructed", "edit", "captions", "instructions")
        return {name: getattr(self.config, name) for name in names}

    def builder(self, name: str, shards: ShardList, order: SampleOrder) -> InstructionRows:
        """Rows of one source."""
        kinds = {"constructed": ConstructedSample.kind, "edit": EditSample.kind, "captions": CaptionSample.kind}
        kinds["instructions"] = InstructionSample.kind
        source = SampleReader(shards, order, kinds[name], self.config.limits)
        caches = [self.cache(cache, shards) for cache in ("latents", "vision")]
        return InstructionRows(name, source, self.encoder, self.target_transform, self.config, *caches)

    def preprocessing(self, cache: str) -> dict[str, str]:
        """See `MixtureDataModule`."""
        transform = self.target_transform if cache == "latents" else self.encoder.image_transform
        return {"images": str(transform), "precision": str(getattr(self.config, f"{CACHED}{cache}"))}

    def items(self, cache: str, sample: Sample) -> Sequence[Item]:
        """The sample's target images, or those of its prompt, as the VAE or the vision encoder reads them."""
        if cache == "latents":
            images, transform = target_images(sample), self.target_transform
        else:
            images, transform = input_images(sample), self.encoder.image_transform
        return [lambda image=image: transform(load(image)) for image in images]

    def collate(self, rows: list[InstructionRow], report: ReadReport) -> InstructionBatch:
        """Rows → batch. A caption that the text model would be given cut counts as none."""
        prompts, targets, captions = zip(*rows, strict=True)
        text_ids = None
        if self.clip is not None:
            text_ids, lengths = self.clip(captions)
            told = [bool(words) and length <= self.clip.room for words, length in zip(captions, lengths, strict=True)]
            text_ids = text_ids.masked_fill(~torch.tensor(told)[:, None], -1)
        of_one_size = len({target.shape for target in targets}) == 1
        targets = torch.stack(targets) if of_one_size else list(targets)
        return InstructionBatch(prompt=self.encoder.collate(prompts), targets=targets, text_ids=text_ids, report=report)
