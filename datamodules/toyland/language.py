"""Texts of Toyland: captions, edit instructions, documents, stories, and the 25 templates of its DreamBench.

Captions with looks describe the subjects coarsely ("a red fish with yellow stripes"), as captions on the web do.
Captions without looks ("a fish") are like those of KOSMOS-G's prompts, in which only the images show the look.
"""

from dataclasses import dataclass, replace

import numpy as np

from datamodules.toyland.brush import HUES
from datamodules.toyland.kinds import ACCESSORIES, LIVE, OBJECTS, PROPERTIES
from datamodules.toyland.scene import Placed, Scene, Subject, place, sample_scene
from datamodules.toyland.settings import LIGHTS, SETTINGS, STYLES

Random = np.random.Generator

PLACES = [name for name in SETTINGS if name]
HOURS = [name for name in LIGHTS if name]
MANNERS = [name for name in STYLES if name]


def article(words: str) -> str:
    return f"an {words}" if words[0] in "aeio" or words.startswith("umbrella") else f"a {words}"


def noun(placed: Placed, with_looks: bool) -> str:
    """Return "red fish with yellow stripes", or "fish" without looks."""
    if not with_looks:
        return placed.subject.kind
    look = placed.subject.look
    if placed.property in ("red", "purple"):
        look = look.recolored(placed.property)
    return " ".join(part for part in (look.words[0], placed.subject.kind, look.words[1]) if part)


def noun_phrase(placed: Placed, with_looks: bool, *, with_article: bool = True, suffixed: bool = True) -> str:
    """Return "a red fish with yellow stripes wearing a red hat", or "a fish wearing a red hat" without looks.

    With `suffixed`, properties follow the noun ("a mug, shiny"), as in DreamBench's rewritten prompts.
    """
    words = noun(placed, with_looks)
    if placed.property and not suffixed and placed.property != "upside down":
        words = words if words.startswith(f"{placed.property} ") else f"{placed.property} {words}"
    if with_article:
        words = article(words)
    if placed.accessory:
        words += f" wearing {placed.accessory}"
    if placed.property and (suffixed or placed.property == "upside down"):
        words += f", {placed.property}"
    return words


def caption(
    scene: Scene, rng: Random, *, with_looks: bool, with_article: bool = True, suffixed: bool | None = None
) -> str:
    """Return a line with subjects (see `noun_phrase`), setting, light and style. `suffixed` is random if None."""
    if suffixed is None:
        suffixed = bool(rng.random() < 0.7)
    names = [noun_phrase(p, with_looks, with_article=with_article, suffixed=suffixed) for p in scene.placed]
    subjects = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    return " ".join(part for part in (subjects, scene.setting, scene.light, scene.style) if part)


def templates(live: bool) -> dict[str, list]:
    """Return the 25 templates for animals or objects: `original` for the class word, `modified` for an image, and
    `labels`, which a judge should find, by label group."""
    places = [f"{{}} {tail}" for tail in PLACES + HOURS + MANNERS]
    if live:
        modified = places + [f"{{}} wearing {what}" for what in ACCESSORIES]
        original = [f"a {template}" for template in modified]
    else:
        modified = places + [f"{{}}, {what}" for what in PROPERTIES]
        original = [f"a {template}" for template in places]
        original += [f"a {what} {{}}" if what != "upside down" else f"a {{}} {what}" for what in PROPERTIES]
    labels = [
        {group: name} for group, names in (("setting", PLACES), ("light", HOURS), ("style", MANNERS)) for name in names
    ]
    labels += [
        {"dress": what} | ({"colour": what} if what in HUES else {}) for what in (ACCESSORIES if live else PROPERTIES)
    ]
    return {"original": original, "modified": modified, "labels": labels}


@dataclass(frozen=True)
class Edit:
    """A scene, an instruction, and the changed scene."""

    before: Scene
    instruction: str
    after: Scene


def sample_edit(rng: Random) -> Edit:
    """Draw one change to a scene. The instruction is like a template ("on the beach") or an order ("put it on the
    beach")."""
    kinds = rng.choice(LIVE + OBJECTS, size=1 if rng.random() < 0.75 else 2, replace=False)
    subjects = [Subject.sample(rng, str(kind)) for kind in kinds]
    before = Scene(place(rng, subjects), seed=int(rng.integers(2**31)))
    it = "it" if len(subjects) == 1 else "them"
    if rng.random() < 0.4:
        before = replace(before, setting=str(rng.choice(PLACES)))
    choice = rng.choice(["place", "hour", "manner", "dress"], p=[0.45, 0.13, 0.13, 0.29])
    if choice == "place":
        tail = str(rng.choice([name for name in PLACES if name != before.setting]))
        return Edit(before, _say(rng, tail, f"put {it} {tail}"), replace(before, setting=tail))
    if choice == "hour":
        tail = str(rng.choice(HOURS))
        return Edit(before, _say(rng, tail, f"show {it} {tail}"), replace(before, light=tail))
    if choice == "manner":
        tail = str(rng.choice(MANNERS))
        return Edit(before, _say(rng, tail, f"draw {it} {tail}"), replace(before, style=tail))
    index = int(rng.integers(len(subjects)))
    placed = before.placed[index]
    if placed.subject.live:
        what = str(rng.choice(ACCESSORIES))
        changed, tail, order = replace(placed, accessory=what), f"wearing {what}", f"give the {kinds[index]} {what}"
    else:
        what = str(rng.choice(PROPERTIES))
        changed, tail, order = replace(placed, property=what), f", {what}", f"make the {kinds[index]} {what}"
    after = replace(before, placed=(*before.placed[:index], changed, *before.placed[index + 1 :]))
    return Edit(before, _say(rng, tail, order) if len(subjects) == 1 else order, after)


def _say(rng: Random, tail: str, order: str) -> str:
    return tail if rng.random() < 0.65 else order


def document(rng: Random) -> list[str | Scene]:
    """Draw an interleaved document: texts and scenes alternate and show one or two subjects in several places."""
    subject = Subject.sample(rng)
    name = f"this {subject.kind}"
    segments: list[str | Scene] = [f"Look at {name}.", sample_scene(rng, [subject], plain=True)]
    for _ in range(int(rng.integers(1, 3))):
        scene = sample_scene(rng, [subject])
        where = " ".join(part for part in (scene.setting, scene.light, scene.style) if part) or "at home"
        dress = scene.placed[0].accessory
        wears = f" It is wearing {dress}." if dress else ""
        segments += [f"Here it is {where}.{wears}", scene]
    if rng.random() < 0.3:
        friend = Subject.sample(rng, str(rng.choice([kind for kind in LIVE + OBJECTS if kind != subject.kind])))
        scene = sample_scene(rng, [subject, friend])
        segments += [f"And now {name} with {article(friend.kind)}.", scene]
    return segments


def story(rng: Random) -> str:
    """Draw a text of a few sentences about Toyland."""
    sentences = []
    for _ in range(int(rng.integers(3, 9))):
        scene = sample_scene(rng)
        line = caption(scene, rng, with_looks=bool(rng.random() < 0.6))
        opening = rng.choice(
            ["There is {}.", "I saw {}.", "Once there was {}.", "In the picture we see {}.", "{}.", "Draw {}."]
        )
        sentence = str(opening).format(line)
        sentences.append(sentence[0].upper() + sentence[1:])
    return " ".join(sentences)
