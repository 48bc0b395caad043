"""DreamBench and MS-COCO in miniature, in the folders that `evaluation/` reads.

DreamBench: `<subject>/00.png` is the kept image, the subject alone and large in the studio; the others show it in named
settings. COCO: scenes with one caption each, every other one of which names looks.
"""

from collections import Counter
from dataclasses import replace

import numpy as np
from PIL import Image

from datamodules.toyland.config import DreamBench
from kosmosg.toyland.kinds import KINDS, LIVE, OBJECTS
from kosmosg.toyland.language import PLACES, caption, templates
from kosmosg.toyland.scene import SIZE, Scene, Subject, place, render, sample_scene

Random = np.random.Generator

KEPT_IMAGE = "00.png"
PORTRAIT_HALF = 0.4
"""Half side of the kept image's subject, in picture sides: as large as crops of entities show theirs."""


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
    (portrait,) = place(rng, [subject])
    portrait = replace(portrait, x=0.5, y=0.5, half=PORTRAIT_HALF)
    scenes = [Scene((portrait,), seed=int(rng.integers(2**31)))]
    settings = list(rng.permutation(PLACES))
    for i in range(images - 1):
        setting = str(settings[i % len(settings)])
        scenes.append(Scene(place(rng, [subject]), setting=setting, seed=int(rng.integers(2**31))))
    return scenes


def subject_images(rng: Random, kind: str, images: int) -> list[Image.Image]:
    """See `subject_scenes`."""
    return [render(scene).image for scene in subject_scenes(rng, kind, images)]


def dreambench_facts(names: dict[str, str]) -> dict:
    """dreambench.json: subjects and prompts in the structure of DreamBench's own facts. How many images a prompt gets
    is the protocol's to say."""
    subjects = {
        name: {"class": kind, "kind": "live" if KINDS[kind].live else "object", "kept_image": KEPT_IMAGE}
        for name, kind in names.items()
    }
    prompts = {"object": templates(live=False), "live": templates(live=True)}
    live = sum(subject["kind"] == "live" for subject in subjects.values())
    return {
        "subjects": subjects,
        "n_subjects": len(subjects),
        "n_objects": len(subjects) - live,
        "n_live": live,
        "prompts_per_subject": len(prompts["object"]["original"]),
        "prompts": prompts,
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
