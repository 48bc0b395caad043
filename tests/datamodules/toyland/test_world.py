"""The drawn world: exact in its masks and true to its words."""

from dataclasses import replace

import numpy as np
import pytest

from datamodules.toyland.brush import HUES, PATTERNS
from datamodules.toyland.kinds import ACCESSORIES, KINDS, LIVE, PROPERTIES
from datamodules.toyland.language import HOURS, MANNERS, PLACES, caption, document, sample_edit, story, templates
from datamodules.toyland.scene import SIZE, Placed, Scene, Subject, crop, render, sample_scene
from datamodules.toyland.settings import LIGHTS, SETTINGS, STYLES


def pixels(scene: Scene, size: int = SIZE) -> np.ndarray:
    return np.asarray(render(scene, size).image).astype(int)


def subject(kind: str = "cat", seed: int = 0) -> Subject:
    return Subject.sample(np.random.default_rng(seed), kind)


def test_two_individuals_of_a_kind_differ_and_both_are_seen():
    for kind in KINDS:
        rendered = [render(Scene((Placed(subject(kind, seed)),))) for seed in (1, 2)]
        assert all(0.05 < r.masks[0].mean() < 0.6 for r in rendered)
        assert np.abs(np.subtract(*(np.asarray(r.image).astype(int) for r in rendered))).max() > 60


def test_mask_is_where_the_picture_changes_without_the_subject():
    """Away from the antialiased edge, the mask is exactly the pixels that the subject changes."""
    for size in [32, 96]:
        scene = Scene((Placed(subject("fish", 5)),), setting="on the beach", seed=7)
        changed = np.abs(pixels(scene, size) - pixels(replace(scene, placed=()), size)).max(-1) > 0
        mask = render(scene, size).masks[0]
        assert mask.any() and not (mask & ~changed).sum() > 0.02 * mask.sum()  # a pixel may match the sea by chance
        assert (changed & ~mask).sum() <= 4 * size  # the soft edge alone


def test_the_nearer_subject_hides_the_mask_of_the_farther():
    near, far = Placed(subject("mug"), x=0.55), Placed(subject("car"), x=0.45)
    masks = render(Scene((far, near))).masks
    assert not (masks[0] & masks[1]).any()
    assert masks[0].sum() < render(Scene((far,))).masks[0].sum()


def test_every_word_shows_in_the_picture_and_what_is_worn_is_no_part_of_the_subject():
    plain = Scene((Placed(subject()),), seed=1)
    names = {"setting": SETTINGS, "light": LIGHTS, "style": STYLES}
    for change in ({part: name} for part, of in names.items() for name in of if name):
        assert np.abs(pixels(plain) - pixels(replace(plain, **change))).mean() > 5, change
    for what in PROPERTIES:
        bare = Placed(subject("boot", 3))
        assert np.abs(pixels(Scene((bare,))) - pixels(Scene((replace(bare, property=what),)))).max() > 60, what
    for accessory in ACCESSORIES:
        for kind in LIVE:
            bare = Placed(subject(kind), y=0.6, half=0.3)
            worn = replace(bare, accessory=accessory)
            difference = np.abs(pixels(Scene((bare,)), 64) - pixels(Scene((worn,)), 64)).max(-1) > 30
            assert difference.sum() >= 12, (accessory, kind)
            assert np.array_equal(render(Scene((bare,))).masks, render(Scene((worn,))).masks)


def test_mistakes_name_what_is_allowed():
    with pytest.raises(ValueError, match=r"setting 'on mars' is unknown; allowed: .*'on the beach'"):
        Scene((Placed(subject()),), setting="on mars")
    with pytest.raises(ValueError, match="property 'loud' is unknown; allowed: red"):
        Placed(subject(), property="loud")
    with pytest.raises(ValueError, match="a mug is an object and wears nothing"):
        render(Scene((Placed(subject("mug"), accessory="a red hat"),)))


def test_crops_show_the_subject_alone_or_with_what_is_around_it_and_nothing_of_a_hidden_one():
    rendered = render(Scene((Placed(subject("clock"), y=0.5, half=0.25),), setting="in the jungle"), 64)
    white, around = (np.asarray(crop(rendered, 0, white=white, size=64)) for white in (True, False))
    assert white.shape == around.shape == (64, 64, 3)
    assert (white[:2] == 255).all() and (white[:, :2] == 255).all()  # nothing of the jungle is left
    assert (around[0] != 255).any()
    assert np.abs(white.astype(int) - around)[28:36, 28:36].max() < 3  # the same square on the subject
    hidden = render(Scene((Placed(subject("fish"), half=0.1), Placed(subject("car"), half=0.4, y=0.55))))
    assert crop(hidden, 0, white=True) is None


def test_captions_tell_of_looks_where_asked_and_always_of_place_hour_style_and_dress():
    rng = np.random.default_rng(0)
    looks = {*HUES, "white", "gray", "black", *filter(None, PATTERNS.values())}
    for _ in range(100):
        scene = sample_scene(rng)
        bare = tuple(replace(placed, accessory=None, property=None) for placed in scene.placed)
        scene = replace(scene, setting="", placed=bare)
        assert not looks & set(caption(scene, rng, with_looks=False).split())
        told = caption(scene, rng, with_looks=True)
        assert all(placed.subject.kind in told and placed.subject.look.body.word in told for placed in scene.placed)
    placed = replace(Placed(subject("dog")), accessory="a blue scarf")
    scene = Scene((placed,), setting="in the snow", light="at night", style="as a sketch")
    assert caption(scene, rng, with_looks=False) == "a dog wearing a blue scarf in the snow at night as a sketch"


def test_twenty_five_templates_and_what_each_asks_for():
    for live in [True, False]:
        names = templates(live)
        assert len(names["original"]) == len(names["modified"]) == 25
        assert len(set(names["modified"])) == 25
        assert all(template.count("{}") == 1 for template in names["original"] + names["modified"])
        assert all(t.startswith("{}") for t in names["modified"])  # the leading article is dropped, as in the paper
        animal = subject("bird" if live else "lamp")
        scenes = [Scene((Placed(animal),), setting=name) for name in PLACES]
        scenes += [Scene((Placed(animal),), light=name) for name in HOURS]
        scenes += [Scene((Placed(animal),), style=name) for name in MANNERS]
        changes = [{"accessory": name} for name in ACCESSORIES] if live else [{"property": name} for name in PROPERTIES]
        scenes += [Scene((Placed(animal, **change),)) for change in changes]
        for template, scene in zip(names["modified"], scenes, strict=True):
            words = caption(scene, FixedRandom(), with_looks=False, with_article=False)
            assert words == template.format(animal.kind)


class FixedRandom:
    def random(self) -> float:
        return 0.0


def test_edits_change_only_what_they_say():
    rng = np.random.default_rng(1)
    seen = set()
    for _ in range(100):
        edit = sample_edit(rng)
        assert edit.before != edit.after
        changed = {
            name for name in ("setting", "light", "style") if getattr(edit.before, name) != getattr(edit.after, name)
        }
        bodies = [tuple(p.subject for p in scene.placed) for scene in (edit.before, edit.after)]
        assert bodies[0] == bodies[1] and len(changed) <= 1
        if changed:
            (name,) = changed
            assert getattr(edit.after, name) in edit.instruction
            seen.add(name)
        else:
            (placed,) = [b for a, b in zip(edit.before.placed, edit.after.placed, strict=True) if a != b]
            assert (placed.accessory or placed.property) in edit.instruction
            seen.add("dress")
    assert seen == {"setting", "light", "style", "dress"}


def test_documents_and_stories_are_about_the_world():
    for seed in range(20):
        segments = document(np.random.default_rng(seed))
        scenes = [segment for segment in segments if isinstance(segment, Scene)]
        assert len(scenes) >= 2 and isinstance(segments[0], str)
        assert len({scene.placed[0].subject for scene in scenes}) == 1, "one individual in all pictures"
    text = story(np.random.default_rng(2))
    assert text.count(".") >= 3 and any(kind in text for kind in KINDS)
