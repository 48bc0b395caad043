"""Conditions of prompts, each computed once and alone, so that it depends on its prompt and nothing else.

The last bits of a condition computed in a batch depend on that batch; kept for a later one, it would make an image
depend on what was generated before it. Computed alone it is the same in every process and after a restart, so it may be
kept.
"""

import hashlib
from collections import OrderedDict

import torch
from PIL import Image

from evaluation.images.generation import Batch
from kosmosg.condition import Condition
from kosmosg.pipeline import KosmosGPipeline
from kosmosg.prompt import parse_prompt

KEPT = 256
"""Enough, since requests are ordered by subject and prompt."""


class Conditions:
    """Conditions of one pipeline, whose weights must not change; the `kept` last used are remembered."""

    def __init__(self, pipeline: KosmosGPipeline, kept: int = KEPT):
        self.model, self.encoder, self.device = pipeline.model.eval(), pipeline.encoder, pipeline.device
        self.kept = kept
        self._conditions: OrderedDict[tuple[str, ...], Condition] = OrderedDict()

    def __call__(self, batch: Batch) -> Condition:
        """The conditions of B images to be made."""
        named = {id(image): pixel_hash(image) for images in batch.images for image in images}
        rows = []
        for prompt, images in zip(batch.prompts, batch.images, strict=True):
            key = (prompt, *(named[id(image)] for image in images))
            if key not in self._conditions:
                self._conditions[key] = self._encode(prompt, images)
                if len(self._conditions) > self.kept:
                    self._conditions.popitem(last=False)
            self._conditions.move_to_end(key)
            rows.append(self._conditions[key])
        return Condition.cat(rows)

    @torch.no_grad()
    def _encode(self, prompt: str, images: list[Image.Image]) -> Condition:
        """The condition of one prompt."""
        batch = self.encoder.collate([self.encoder(parse_prompt(prompt, images))])
        return self.model.condition(batch.to(self.device))


def pixel_hash(image: Image.Image) -> str:
    """The same for equal pixels, whatever file or object they come from."""
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()
