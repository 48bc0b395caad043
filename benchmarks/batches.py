"""Batches of random ids and pixels with the lengths of real ones.

Shapes: `B` rows, `L` tokens, `I` images, `K` slots of an image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from benchmarks.config import BenchmarkConfig, Lengths
from benchmarks.models import Vocabulary
from kosmosg.losses import IGNORED_LABEL
from kosmosg.prompt import PromptBatch

TEXT, IMAGE = "text", "image"
Piece = tuple[str, int]  # (TEXT, number of words) or (IMAGE, 1)


def draw(lengths: Lengths, source: Random) -> int:
    """One length."""
    drawn = round(source.lognormvariate(math.log(lengths.median), lengths.sigma))
    return min(max(drawn, lengths.shortest), lengths.longest)


class Writer:
    """Rows of ids with image slots.

    Args:
        source: draws words.
    """

    def __init__(self, config: BenchmarkConfig, source: Random):
        self.config, self.source = config, source
        self.slots = config.model.mllm.image_tokens

    def document(self, pieces: Sequence[Piece]) -> list[tuple[int, bool]]:
        """`<s>` and the pieces, each token with whether it is an image's slot."""
        row = [(Vocabulary.bos_id, False)]
        for kind, count in pieces:
            if kind == TEXT:
                words = (self.source.randrange(Vocabulary.first_word, self.config.vocabulary) for _ in range(count))
                row += [(word, False) for word in words]
            else:
                row += [(Vocabulary.image_id, False), *[(Vocabulary.image_id, True)] * self.slots]
                row += [(Vocabulary.image_end_id, False)]
        return row

    def batch(self, rows: Sequence[Sequence[tuple[int, bool]]]) -> PromptBatch:
        """Rows padded to the longest, with random images for their slots."""
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), Vocabulary.pad_id)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        padding = torch.ones(len(rows), longest, dtype=torch.bool)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor([token for token, _ in row])
            mask[number, : len(row)] = torch.tensor([slot for _, slot in row])
            padding[number, : len(row)] = False
        count, side = int(mask.sum()) // self.slots, self.config.model.mllm.vision.image_size
        images = torch.randn(count, 3, side, side, generator=self.generator()) if count else None
        return PromptBatch(ids, mask, images, padding).to(self.config.torch_device())

    def generator(self) -> torch.Generator:
        """For pixels and noise."""
        return torch.Generator().manual_seed(self.source.randrange(2**32))


@dataclass
class PackedBatch:
    """The same documents twice: packed into rows of one length, and one to a row, padded to the longest."""

    packed: PromptBatch
    packed_labels: Tensor
    padded: PromptBatch
    padded_labels: Tensor


def stage1_batch(config: BenchmarkConfig, rows: int | None = None, row_tokens: int | None = None) -> PackedBatch:
    """Text, pairs and documents of two or three images, by rows as in `stage1.shares`. Rows are filled with whole
    documents; the last of a row is cut where the row ends, in both forms."""
    stage, source = config.stage1, Random(config.seed)
    writer, size = Writer(config, source), row_tokens or config.stage1.row_tokens
    packed, padded = [], []
    for number in range(rows or stage.rows):
        kind = kind_of_row(number, stage.shares)
        row: list[tuple[int, bool]] = []
        while len(row) < size:
            document = writer.document(pieces_of(kind, config, source))
            if len(row) + len(document) > size and any(slot for _, slot in document[size - len(row) :]):
                words = [(TEXT, size - len(row) - 1)] if size - len(row) > 1 else []
                document = writer.document(words)  # an image is never cut: words fill the rest
            document = document[: size - len(row)]
            row += document
            padded.append(document)
        packed.append(row)
    batches = writer.batch(packed), writer.batch(padded)
    batches[1].images = batches[0].images
    return PackedBatch(batches[0], next_tokens(batches[0]), batches[1], next_tokens(batches[1]))


def kind_of_row(number: int, shares: Sequence[int]) -> int:
    """0 text, 1 pairs, 2 interleaved: spread so that any number of rows has about the shares."""
    place = (number * 5 + 2) % sum(shares)
    return next(kind for kind in range(len(shares)) if place < sum(shares[: kind + 1]))


def pieces_of(kind: int, config: BenchmarkConfig, source: Random) -> list[Piece]:
    """A text document, an image and its caption, or texts around two or three images."""
    stage = config.stage1
    if kind == 0:
        return [(TEXT, draw(stage.text, source))]
    if kind == 1:
        return [(IMAGE, 1), (TEXT, draw(stage.captions, source))]
    images = source.choice((2, 3))
    return [piece for _ in range(images) for piece in ((TEXT, draw(stage.captions, source)), (IMAGE, 1))]


def next_tokens(prompt: PromptBatch) -> Tensor:
    """Labels of stage 1: the next token of the same document, where it is a word."""
    labels = torch.full_like(prompt.ids, IGNORED_LABEL)
    following = prompt.ids[:, 1:]
    labels[:, :-1] = torch.where(following >= Vocabulary.first_word, following, IGNORED_LABEL)
    return labels


def caption_batch(config: BenchmarkConfig, captions: int | None = None, length: int | None = None):
    """Stage 2: `<s>` and a caption; ids of the CLIP text model, start, words, end and padding. `length` fixes all."""
    stage, source = config.stage2, Random(config.seed)
    writer = Writer(config, source)
    lengths = [length or draw(stage.lengths, source) for _ in range(captions or stage.captions)]
    prompt = writer.batch([writer.document([(TEXT, count)]) for count in lengths])
    queries, words = config.model.aligner.num_queries, config.text_encoder.get("vocab_size", 49_408)
    ids = torch.randint(3, words, (len(lengths), queries), generator=writer.generator())
    return prompt, ids.to(config.torch_device())


def instruction_batch(config: BenchmarkConfig, samples: int | None = None, images: int | None = None):
    """Stage 3: constructed : edit : caption = 2 : 2 : 1, and targets. `images` fixes how many each prompt has."""
    stage, source = config.stage3, Random(config.seed)
    writer = Writer(config, source)
    count = samples or stage.samples
    rows = [writer.document(instruction_pieces(number, config, source, images)) for number in range(count)]
    side = config.model.image_size
    targets = torch.rand(count, 3, side, side, generator=writer.generator()) * 2 - 1
    return writer.batch(rows), targets.to(config.torch_device())


def instruction_pieces(number: int, config: BenchmarkConfig, source: Random, images: int | None) -> list[Piece]:
    """A caption around the images of its entities, an image to edit and its instruction, or a caption alone."""
    stage = config.stage3
    words = draw(stage.captions, source)
    if images is None:
        kind = (0, 1, 0, 1, 2)[number % 5]
        if kind == 1:
            before = [(TEXT, words)] if source.random() < 0.5 else []
            return [*before, (IMAGE, 1), (TEXT, draw(stage.instructions, source))]
        images = 0 if kind == 2 else source.choices(range(1, len(stage.entities) + 1), weights=stage.entities)[0]
    share = max(1, words // (images + 1))
    return [*[piece for _ in range(images) for piece in ((TEXT, share), (IMAGE, 1))], (TEXT, share)]
