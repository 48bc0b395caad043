"""Which entities of a caption become images. The released loaders' rows are in test_recorded.py."""

from collections import Counter
from random import Random

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


def test_probabilities_are_those_asked_for():
    for rule in ["per_caption", "per_entity"]:
        rules = EntityRules(drop=rule, drop_probability=0.3, background_probability=0.8)
        counts: Counter = Counter()
        random = Random(0)
        for _ in range(1000):
            text = rendered(entity_segments(sample_of("a cat and a dog", "dog", "cat"), rules, random))
            counts["cat"] += "cat" in text
            counts["both or none"] += ("cat" in text) == ("dog" in text)
            counts["background"] += "[0]" in text
        assert abs(counts["cat"] / 1000 - 0.7) < 0.05
        assert abs(counts["background"] / 1000 - 0.8) < 0.05
        assert abs(counts["both or none"] / 1000 - (1 if rule == "per_caption" else 0.58)) < 0.05


def test_extremes_never_and_always():
    sample = sample_of("a dog", "dog")
    always = EntityRules(drop_probability=1, background_probability=1)
    never = EntityRules(drop_probability=0, background_probability=0)
    for seed in range(50):
        assert rendered(entity_segments(sample, always, Random(seed))) == "a [0]"
        assert rendered(entity_segments(sample, never, Random(seed))) == "a dog [1]"


def test_what_cannot_be_placed_is_left_out():
    never = EntityRules(drop_probability=0, background_probability=0)
    for words in [("red",), ("car", "car"), ("bus",), ("ca",)]:
        assert rendered(entity_segments(sample_of("a red car", *words), never, Random(0))) == "a red car"
    inside = sample_of("a dog's-tail here", "dog", "tail")  # the tail is inside the dog's word
    assert rendered(entity_segments(inside, never, Random(0))) == "a dog's-tail [1] here"
