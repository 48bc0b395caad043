"""Stage 2 data: captions alone, as tokens for the MLLM and for the image decoder's text model (paper section 2.2).

Images of the caption shards are neither decoded nor read. Constructed samples, which the paper's stage 2 does not have,
give prompts with images for the MLLM, and their captions for the text model.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from datamodules.data_config import DataConfig, Source
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
from kosmosg.models.image_decoder import ImageDecoder
from kosmosg.prompt import EncodedPrompt, PromptEncoder, PromptTooLongError

BLANKS = re.compile("[ \t\n\r]+")  # only what every tokenizer takes for a blank
REMEMBERED_CHARACTERS = 10_000_000  # of all words together: a hostile caption may be one word of megabytes
TextTokenize = Callable[[list[str]], Tensor]
AlignmentRow = tuple[EncodedPrompt, np.ndarray]  # the prompt; ids (Q,) of its caption for the decoder's text model


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
    """Longer captions are left out: tokens of the image decoder's text model, CLIP's without start and end
    (released-code.md, "Caption rows"), others' without what stands before every caption."""
    max_pieces: int = 85
    """Longer captions are left out: SentencePiece pieces."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("max_clip_tokens", "max_pieces"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")


class ClipTokens:
    """Captions → CLIP ids and true lengths, word by word: no CLIP token spans a blank, and most words were met before.

    Tokenising whole captions takes longer than all other work on them together (40 µs against 3 µs each).

    Args:
        tokenize: pads and cuts to Q positions: start, tokens, end, padding.
        clean: applied to whole captions, since what a word is cleaned to may depend on those around it.
    """

    def __init__(self, tokenize: TextTokenize, clean: Callable[[str], str] = str):
        self.tokenize, self.clean = tokenize, clean
        self.start_id, self.end_id, self.pad_id = tokenize([""])[0, :3].tolist()
        self.length = tokenize([""]).shape[1]
        self.room = self.length - 2
        self._words: dict[str, list[int]] = {}
        self._characters = 0

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, list[int]]:
        """Ids B×Q, cut where a text is longer, and tokens of each text without start and end."""
        divided = [BLANKS.split(self.clean(text)) for text in texts]
        new = {word for words in divided for word in words if word not in self._words}
        self._characters += sum(map(len, new))
        if self._characters > REMEMBERED_CHARACTERS:
            self._words.clear()
            new = {word for words in divided for word in words}
            self._characters = sum(map(len, new))
        if new:
            self._learn(sorted(new))
        known = self._words
        tokens = [[i for word in words for i in known[word]] for words in divided]
        ids = np.full((len(texts), self.length), self.pad_id, dtype=np.int64)
        ids[:, 0] = self.start_id
        for row, found in zip(ids, tokens, strict=True):
            kept = found[: self.room]
            row[1 : len(kept) + 2] = [*kept, self.end_id]
        return torch.from_numpy(ids), [len(found) for found in tokens]

    def _learn(self, words: list[str]) -> None:
        for word, row in zip(words, self.tokenize(words)[:, 1:].tolist(), strict=True):
            self._words[word] = row[: row.index(self.end_id)]


class WholeCaptions:
    """Captions → ids and true lengths, each tokenised as a whole, for text models whose words are not apart.

    Args:
        tokenize: pads and cuts to Q positions; may put an instruction before captions, which does not count.
        clean: see `ClipTokens`.
    """

    def __init__(self, tokenize: TextTokenize, clean: Callable[[str], str] = str):
        self.tokenize, self.clean = tokenize, clean
        ids = tokenize(["a", "7"])  # "" may have no instruction before it
        self.pad_id = int(ids[0, -1])
        self.before = int((ids[0] != ids[1]).nonzero()[0])  # what unlike captions have in common
        self.room = ids.shape[1] - self.before - 1  # a row without padding may have been cut

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, list[int]]:
        """Ids B×Q, cut where a text is longer, and tokens of each text without those before it."""
        ids = self.tokenize([self.clean(text) for text in texts])
        return ids, ((ids != self.pad_id).sum(dim=1) - self.before).tolist()


def caption_tokens(decoder: ImageDecoder) -> ClipTokens | WholeCaptions:
    """How the text model of `decoder` is given captions."""
    kind = ClipTokens if decoder.words_apart else WholeCaptions
    return kind(partial(decoder.tokenize, clean=False), decoder.clean)


class CaptionRows(RowBuilder[AlignmentRow]):
    """Builds `<s>caption` and ids for the text model, all of a batch at once."""

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
        samples = [self._read(request) for request in requests]
        report.reads += len(samples)
        captions = [sample.caption for sample in samples if isinstance(sample, CaptionSample)]
        ids, lengths = self.clip(captions)
        # All captions in one call: each call of the tokenizer costs as much as a short caption.
        found = iter(zip(ids.numpy(), lengths, self.encoder.captions(captions), strict=True))
        return [self._row(sample, *next(found)) if isinstance(sample, CaptionSample) else sample for sample in samples]

    def tokens(self, row: AlignmentRow) -> int:
        """See `RowBuilder`."""
        return len(row[0])

    def _read(self, request: Request) -> CaptionSample | SampleError:
        try:
            sample = self.source.caption(request.lane, request.row, request.attempt)
        except SampleError as error:
            return error
        assert isinstance(sample, CaptionSample)
        return sample

    def _row(
        self, sample: CaptionSample, text_ids: np.ndarray, length: int, prompt: EncodedPrompt
    ) -> tuple[AlignmentRow, str] | SampleError:
        if length > self.config.max_clip_tokens:
            return too_long(sample, length, self.config.max_clip_tokens)
        pieces = len(prompt) - 1
        if pieces > self.config.max_pieces:
            detail = f"{pieces} pieces, at most {self.config.max_pieces}"
            return FilteredSample("caption_too_long", sample.shard, sample.key, detail)
        if not pieces:
            return SampleError("empty_caption", sample.shard, sample.key, "no token is left after tokenisation")
        return (prompt, text_ids), f"{sample.shard}/{sample.key}"


class EntityPromptRows(RowBuilder[AlignmentRow]):
    """Builds prompts with images of constructed samples, and the text model's ids of their descriptions or captions."""

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

    def tokens(self, row: AlignmentRow) -> int:
        """See `RowBuilder`."""
        return len(row[0])

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


def too_long(sample: Sample, tokens: int, most: int) -> FilteredSample:
    """A caption that the image decoder's text model would be given cut."""
    return FilteredSample("caption_too_long", sample.shard, sample.key, f"{tokens} tokens, at most {most}")


class AlignmentData(MixtureDataModule):
    """Batches of stage 2.

    Args:
        encoder: of the MLLM's prompts; must not cut below `max_pieces` + 1 tokens.
        clip: captions → ids of the image decoder's text model.

    Raises:
        ValueError: `max_clip_tokens` is more than the text model takes.
    """

    Config = AlignmentDataConfig
    config: AlignmentDataConfig

    @classmethod
    def build(
        cls, config: AlignmentDataConfig, encoder: PromptEncoder, image_size: int, decoder: ImageDecoder | None
    ) -> "AlignmentData":
        assert decoder is not None
        return cls(config, encoder, caption_tokens(decoder))

    def __init__(self, config: AlignmentDataConfig, encoder: PromptEncoder, clip: ClipTokens | WholeCaptions):
        super().__init__(config)
        self.encoder, self.clip = encoder, clip
        if config.max_clip_tokens > self.clip.room:
            raise ValueError(
                f"max_clip_tokens={config.max_clip_tokens} but the image decoder's text model takes captions of at "
                f"most {self.clip.room} tokens; lower data.max_clip_tokens."
            )
        if encoder.max_length is not None and encoder.max_length <= config.max_pieces:
            raise ValueError(
                f"max_pieces={config.max_pieces} and <s> need {config.max_pieces + 1} positions but prompts may have "
                f"only {encoder.max_length}; lower data.max_pieces."
            )

    def sources(self) -> dict[str, Source]:
        """Captions, constructed."""
        return {"captions": self.config.captions, "constructed": self.config.constructed}

    def builder(self, name: str, shards: ShardList, order: SampleOrder) -> CaptionRows | EntityPromptRows:
        """Rows of one source."""
        if name == "constructed":
            source = SampleReader(shards, order, ConstructedSample.kind, self.config.limits)
            return EntityPromptRows(source, self.encoder, self.clip, self.config)
        source = SampleReader(shards, order, CaptionSample.kind, self.config.limits, frozenset(TEXT_MEMBERS))
        return CaptionRows(source, self.encoder, self.clip, self.config)

    def collate(self, rows: list[AlignmentRow], report: ReadReport) -> AlignmentBatch:
        """Rows → batch."""
        prompt = self.encoder.collate([prompt for prompt, _ in rows])
        text_ids = torch.from_numpy(np.stack([text_ids for _, text_ids in rows]))
        return AlignmentBatch(prompt=prompt, text_ids=text_ids, report=report)
