"""Stage 3 data: prompts with a target image, constructed : edit : caption = 2 : 2 : 1 (paper section 3.1).

Batches also hold the captions of the targets, tokenized for the image decoder's text model, if a loss needs them. With
caches, images are not decoded: the moments of the VAE replace the targets, and states of the vision encoder the images
of the prompts.
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
    """Probability that the caption before the image to edit is dropped (0 … 1)."""
    min_image_side: int = 384
    """Skip image-caption pairs whose width or height has fewer pixels (released-code.md, "Caption rows")."""
    max_pieces: int = 128
    """Skip image-caption pairs whose captions have more SentencePiece pieces."""
    aspect_ratio_multiple: int | None = None
    """Crop targets to the nearest of eleven aspect ratios from 1:2 to 2:1, with about model.image_size² pixels and
    sides that are multiples of this; 64 is usual. null: crop to squares, as in the paper."""
    cached_latents: Precision | None = None
    """Read the VAE's moments of the targets from the cache that `train.py cache` wrote in this precision; the posterior
    is still sampled in every step."""
    cached_vision: Precision | None = None
    """Read the states of the prompts' images before the last, trainable blocks of the vision encoder from the cache, as
    `cached_latents`. For the paper's MLLM only."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.edit_caption_drop <= 1:
            raise ValueError(f"edit_caption_drop={self.edit_caption_drop} must lie in 0 … 1.")
        for name, least in (("min_image_side", 0), ("max_pieces", 1), ("aspect_ratio_multiple", 1)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")


def edit_segments(sample: EditSample, caption_drop: float, draws: Draws) -> tuple[list[str | SampleImage], SampleImage]:
    """Return the prompt `caption image instruction` of an edit sample and its target image.

    The first draw drops the caption with probability `caption_drop`; the second one selects one of the sample's pairs.
    """
    caption = "" if draws.random() < caption_drop else sample.caption
    source, target = sample.pairs[draws.randint(0, len(sample.pairs) - 1)]
    return [*([caption] if caption else []), source, sample.instruction], target


InstructionRow = tuple[EncodedPrompt, Tensor, str]  # the prompt; its target or the target's moments; its caption


def target_images(sample: Sample) -> list[SampleImage]:
    """Return all images that `InstructionRows.segments` may return as the target."""
    if isinstance(sample, EditSample):
        return [target for _, target in sample.pairs]
    image = sample.image if isinstance(sample, CaptionSample) else getattr(sample, "target", None)
    return [] if image is None else [image]


def input_images(sample: Sample) -> list[SampleImage]:
    """Return all images that `InstructionRows.segments` may use in the prompt."""
    if isinstance(sample, EditSample):
        return [source for source, _ in sample.pairs]
    if isinstance(sample, ConstructedSample):
        return [image for entity in sample.entities for image in (entity.background, entity.white)]
    return [item for item in getattr(sample, "segments", []) if not isinstance(item, str)]


class CachedImages:
    """Cached values of one sample's images.

    Args:
        images: the sample's images, in the order in which they were cached.
    """

    def __init__(self, cache: Cache, located: Located, images: list[SampleImage]):
        self.cache, self.located, self.images = cache, located, images

    def __call__(self, image: SampleImage, sample: Sample) -> Tensor:
        """Return the cached value of an image. Raises SampleError if it is not cached because it could not be read."""
        number = next(place for place, other in enumerate(self.images) if other is image)
        values = self.cache(self.located.shard, self.located.number, number)
        if values is None:
            load(image)  # raises the error that prevented caching
            raise not_cached(sample)
        (value,) = values.values()
        return value


class InstructionRows(RowBuilder[InstructionRow]):
    """Builds the prompts and targets of one source. Prompts have no `</s>`, because the model never reads one."""

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

    def build(self, sample: Sample, random: Random, located: Located | None = None) -> InstructionRow:
        """Return prompt, target (3,H,W) or its moments, and the target's caption of a sample.

        Args:
            located: position of the sample, needed to read caches.

        Raises:
            SampleError: an image cannot be decoded.
            FilteredSample: the prompt is too long or the image too small; see also `entity_segments`.
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
        """Return the prompt's segments and the target, images not yet decoded."""
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
    """Return the description or caption of a sample's target; "" for edits, whose caption is of the unedited image."""
    if isinstance(sample, ConstructedSample):
        return sample.description or sample.caption
    return sample.caption if isinstance(sample, CaptionSample) else ""


class InstructionData(MixtureDataModule):
    """Batches of stage 3. The LightningModule drops conditions.

    Args:
        encoder: encodes prompts of the MLLM.
        target_transform: PIL image → the VAE's input.
        clip: tokenizes captions for the image decoder's text model, if a loss needs them.
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
            decoder.latent_shape(torch.empty(1, 3, *size, device="meta"))  # raises if the VAE does not accept this size
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
        """Return the constructed, edit, captions and instructions sources."""
        names = ("constructed", "edit", "captions", "instructions")
        return {name: getattr(self.config, name) for name in names}

    def builder(self, name: str, shards: ShardList, order: SampleOrder) -> InstructionRows:
        """Return the row builder of a source."""
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
        """Return the transformed targets (for the VAE) or prompt images (for the vision encoder) of a sample."""
        if cache == "latents":
            images, transform = target_images(sample), self.target_transform
        else:
            images, transform = input_images(sample), self.encoder.image_transform
        return [lambda image=image: transform(load(image)) for image in images]

    def collate(self, rows: list[InstructionRow], report: ReadReport) -> InstructionBatch:
        """Make a batch of rows. Captions that are empty or too long for the text model have ids -1."""
        prompts, targets, captions = zip(*rows, strict=True)
        text_ids = None
        if self.clip is not None:
            text_ids, lengths = self.clip(captions)
            usable = [bool(text) and length <= self.clip.room for text, length in zip(captions, lengths, strict=True)]
            text_ids = text_ids.masked_fill(~torch.tensor(usable)[:, None], -1)
        same_size = len({target.shape for target in targets}) == 1
        targets = torch.stack(targets) if same_size else list(targets)
        return InstructionBatch(prompt=self.encoder.collate(prompts), targets=targets, text_ids=text_ids, report=report)
