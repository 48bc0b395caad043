"""Conditions of prompts, each computed once and alone, so that it depends on its prompt and nothing else.

A condition computed in a batch differs in its last bits with the batch; kept for a later one, it would make an image
depend on what was generated before it. Computed alone it may be kept: it is the same in every process, and after a
restart.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch
from PIL import Image

from evaluation.images.generation import Batch
from kosmosg.condition import Condition
from kosmosg.pipeline import KosmosGPipeline
from kosmosg.prompt import parse_prompt

KEPT = 256
"""Requests go subject by subject and prompt by prompt, so that little is asked for again after so many others."""
Value = TypeVar("Value")


class Kept(Generic[Value]):
    """The last `size` values by key, each made when it is asked for first."""

    def __init__(self, size: int):
        self.size = size
        self._values: OrderedDict[Hashable, Value] = OrderedDict()

    def __call__(self, key: Hashable, make: Callable[[], Value]) -> Value:
        if key not in self._values:
            self._values[key] = make()
            if len(self._values) > self.size:
                self._values.popitem(last=False)
        self._values.move_to_end(key)
        return self._values[key]


class Conditions:
    """Those of one pipeline, whose weights stay as they are; `kept` of them are remembered."""

    def __init__(self, pipeline: KosmosGPipeline, kept: int = KEPT):
        self.model, self.encoder, self.device = pipeline.model.eval(), pipeline.encoder, pipeline.device
        self._conditions: Kept[Condition] = Kept(kept)

    def __call__(self, batch: Batch) -> Condition:
        """The conditions of B images to be made."""
        named = {id(image): pixel_hash(image) for images in batch.images for image in images}
        rows = []
        for prompt, images in zip(batch.prompts, batch.images, strict=True):
            names = [named[id(image)] for image in images]
            rows.append(self._conditions((prompt, *names), lambda p=prompt, i=images: self._encode(p, i)))
        return Condition.cat(rows)

    @torch.no_grad()
    def _encode(self, prompt: str, images: list[Image.Image]) -> Condition:
        """The condition of one prompt."""
        batch = self.encoder.collate([self.encoder(parse_prompt(prompt, images))])
        return self.model.condition(batch.to(self.device))


def pixel_hash(image: Image.Image) -> str:
    """The same for equal pixels, whatever file or object they come from."""
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()
