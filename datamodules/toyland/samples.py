"""One sample of Toyland from one random generator: all kinds of the schema, DreamBench and MS-COCO in miniature.

Subjects are new in every sample, so no subject of one sample appears in another. Captions of constructed and edit
samples never name looks: there the image alone tells them, as in KOSMOS-G's prompts (paper section 2.3).

The evaluation sets lie in the folders that `evaluation/` reads. DreamBench: `<subject>/00.png` is the kept image, the
subject alone and large in the studio; the others show it in named settings; `<subject>/others/` holds such portraits of
other individuals of its kind, and dreambench.json tells what a judge should see. COCO: scenes with one caption each,
every other one of which names looks.
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
"""Other individuals of a subject's kind: whom an image shows is guessed right once in eight."""
PORTRAIT_HALF = 0.4
"""Half side of the kept image's subject, in units of the image's side: as large as crops of entities show theirs."""


def sample_generator(seed: int, data_set: str, split: str, index: int) -> Random:
    """The generator of one sample: its own stream, so that neither order nor number of processes matter, and so that
    no subject of one data set or split is drawn in another."""
    return np.random.default_rng([seed, zlib.crc32(f"{data_set}/{split}".encode()), index])


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
    """A scene with its caption, and the caption that names all looks as its description; entities are the subjects in
    the caption's order, with their crops.

    The caption names looks with probability `told`; then an entity's words do, too, and fall away with it.

    With probability `other_render` an entity's crops come from an image of its own, in the studio and in another pose,
    instead of the target. Crops of the target alone would let a model copy pose and light, and never part them from
    the look. The paper always crops from the target (Fig. 4): it has one photo of each thing.
    """
    while True:
        scene = sample_scene(rng)
        told, with_article = bool(rng.random() < options.told), bool(rng.random() < options.with_article)
        form = {"with_article": with_article, "suffixed": bool(rng.random() < 0.7)}
        line, description = (caption(scene, rng, told=looks, **form) for looks in (told, True))
        target = render(scene)
        entities = []
        for i, placed in enumerate(scene.placed):
            shown = target, i
            if rng.random() < options.other_render:
                shown = render(sample_scene(rng, [placed.subject], plain=True)), 0
            white, background = crop(*shown, white=True), crop(*shown, white=False)
            if white is None or background is None:
                break
            entities.append(Entity(noun(placed, told), background, white))
        else:  # nobody is hidden; another scene otherwise
            return ConstructedSample(line, entities, target.image, description=description)


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
"""Folder under shards/ → maker of its samples; the second argument is the data set's configuration."""


def subject_names(options: DreamBench) -> dict[str, str]:
    """Folder name → kind of every subject, spread over the kinds: cat, cat_2, …; sorted, so that a few taken evenly
    are of both sorts."""
    kinds = [OBJECTS[i % len(OBJECTS)] for i in range(options.objects)]
    kinds += [LIVE[i % len(LIVE)] for i in range(options.live)]
    met: Counter[str] = Counter()
    names = {}
    for kind in kinds:
        met[kind] += 1
        stem = kind.replace(" ", "_")
        names[stem if met[kind] == 1 else f"{stem}_{met[kind]}"] = kind
    return dict(sorted(names.items()))


def subject_scenes(rng: Random, kind: str, images: int) -> list[Scene]:
    """A new subject's scenes: the portrait, then named settings, each another while there are enough.

    Settings alone: no style, light or dress, since they are photos of the subject as it is.
    """
    subject = Subject.sample(rng, kind)
    scenes = [portrait(rng, subject)]
    settings = list(rng.permutation(PLACES))
    for i in range(images - 1):
        setting = str(settings[i % len(settings)])
        scenes.append(Scene(place(rng, [subject]), setting=setting, seed=int(rng.integers(2**31))))
    return scenes


def portrait(rng: Random, subject: Subject) -> Scene:
    """The subject alone and large in the studio."""
    (placed,) = place(rng, [subject])
    placed = replace(placed, x=0.5, y=0.5, half=PORTRAIT_HALF)
    return Scene((placed,), seed=int(rng.integers(2**31)))


def subject_files(rng: Random, kind: str, images: int) -> tuple[dict[str, Image.Image], dict[str, str]]:
    """A subject's images by file name, those of others of its kind among them, and its labels."""
    scenes = subject_scenes(rng, kind, images)
    others = [portrait(rng, Subject.sample(rng, kind)) for _ in range(OTHERS)]
    look = scenes[0].placed[0].subject.look
    named = [(f"{i:02d}.png", scene) for i, scene in enumerate(scenes)]
    named += [(f"others/{i:02d}.png", scene) for i, scene in enumerate(others)]
    labels = {"kind": kind, "colour": look.body.word, "pattern": look.pattern}
    return {name: render(scene).image for name, scene in named}, labels


def dreambench_facts(labels: dict[str, dict[str, str]]) -> dict:
    """dreambench.json of the subjects' labels: subjects and prompts in the structure of DreamBench's own facts. How
    many images a prompt gets is the protocol's to say."""
    subjects = {
        name: {
            "class": known["kind"],
            "kind": "live" if KINDS[known["kind"]].live else "object",
            "kept_image": KEPT_IMAGE,
            "labels": known,
        }
        for name, known in labels.items()
    }
    names = list(subjects)
    # Each stands once at the left and once at the right, mostly beside one of another sort.
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
    """A fresh scene and its caption; looks are named where `index` is odd."""
    scene = sample_scene(rng)
    return render(scene).image, caption(scene, rng, told=index % 2 == 1)


def coco_file_name(number: int) -> str:
    """COCO's own way to number files, in PNG."""
    return f"COCO_val2014_{number:012d}.png"


def coco_annotations(captions: list[str]) -> dict:
    """captions_val2014.json: image `number` (from 1) has the caption at `number - 1`."""
    numbered = list(enumerate(captions, start=1))
    return {
        "info": {"description": "Toyland: scenes of a small drawn world", "year": 2014, "version": "1"},
        "images": [
            {"id": number, "file_name": coco_file_name(number), "width": SIZE, "height": SIZE} for number, _ in numbered
        ],
        "annotations": [{"id": number, "image_id": number, "caption": line} for number, line in numbered],
    }
