"""Stage 2 data: captions, tokenized for the MLLM and for the image decoder's text model (paper section 2.2).

Images of the caption shards are not read. Constructed samples, which the paper's stage 2 does not use, provide prompts
with images for the MLLM and captions for the text model.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from datamodules.cache import Cache, Item
from datamodules.data_config import DataConfig, Precision, Source
from datamodules.datamodule import MixtureDataModule
from datamodules.entities import EntityRules, entity_segments
from datamodules.errors import FilteredSample, SampleError
from datamodules.images import load
from datamodules.mixture import Request, RowBuilder
from datamodules.order import SampleOrder
from datamodules.reader import SampleReader
from datamodules.sample import TEXT_MEMBERS, CaptionSample, ConstructedSample, Sample
from datamodules.shards import ShardList
from kosmosg.batches import AlignmentBatch, ReadReport
from kosmosg.condition import Condition
from kosmosg.models.image_decoder import ImageDecoder
from kosmosg.prompt import EncodedPrompt, PromptBatch, PromptEncoder, PromptTooLongError

WHITESPACE = re.compile("[ \t\n\r]+")  # characters that every tokenizer treats as whitespace
MAX_CACHED_CHARACTERS = 10_000_000  # of all words together, since a single word of a caption may have megabytes
TextTokenize = Callable[[list[str]], Tensor]
AlignmentRow = tuple[EncodedPrompt, np.ndarray]  # the prompt; ids (Q,) of its caption for the decoder's text model
CachedRow = tuple[Tensor, Condition]  # the MLLM's states (L,D); t of eq. 5, one row


@dataclass
class AlignmentDataConfig(DataConfig):
    """Data of stage 2."""

    captions: Source = field(default_factory=Source)
    """Image-caption pairs; only the captions are used."""
    constructed: Source = field(default_factory=Source)
    """Captions with segmented entities, for `recipe.trainable: all` (not in the paper)."""
    entities: EntityRules = field(default_factory=EntityRules)
    """How constructed samples become prompts."""
    max_clip_tokens: int = 75
    """Skip captions with more tokens of the image decoder's text model: CLIP's without start and end tokens
    (released-code.md, "Caption rows"), other models' without the instruction before every caption."""
    max_pieces: int = 85
    """Skip captions with more SentencePiece pieces."""
    cached_states: Precision | None = None
    """Read the captions' states in the MLLM and the text model from the cache that `train.py cache` wrote in this
    precision; neither network is loaded."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("max_clip_tokens", "max_pieces"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.cached_states and self.constructed.shards and self.constructed.weight:
            raise ValueError(
                f"constructed.shards={self.constructed.shards} is not allowed with cached_states, because its prompts "
                "are drawn anew each time; only captions can be cached."
            )


class ClipTokens:
    """Tokenizes captions for CLIP word by word, with a cache: no CLIP token spans whitespace, and most words recur.

    Tokenizing whole captions would take longer than all other work on them (40 µs instead of 3 µs each).

    Args:
        tokenize: texts → ids padded and truncated to Q positions: start, tokens, end, padding.
        clean: applied to whole captions, because the cleaning of a word may depend on its neighbours.
    """

    def __init__(self, tokenize: TextTokenize, clean: Callable[[str], str] = str):
        self.tokenize, self.clean = tokenize, clean
        self.start_id, self.end_id, self.pad_id = tokenize([""])[0, :3].tolist()
        self.length = tokenize([""]).shape[1]
        self.room = self.length - 2
        self._words: dict[str, list[int]] = {}
        self._characters = 0

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, list[int]]:
        """Return truncated ids B×Q and the full length of each text in tokens, without start and end tokens."""
        captions = [WHITESPACE.split(self.clean(text)) for text in texts]
        new = {word for words in captions for word in words if word not in self._words}
        self._characters += sum(map(len, new))
        if self._characters > MAX_CACHED_CHARACTERS:
            self._words.clear()
            new = {word for words in captions for word in words}
            self._characters = sum(map(len, new))
        if new:
            self._add(sorted(new))
        cached = self._words
        tokens = [[i for word in words for i in cached[word]] for words in captions]
        ids = np.full((len(texts), self.length), self.pad_id, dtype=np.int64)
        ids[:, 0] = self.start_id
        for row, caption in zip(ids, tokens, strict=True):
            truncated = caption[: self.room]
            row[1 : len(truncated) + 2] = [*truncated, self.end_id]
        return torch.from_numpy(ids), [len(caption) for caption in tokens]

    def _add(self, words: list[str]) -> None:
        for word, row in zip(words, self.tokenize(words)[:, 1:].tolist(), strict=True):
            self._words[word] = row[: row.index(self.end_id)]


class WholeCaptions:
    """Tokenizes each caption as a whole, for text models whose tokens may span words.

    Args:
        tokenize: texts → ids padded and truncated to Q positions; may add an instruction before each caption.
        clean: see `ClipTokens`.
    """

    def __init__(self, tokenize: TextTokenize, clean: Callable[[str], str] = str):
        self.tokenize, self.clean = tokenize, clean
        ids = tokenize(["a", "7"])  # not "", to which some tokenizers add no instruction
        self.pad_id = int(ids[0, -1])
        self.prefix = int((ids[0] != ids[1]).nonzero()[0])  # length of the instruction, which all captions share
        self.room = ids.shape[1] - self.prefix - 1  # a row without padding may have been truncated

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, list[int]]:
        """Return truncated ids B×Q and the length of each text in tokens, without the instruction."""
        ids = self.tokenize([self.clean(text) for text in texts])
        return ids, ((ids != self.pad_id).sum(dim=1) - self.prefix).tolist()


def caption_tokens(decoder: ImageDecoder) -> ClipTokens | WholeCaptions:
    """Return the function that tokenizes captions for the text model of `decoder`."""
    kind = ClipTokens if decoder.tokenizes_words else WholeCaptions
    return kind(partial(decoder.tokenize, clean=False), decoder.clean)


class CaptionRows(RowBuilder[AlignmentRow]):
    """Builds rows of captions: the prompt `<s>caption`, and ids for the text model."""

    def __init__(
        self,
        source: SampleReader,
        encoder: PromptEncoder,
        clip: ClipTokens | WholeCaptions,
        config: AlignmentDataConfig,
    ):
        super().__init__("captions", source)
        self.encoder, self.clip, self.config = encoder, clip, config

    def __call__(self, requests: Sequence[Request], report: ReadReport) -> list[tuple[AlignmentRow, str] | SampleError]:
        """See `RowBuilder`."""
        samples = [read_caption(self.source, request) for request in requests]
        report.reads += len(samples)
        captions = [sample.caption for sample in samples if isinstance(sample, CaptionSample)]
        ids, lengths = self.clip(captions)
        # All captions in one call, because a call of the tokenizer costs as much as a short caption.
        encoded = iter(zip(ids.numpy(), lengths, self.encoder.captions(captions), strict=True))
        return [
            self._row(sample, *next(encoded)) if isinstance(sample, CaptionSample) else sample for sample in samples
        ]

    def _row(
        self, sample: CaptionSample, text_ids: np.ndarray, length: int, prompt: EncodedPrompt
    ) -> tuple[AlignmentRow, str] | SampleError:
        error = check_length(sample, length, len(prompt) - 1, self.config)
        return error or ((prompt, text_ids), f"{sample.shard}/{sample.key}")


class CachedCaptionRows(RowBuilder[CachedRow]):
    """Reads both networks' states of captions from caches: the same samples as `CaptionRows`, in the same order."""

    def __init__(self, source: SampleReader, states: Cache, text: Cache, config: AlignmentDataConfig):
        super().__init__("captions", source)
        self.states, self.text, self.config = states, text, config

    def __call__(self, requests: Sequence[Request], report: ReadReport) -> list[tuple[CachedRow, str] | SampleError]:
        """See `RowBuilder`."""
        report.reads += len(requests)
        return [self._row(request) for request in requests]

    def _row(self, request: Request) -> tuple[CachedRow, str] | SampleError:
        sample = read_caption(self.source, request)
        if isinstance(sample, SampleError):
            return sample
        located = self.source.locate(request.lane, request.row, request.attempt)
        states, text = (cache(located.shard, located.number) for cache in (self.states, self.text))
        if states is None or text is None:
            return not_cached(sample)
        length = int(text.pop("length"))
        if error := check_length(sample, length, len(states["states"]) - 1, self.config):
            return error
        target = Condition(**{name: value[None] for name, value in text.items()})
        return (states["states"], target), f"{sample.shard}/{sample.key}"


def read_caption(source: SampleReader, request: Request) -> CaptionSample | SampleError:
    """Return the sample of a request, without its image, or the error that occurred."""
    try:
        sample = source.caption(request.lane, request.row, request.attempt)
    except SampleError as error:
        return error
    assert isinstance(sample, CaptionSample)
    return sample


def check_length(sample: CaptionSample, length: int, pieces: int, config: AlignmentDataConfig) -> SampleError | None:
    """Return an error if a caption of `length` tokens of the text model and `pieces` of the MLLM must be skipped."""
    if length > config.max_clip_tokens:
        return too_long(sample, length, config.max_clip_tokens)
    if pieces > config.max_pieces:
        detail = f"{pieces} pieces, at most {config.max_pieces}"
        return FilteredSample("caption_too_long", sample.shard, sample.key, detail)
    if not pieces:
        return SampleError("empty_caption", sample.shard, sample.key, "no token is left after tokenization")
    return None


def not_cached(sample: Sample) -> SampleError:
    """Error for a sample that can be read now, but could not be when the cache was written."""
    detail = "the sample is readable now but was not when the cache was written; write the cache of this shard again"
    return SampleError("missing_in_cache", sample.shard, sample.key, detail)


class EntityPromptRows(RowBuilder[AlignmentRow]):
    """Builds prompts with images from constructed samples, and text model ids of their descriptions or captions."""

    def __init__(
        self,
        source: SampleReader,
        encoder: PromptEncoder,
        clip: ClipTokens | WholeCaptions,
        config: AlignmentDataConfig,
    ):
        super().__init__("constructed", source)
        self.encoder, self.clip, self.config = encoder, clip, config

    def __call__(self, requests: Sequence[Request], report: ReadReport) -> list[tuple[AlignmentRow, str] | SampleError]:
        """See `RowBuilder`."""
        report.reads += len(requests)
        return [self._row(request) for request in requests]

    def _row(self, request: Request) -> tuple[AlignmentRow, str] | SampleError:
        try:
            sample = self.source(request.lane, request.row, request.attempt)
            assert isinstance(sample, ConstructedSample)
            ids, (length,) = self.clip([sample.description or sample.caption])
            if length > self.config.max_clip_tokens:
                return too_long(sample, length, self.config.max_clip_tokens)
            segments = entity_segments(sample, self.config.entities, request.random)
            try:
                prompt = self.encoder([item if isinstance(item, str) else load(item) for item in segments])
            except PromptTooLongError as error:
                return FilteredSample("prompt_too_long", sample.shard, sample.key, str(error))
            return (prompt, ids[0].numpy()), f"{sample.shard}/{sample.key}"
        except SampleError as error:
            return error


def too_long(sample: Sample, tokens: int, allowed: int) -> FilteredSample:
    """Error for a caption with too many tokens for the image decoder's text model."""
    return FilteredSample("caption_too_long", sample.shard, sample.key, f"{tokens} tokens, at most {allowed}")


class AlignmentData(MixtureDataModule):
    """Batches of stage 2.

    Args:
        encoder: encodes prompts of the MLLM; must allow `max_pieces` + 1 tokens. None to read caches.
        clip: tokenizes captions for the image decoder's text model. None to read caches.

    Raises:
        ValueError: `max_clip_tokens` or `max_pieces` exceeds what the models accept.
    """

    Config = AlignmentDataConfig
    config: AlignmentDataConfig

    @classmethod
    def build(
        cls, config: AlignmentDataConfig, encoder: PromptEncoder | None, image_size: int, decoder: ImageDecoder | None
    ) -> "AlignmentData":
        return cls(config, encoder, None if decoder is None else caption_tokens(decoder))

    def __init__(
        self, config: AlignmentDataConfig, encoder: PromptEncoder | None, clip: ClipTokens | WholeCaptions | None
    ):
        super().__init__(config)
        self.encoder: Any = encoder
        self.clip: Any = clip
        if encoder is None or clip is None:
            return
        if config.max_clip_tokens > self.clip.room:
            raise ValueError(
                f"max_clip_tokens={config.max_clip_tokens} but the image decoder's text model takes captions of at "
                f"most {self.clip.room} tokens; decrease data.max_clip_tokens."
            )
        if encoder.max_length is not None and encoder.max_length <= config.max_pieces:
            raise ValueError(
                f"max_pieces={config.max_pieces} and <s> need {config.max_pieces + 1} positions but prompts may have "
                f"only {encoder.max_length}; decrease data.max_pieces."
            )

    def sources(self) -> dict[str, Source]:
        """Return the captions and constructed sources."""
        return {"captions": self.config.captions, "constructed": self.config.constructed}

    def preprocessing(self, cache: str) -> dict[str, str]:
        """See `MixtureDataModule`."""
        truncation = {"max_pieces": str(self.config.max_pieces)} if cache == "states" else {}
        return {**truncation, "precision": str(self.config.cached_states)}

    def items(self, cache: str, sample: Sample) -> Sequence[Item]:
        """Return the caption as a prompt for the MLLM, or as ids for the text model with their length."""
        if not isinstance(sample, CaptionSample):
            return []
        if cache == "states":
            (prompt,) = self.encoder.captions([sample.caption])
            # <s>, max_pieces, and one piece more, by which the reader recognises captions that are too long.
            return [lambda: EncodedPrompt(prompt.ids[: self.config.max_pieces + 2], None, [])]
        ids, (length,) = self.clip([sample.caption])
        return [lambda: (ids[0], length)]

    def builder(self, name: str, shards: ShardList, order: SampleOrder) -> RowBuilder:
        """Return the row builder of a source."""
        if name == "constructed":
            source = SampleReader(shards, order, ConstructedSample.kind, self.config.limits)
            return EntityPromptRows(source, self.encoder, self.clip, self.config)
        source = SampleReader(shards, order, CaptionSample.kind, self.config.limits, frozenset(TEXT_MEMBERS))
        states, text = (self.cache(cache, shards) for cache in ("states", "text"))
        if states is not None and text is not None:
            return CachedCaptionRows(source, states, text, self.config)
        return CaptionRows(source, self.encoder, self.clip, self.config)

    def collate(self, rows: list[Any], report: ReadReport) -> AlignmentBatch:
        """Make a batch of rows."""
        if self.networks:
            states, targets = zip(*rows, strict=True)
            prompt = PromptBatch.stack([EncodedPrompt([0] * len(row), None, []) for row in states], 0)
            target = Condition.cat(targets)
            return AlignmentBatch(prompt=prompt, states=pad_sequence(list(states), True), target=target, report=report)
        prompt = self.encoder.collate([prompt for prompt, _ in rows])
        text_ids = torch.from_numpy(np.stack([text_ids for _, text_ids in rows]))
        return AlignmentBatch(prompt=prompt, text_ids=text_ids, report=report)
