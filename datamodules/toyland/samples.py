"""One sample of Toyland from one random generator, for every kind of the sample schema.

Subjects are new in every sample, so no subject of one sample is met in another. Captions of constructed and edit
samples never tell looks: there the image alone does, as in KOSMOS-G's prompts (paper section 2.3).
"""

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from datamodules.sample import (
    CaptionSample,
    ConstructedSample,
    EditSample,
    Entity,
    InterleavedSample,
    Sample,
    TextSample,
)
from datamodules.toyland.config import Captions, Constructed
from kosmosg.toyland.language import caption, document, sample_edit, story
from kosmosg.toyland.scene import crop, render, sample_scene

Random = np.random.Generator


def sample_generator(seed: int, part: str, split: str, index: int) -> Random:
    """The generator of one sample: its own stream, so that neither order nor number of processes matter, and so that
    no subject of one part or split is drawn in another."""
    return np.random.default_rng([seed, zlib.crc32(f"{part}/{split}".encode()), index])


def text_sample(rng: Random, options: Any = None) -> TextSample:
    """A story."""
    return TextSample(story(rng))


def caption_sample(rng: Random, options: Captions) -> CaptionSample:
    """A scene and a caption, which names looks with probability `told`."""
    scene = sample_scene(rng)
    return CaptionSample(caption(scene, rng, told=bool(rng.random() < options.told)), render(scene).image)


def interleaved_sample(rng: Random, options: Any = None) -> InterleavedSample:
    """A document whose images show one subject again and again."""
    return InterleavedSample([item if isinstance(item, str) else render(item).image for item in document(rng)])


def constructed_sample(rng: Random, options: Constructed) -> ConstructedSample:
    """A scene with its untold caption; entities are the subjects' kinds in the caption's order, with their crops.

    With probability `other_render` an entity's crops come from a picture of its own, in the studio and in another pose,
    instead of the target. Crops of the target alone would let a model copy pose and light, and never part them from
    the look. The paper always crops from the target (Fig. 4): it has one photo of each thing.
    """
    while True:
        scene = sample_scene(rng)
        line = caption(scene, rng, told=False, with_article=bool(rng.random() < options.with_article))
        target = render(scene)
        entities = []
        for i, placed in enumerate(scene.placed):
            shown = target, i
            if rng.random() < options.other_render:
                shown = render(sample_scene(rng, [placed.subject], plain=True)), 0
            white, background = crop(*shown, white=True), crop(*shown, white=False)
            if white is None or background is None:
                break
            entities.append(Entity(placed.subject.kind, background, white))
        else:  # nobody is hidden; another scene otherwise
            return ConstructedSample(line, entities, target.image)


def edit_sample(rng: Random, options: Any = None) -> EditSample:
    """A scene, one change to it in words, and the scene that comes of it."""
    edit = sample_edit(rng)
    line = caption(edit.before, rng, told=False)
    return EditSample(line, edit.instruction, render(edit.before).image, render(edit.after).image)


MAKERS: dict[str, Callable[[Random, Any], Sample]] = {
    "text": text_sample,
    "captions": caption_sample,
    "interleaved": interleaved_sample,
    "constructed": constructed_sample,
    "edit": edit_sample,
}
"""Folder under shards/ → maker of its samples; the second argument is the part's configuration."""
