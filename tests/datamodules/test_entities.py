"""Which entities of a caption become images. The released loaders' rows are in test_recorded.py."""

from collections import Counter
from random import Random

import pytest

from datamodules.entities import EntityRules, entity_segments
from datamodules.images import StoredImage
from datamodules.sample import ConstructedSample, Entity
from tests.datamodules import worlds


def column(number: int) -> StoredImage:
    """An image that says which TSV column it stands for."""
    return StoredImage(b"", str(number), "tsv", "row")


def sample_of(caption: str, *words: str) -> ConstructedSample:
    return ConstructedSample(
        caption, [Entity(word, column(2 * i), column(2 * i + 1)) for i, word in enumerate(words)], column(99)
    )


def rendered(segments: list) -> str:
    return "".join(item if isinstance(item, str) else f"[{item.name}]" for item in segments)


def test_the_papers_rule_drops_each_entity_by_itself_also_at_the_start():
    sample = sample_of("a cat and a dog.", "dog", "cat")
    draws = worlds.RecordedDraws([["random", value] for value in (0.9, 0.2, 0.1, 0.8)])
    assert rendered(entity_segments(sample, EntityRules(), draws)) == "a cat [3] and a [0]."
    draws = worlds.RecordedDraws([["random", 0.1], ["random", 0.1]])
    assert rendered(entity_segments(sample_of("dog in the snow", "dog"), EntityRules(), draws)) == "[1] in the snow"


@pytest.mark.parametrize("rule", ["per_caption", "per_entity"])
def test_probabilities_are_those_asked_for(rule):
    for drop, background in ((0.3, 0.8), (0, 0), (1, 1)):
        rules = EntityRules(drop=rule, drop_probability=drop, background_probability=background)
        counts, random, rounds = Counter(), Random(0), 1000
        for _ in range(rounds):
            text = rendered(entity_segments(sample_of("a cat and a dog", "dog", "cat"), rules, random))
            counts["cat"] += "cat" in text
            counts["both or none"] += ("cat" in text) == ("dog" in text)
            counts["background"] += "[0]" in text
        together = 1 if rule == "per_caption" else drop**2 + (1 - drop) ** 2
        for name, expected in (("cat", 1 - drop), ("background", background), ("both or none", together)):
            assert abs(counts[name] / rounds - expected) < (0.05 if 0 < expected < 1 else 1e-9), name


def test_what_cannot_be_placed_is_left_out():
    never = EntityRules(drop_probability=0, background_probability=0)
    for words in [("red",), ("car", "car"), ("bus",), ("ca",)]:
        assert rendered(entity_segments(sample_of("a red car", *words), never, Random(0))) == "a red car"
    inside = sample_of("a dog's-tail here", "dog", "tail")  # the tail is inside the dog's word
    assert rendered(entity_segments(inside, never, Random(0))) == "a dog's-tail [1] here"
