"""Draw single samples from a random generator: all kinds of the schema, DreamBench and MS-COCO in miniature.

Every sample has new subjects, which appear in no other sample. Captions of edit samples and, by default, of constructed
samples do not describe the subjects' looks, which only the images show, as in KOSMOS-G's prompts (paper section 2.3).

The evaluation sets have the layout that `evaluation/` reads. DreamBench: `<subject>/00.png` is the input image, which
shows only the subject, large and in the studio; the other images show it in named settings. `<subject>/others/` has
such portraits of other individuals of the same kind, and dreambench.json the labels for a judge. COCO: scenes with one
caption each; every other caption describes looks.
"""

import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from datamodules.sample import (
    CaptionSample,
    ConstructedSample,
    EditSample,
    Entity,
    InterleavedSample,
    Sample,
    TextSample,
)
from datamodules.toyland.config import Captions, Constructed, DreamBench
from datamodules.toyland.kinds import KINDS, LIVE, OBJECTS
from datamodules.toyland.language import PLACES, caption, document, noun, sample_edit, story, templates
from datamodules.toyland.scene import SIZE, Scene, Subject, crop, place, render, sample_scene

Random = np.random.Generator

KEPT_IMAGE = "00.png"
OTHERS = 7
"""Other individuals per subject, which makes the chance of a correct identification one in eight."""
PORTRAIT_HALF = 0.4
"""Half side of the subject in the input image, in image sides; as large as in crops of entities."""


def sample_generator(seed: int, data_set: str, split: str, index: int) -> Random:
    """Return the generator of one sample. Every sample has its own stream, so that samples do not depend on order or
    processes, and data sets and splits have different subjects."""
    return np.random.default_rng([seed, zlib.crc32(f"{data_set}/{split}".encode()), index])


def text_sample(rng: Random, options: Any = None) -> TextSample:
    """Draw a story."""
    return TextSample(story(rng))


def caption_sample(rng: Random, options: Captions) -> CaptionSample:
    """Draw a scene with a caption, which describes looks with probability `told`."""
    scene = sample_scene(rng)
    return CaptionSample(caption(scene, rng, with_looks=bool(rng.random() < options.told)), render(scene).image)


def interleaved_sample(rng: Random, options: Any = None) -> InterleavedSample:
    """Draw a document whose images show the same subject."""
    return InterleavedSample([item if isinstance(item, str) else render(item).image for item in document(rng)])


def constructed_sample(rng: Random, options: Constructed) -> ConstructedSample:
    """Draw a scene with a caption, a description of all looks, and its subjects as entities, in the caption's order.

    With probability `told`, the caption and the entities' words describe looks.

    With probability `other_render`, an entity's crops come from a separate image in the studio and in another pose,
    not from the target. With crops of the target alone, a model could copy pose and light and would not learn to
    separate them from the look. The paper always crops from the target (Fig. 4), since it has one photo per entity.
    """
    while True:
        scene = sample_scene(rng)
        with_looks, with_article = bool(rng.random() < options.told), bool(rng.random() < options.with_article)
        form = {"with_article": with_article, "suffixed": bool(rng.random() < 0.7)}
        line, description = (caption(scene, rng, with_looks=looks, **form) for looks in (with_looks, True))
        target = render(scene)
        entities = []
        for i, placed in enumerate(scene.placed):
            source = target, i
            if rng.random() < options.other_render:
                source = render(sample_scene(rng, [placed.subject], plain=True)), 0
            white, background = crop(*source, white=True), crop(*source, white=False)
            if white is None or background is None:
                break
            entities.append(Entity(noun(placed, with_looks), background, white))
        else:  # all subjects are visible; otherwise another scene is drawn
            return ConstructedSample(line, entities, target.image, description=description)


def edit_sample(rng: Random, options: Any = None) -> EditSample:
    """Draw a scene, an instruction for one change, and the changed scene."""
    edit = sample_edit(rng)
    line = caption(edit.before, rng, with_looks=False)
    return EditSample(line, edit.instruction, render(edit.before).image, render(edit.after).image)


MAKERS: dict[str, Callable[[Random, Any], Sample]] = {
    "text": text_sample,
    "captions": caption_sample,
    "interleaved": interleaved_sample,
    "constructed": constructed_sample,
    "edit": edit_sample,
}
"""Folder under shards/ → function that draws its samples, given a generator and the data set's configuration."""


def subject_names(options: DreamBench) -> dict[str, str]:
    """Return folder name → kind of every subject: cat, cat_2, … They are sorted, so that evenly spaced ones include
    objects and animals."""
    kinds = [OBJECTS[i % len(OBJECTS)] for i in range(options.objects)]
    kinds += [LIVE[i % len(LIVE)] for i in range(options.live)]
    counts: Counter[str] = Counter()
    names = {}
    for kind in kinds:
        counts[kind] += 1
        stem = kind.replace(" ", "_")
        names[stem if counts[kind] == 1 else f"{stem}_{counts[kind]}"] = kind
    return dict(sorted(names.items()))


def subject_scenes(rng: Random, kind: str, images: int) -> list[Scene]:
    """Draw the scenes of a new subject: a portrait, then named settings, different ones as far as possible.

    The scenes have no style, light or accessory, because they stand for plain photos of the subject.
    """
    subject = Subject.sample(rng, kind)
    scenes = [portrait(rng, subject)]
    settings = list(rng.permutation(PLACES))
    for i in range(images - 1):
        setting = str(settings[i % len(settings)])
        scenes.append(Scene(place(rng, [subject]), setting=setting, seed=int(rng.integers(2**31))))
    return scenes


def portrait(rng: Random, subject: Subject) -> Scene:
    """Return a scene with only the subject, large and in the studio."""
    (placed,) = place(rng, [subject])
    placed = replace(placed, x=0.5, y=0.5, half=PORTRAIT_HALF)
    return Scene((placed,), seed=int(rng.integers(2**31)))


def subject_files(rng: Random, kind: str, images: int) -> tuple[dict[str, Image.Image], dict[str, str]]:
    """Return images by file name of a subject and of others of its kind, and the subject's labels."""
    scenes = subject_scenes(rng, kind, images)
    others = [portrait(rng, Subject.sample(rng, kind)) for _ in range(OTHERS)]
    look = scenes[0].placed[0].subject.look
    named = [(f"{i:02d}.png", scene) for i, scene in enumerate(scenes)]
    named += [(f"others/{i:02d}.png", scene) for i, scene in enumerate(others)]
    labels = {"kind": kind, "colour": look.body.word, "pattern": look.pattern}
    return {name: render(scene).image for name, scene in named}, labels


def dreambench_facts(labels: dict[str, dict[str, str]]) -> dict:
    """Return the content of dreambench.json: subjects and prompts, in the structure of the real DreamBench's facts."""
    subjects = {
        name: {
            "class": facts["kind"],
            "kind": "live" if KINDS[facts["kind"]].live else "object",
            "kept_image": KEPT_IMAGE,
            "labels": facts,
        }
        for name, facts in labels.items()
    }
    names = list(subjects)
    # Every subject is once on the left and once on the right, mostly paired with another kind.
    pairs = zip(names, [*names[len(names) // 2 :], *names[: len(names) // 2]], strict=True)
    prompts = {"object": templates(live=False), "live": templates(live=True)}
    live = sum(subject["kind"] == "live" for subject in subjects.values())
    return {
        "subjects": subjects,
        "n_subjects": len(subjects),
        "n_objects": len(subjects) - live,
        "n_live": live,
        "prompts_per_subject": len(prompts["object"]["original"]),
        "prompts": prompts,
        "pairs": {
            "original": "a {} and a {} on the beach",
            "modified": "{} and {} on the beach",
            "subjects": [[a, b] for a, b in pairs if labels[a]["kind"] != labels[b]["kind"]],
        },
        "placeholder": "'{}' in the original is the class word; '{}' in the modified prompt is '<i>'",
        "text_used_for_clip_t": "original prompt with the class word",
    }


def coco_image(rng: Random, index: int) -> tuple[Image.Image, str]:
    """Draw a new scene and its caption, which describes looks if `index` is odd."""
    scene = sample_scene(rng)
    return render(scene).image, caption(scene, rng, with_looks=index % 2 == 1)


def coco_file_name(number: int) -> str:
    """Return a file name numbered as in COCO, but for PNG."""
    return f"COCO_val2014_{number:012d}.png"


def coco_annotations(captions: list[str]) -> dict:
    """Return the content of captions_val2014.json: image `number` (from 1) has caption `number - 1`."""
    numbered = list(enumerate(captions, start=1))
    return {
        "info": {"description": "Toyland: scenes of a small drawn world", "year": 2014, "version": "1"},
        "images": [
            {"id": number, "file_name": coco_file_name(number), "width": SIZE, "height": SIZE} for number, _ in numbered
        ],
        "annotations": [{"id": number, "image_id": number, "caption": line} for number, line in numbered],
    }
