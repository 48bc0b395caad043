"""Prompts of random words and pixels with realistic lengths, so that padding and packing cost what they do in training.

Shapes: `B` rows, `L` tokens, `I` images of a row.
"""

import math
from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.setting import FIRST_WORD, Setting
from kosmosg.losses import IGNORED_LABEL
from kosmosg.prompt import EncodedPrompt, PromptBatch

IMAGE = 0  # stands for an image in a list of word counts
IMAGE_ID = 4
MIXTURE = ("text",) * 5 + ("pair",) * 5 + ("interleaved",) * 2  # paper, section 3.2


class Lengths(NamedTuple):
    """Distribution of the number of words of a text: log-normal, clamped to [shortest, longest]."""

    median: float
    sigma: float
    shortest: int
    longest: int

    def draw(self, source: Random) -> int:
        words = round(source.lognormvariate(math.log(self.median), self.sigma))
        return min(max(words, self.shortest), self.longest)


# The mean is 19, the longest of 56 about 70; the released filter drops captions of more than 85 tokens.
CAPTION = Lengths(15.5, 0.65, 3, 85)
INSTRUCTION = Lengths(9, 0.4, 3, 40)
ENTITIES = (0.4, 0.35, 0.15, 0.1)  # shares of constructed samples with 1, 2, 3 and 4 images


class Writer:
    """Makes random prompts for the MLLM of a setting."""

    def __init__(self, setting: Setting):
        mllm, self.pad_id, self.bos_id = setting.model.mllm, setting.tokenizer.pad_id, setting.tokenizer.bos_id
        self.image_tokens, self.side, self.words = mllm.image_tokens, mllm.vision.image_size, len(setting.tokenizer)
        self.random, self.noise = Random(setting.config.seed), torch.Generator().manual_seed(setting.config.seed)
        self.device = setting.device

    def length(self, pieces: Sequence[int]) -> int:
        return 1 + sum(words or self.image_tokens + 2 for words in pieces)

    def document(self, pieces: Sequence[int]) -> EncodedPrompt:
        """A prompt of `<s>` and pieces: texts, given by their number of words, or IMAGE."""
        ids, mask, images = [self.bos_id], [False], []
        for words in pieces:
            if words == IMAGE:
                ids += [IMAGE_ID] * (self.image_tokens + 2)
                mask += [False, *[True] * self.image_tokens, False]
                images.append(torch.randn(3, self.side, self.side, generator=self.noise))
            else:
                ids += [self.random.randrange(FIRST_WORD, self.words) for _ in range(words)]
                mask += [False] * words
        return EncodedPrompt(ids, torch.tensor(mask), images)

    def stack(self, rows: Sequence[EncodedPrompt]) -> PromptBatch:
        return PromptBatch.stack(rows, self.pad_id).to(self.device)

    def documents(self, rows: int, length: int) -> tuple[PromptBatch, PromptBatch]:
        """Documents of stage 1: packed into rows of `length` tokens, and the same ones with one per row. The last
        document of a packed row is a text that fills it."""
        text = Lengths(length / 4, 1.0, min(30, length // 4), length)  # web pages have 500 to 1,000 tokens on average
        packed, alone = [], []
        for row in range(rows):
            kind, documents, left = MIXTURE[(5 * row + 2) % len(MIXTURE)], [], length
            while left > 1:
                if kind == "text":
                    pieces = [text.draw(self.random)]
                else:
                    images = 1 if kind == "pair" else self.random.choice((2, 3))
                    pieces = [piece for _ in range(images) for piece in (IMAGE, CAPTION.draw(self.random))]
                documents.append(self.document(pieces if self.length(pieces) <= left - 2 else [left - 1]))
                left -= len(documents[-1])
            alone += documents
            packed.append(join(documents))
        return self.stack(packed), self.stack(alone)

    def captions(self, rows: int) -> PromptBatch:
        """Prompts of stage 2."""
        return self.stack([self.document([CAPTION.draw(self.random)]) for _ in range(rows)])

    def instructions(self, rows: int) -> PromptBatch:
        """Prompts of stage 3: constructed : edit : caption = 2 : 2 : 1."""
        return self.stack([self.document(self._instruction(row % 5)) for row in range(rows)])

    def _instruction(self, kind: int) -> list[int]:
        words = CAPTION.draw(self.random)
        if kind in (1, 3):
            return [*([words] if self.random.random() < 0.5 else []), IMAGE, INSTRUCTION.draw(self.random)]
        images = 0 if kind == 4 else self.random.choices(range(1, 5), weights=ENTITIES)[0]
        share = max(1, words // (images + 1))
        return [*[piece for _ in range(images) for piece in (share, IMAGE)], share]


def join(documents: Sequence[EncodedPrompt]) -> EncodedPrompt:
    """Join documents into one row."""
    ids: Any = [token for document in documents for token in document.ids]
    masks: Any = [document.image_mask for document in documents]
    images = [image for document in documents for image in document.images]
    return EncodedPrompt(ids, torch.cat(masks), images)


def next_words(prompt: PromptBatch) -> Tensor:
    """Labels of stage 1, B×L: the next token, if it is a word of the same document."""
    labels = torch.full_like(prompt.ids, IGNORED_LABEL)
    following = prompt.ids[:, 1:]
    labels[:, :-1] = torch.where(following >= FIRST_WORD, following, IGNORED_LABEL)
    return labels
