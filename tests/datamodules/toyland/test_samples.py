"""Toyland's single samples: new subjects everywhere, crops of what the caption names, and evaluation sets as asked."""

from collections import Counter

import numpy as np
import pytest

from datamodules.entities import COLOURS, match_entities
from datamodules.toyland import samples, scene
from datamodules.toyland.config import Captions, Constructed, DreamBench, ToylandData
from datamodules.toyland.data_sets import chunks, data_sets, draw_chunk
from datamodules.toyland.kinds import KINDS, LIVE
from datamodules.toyland.scene import SIZE, Rendered, crop, render
from kosmosg.config import ConfigError, load_config


def generator(number: int = 0) -> np.random.Generator:
    return samples.sample_generator(0, "constructed", "train", number)


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[Rendered]:
    """Every picture that `samples` renders, in order."""
    seen: list[Rendered] = []
    monkeypatch.setattr(samples, "render", lambda scene: seen.append(render(scene)) or seen[-1])
    return seen


def test_no_subject_is_met_in_two_splits_or_data_sets(monkeypatch):
    met: dict[str, set] = {}
    sample_look = scene.sample_look

    def recorded(rng):
        look = sample_look(rng)
        met.setdefault(current, set()).add(look)
        return look

    monkeypatch.setattr(scene, "sample_look", recorded)
    config = ToylandData()
    for data_set in data_sets(config):
        for split in data_set.splits:
            current = f"{data_set.name}/{split}"
            draw_chunk(chunks(data_set.name, split, 3, 0, data_set.options)[0])
    assert len(met) == 12 and all(len(looks) >= 3 for looks in met.values())
    assert len(set.union(*met.values())) == sum(map(len, met.values()))


def test_the_sample_depends_on_seed_and_number_alone():
    first, again = (samples.edit_sample(samples.sample_generator(3, "edit", "val", 5)).encode() for _ in range(2))
    assert first == again
    for seed, part, split, number in [(4, "edit", "val", 5), (3, "edit", "train", 5), (3, "edit", "val", 6)]:
        assert samples.edit_sample(samples.sample_generator(seed, part, split, number)).encode() != first


def test_entities_are_found_in_the_caption_in_its_order():
    counts = Counter()
    for number in range(60):
        sample = samples.constructed_sample(generator(number), Constructed())
        found = [entity for entity, _ in match_entities(sample.caption, sample.entities, COLOURS)]
        assert found == sample.entities
        assert all(picture.size == (SIZE, SIZE) for e in found for picture in (e.white, e.background, sample.target))
        counts[len(found)] += 1
        counts["article"] += sample.caption.startswith(("a ", "an "))
    assert counts[1] and counts[2] and 15 <= counts["article"] <= 45


def test_crops_come_from_the_target_or_from_another_picture(rendered):
    sample = samples.constructed_sample(generator(1), Constructed(other_render=0))
    assert rendered[-1].image is sample.target
    for i, entity in enumerate(sample.entities):
        assert entity.white.tobytes() == crop(rendered[-1], i, white=True).tobytes()
        assert entity.background.tobytes() == crop(rendered[-1], i, white=False).tobytes()
    rendered.clear()
    entities = sum(len(samples.constructed_sample(generator(n), Constructed()).entities) for n in range(60))
    assert 0.3 < (len(rendered) - 60) / entities < 0.7, "half of them, unless asked otherwise"
    rendered.clear()
    sample = samples.constructed_sample(generator(1), Constructed(other_render=1))
    assert rendered[0].image is sample.target and len(rendered) == 1 + len(sample.entities)
    for entity, other in zip(sample.entities, rendered[1:], strict=True):
        assert entity.white.tobytes() == crop(other, 0, white=True).tobytes()
        assert len(other.masks) == 1


def test_captions_tell_of_looks_as_often_as_asked_and_every_other_one_of_coco():
    for n in range(20):
        untold, told = (samples.caption_sample(generator(n), Captions(told=told)).caption for told in (0, 1))
        assert len(told) > len(untold)
        untold, told = (samples.coco_image(generator(n), index) for index in (0, 1))
        assert untold[0].tobytes() == told[0].tobytes() and len(untold[1]) < len(told[1])


def test_dreambench_spreads_over_the_kinds_and_shows_one_subject_as_large_as_crops_do():
    names = samples.subject_names(DreamBench())
    assert len(names) == 30 and set(names.values()) == set(KINDS) and names["cat_2"] == "cat"
    assert sum(kind in LIVE for kind in names.values()) == 9
    assert max(Counter(names.values()).values()) - min(Counter(names.values()).values()) <= 2
    for kind in KINDS:
        portrait, *others = samples.subject_scenes(generator(3), kind, 4)
        assert len({one.placed[0].subject for one in (portrait, *others)}) == 1
        assert portrait.setting == "" and len({one.setting for one in others} - {""}) == 3
        for one in (portrait, *others):
            assert (one.light, one.style, one.placed[0].accessory, one.placed[0].property) == ("", "", None, None)
        mask = render(portrait).masks[0]
        extent = max(np.ptp(np.flatnonzero(mask.any(axis))) + 1 for axis in (0, 1)) / SIZE
        assert 0.6 < extent < 0.95
        assert not (mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())


def test_mistakes_in_the_configuration_are_named():
    for argument, message in [
        ("coco.images=1", "coco.images=1 must be at least 2"),
        ("text.train=0", "text.train=0 must be at least 1"),
        ("captions.told=1.5", r"captions.told=1.5 must be in 0 … 1"),
        ("constructed.other_render=-1", "constructed.other_render=-1.0 must be in 0 … 1"),
        ("dreambench={objects: 0, live: 0}", "leave no subject"),
        ("processes=0", "processes=0 must be at least 1"),
        ("edit.told=1", "Key 'told' not in 'Edit'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_config([argument], ToylandData)
