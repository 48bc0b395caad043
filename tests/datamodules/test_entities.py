"""Constructed, edit and caption rows against the released loaders' records, with the recorded draws."""

from collections import Counter
from random import Random

import pytest
from PIL import Image

from datamodules.entities import EntityRules, entity_segments
from datamodules.errors import FilteredSample
from datamodules.images import StoredImage
from datamodules.instruction import edit_segments
from datamodules.sample import ConstructedSample, EditSample, Entity
from kosmosg.prompt import PromptEncoder
from tests.datamodules import worlds

RELEASED = EntityRules(drop="per_caption")


class RecordedDraws:
    def __init__(self, draws: list):
        self.draws = list(draws)

    def random(self) -> float:
        kind, value = self.draws.pop(0)
        assert kind == "random"
        return value

    def randint(self, a: int, b: int) -> int:
        kind, low, high, value = self.draws.pop(0)
        assert (kind, low, high) == ("randint", a, b)
        return value


def column(number: int) -> StoredImage:
    """An image that says which TSV column it stands for."""
    return StoredImage(worlds.png(number), str(number), "tsv", "row")


def tokens(encoder: PromptEncoder, segments: list) -> tuple[list[int], list[int]]:
    decoded = [item if isinstance(item, str) else Image.new("RGB", (8, 8)) for item in segments]
    prompt = encoder(decoded, eos=True)  # the record has the document; its source is all but the last token
    return prompt.ids.tolist(), prompt.image_mask.int().tolist()


def test_constructed_rows_are_the_recorded_ones(loaders, full_encoder):
    for row in loaders["openimage"]:
        entities = [Entity(tag, column(3 + 2 * i), column(4 + 2 * i)) for i, tag in enumerate(row["tags"])]
        sample = ConstructedSample(row["caption"], entities, column(2))
        draws = RecordedDraws(row["draws"])
        if not row["yielded"]:
            with pytest.raises(FilteredSample, match="nothing_before_object"):
                entity_segments(sample, RELEASED, draws)
            continue
        segments = entity_segments(sample, RELEASED, draws)
        assert not draws.draws
        assert [segment for segment in segments if isinstance(segment, str)] == [
            text for text in row["text_transform_calls"] if text
        ]
        assert [int(item.name) for item in [*segments, sample.target] if not isinstance(item, str)] == row[
            "image_columns"
        ]
        ids, mask = tokens(full_encoder, segments)
        assert ids == row["tokens"] and mask == row["input_mask"]


def test_edit_rows_are_the_recorded_ones(loaders, full_encoder):
    for row in loaders["instructpix2pix"]:
        (source, target), *more = [(column(2 + 2 * i), column(3 + 2 * i)) for i in range(row["n_pairs"])]
        sample = EditSample(row["input"], row["edit"], source, target, more=more)
        draws = RecordedDraws(row["draws"])
        segments, target = edit_segments(sample, loaders["random_drop_caption_prob"], draws)
        assert not draws.draws
        images = [item for item in [*segments, target] if not isinstance(item, str)]
        assert [int(image.name) for image in images] == row["image_columns"]
        ids, mask = tokens(full_encoder, segments)
        assert ids == row["tokens"] and mask == row["input_mask"]


def sample_of(caption: str, *words: str) -> ConstructedSample:
    return ConstructedSample(
        caption, [Entity(word, column(2 * i), column(2 * i + 1)) for i, word in enumerate(words)], column(99)
    )


def rendered(segments: list) -> str:
    return "".join(item if isinstance(item, str) else f"[{item.name}]" for item in segments)


def test_the_papers_rule_drops_each_entity_by_itself():
    sample = sample_of("a cat and a dog.", "dog", "cat")
    draws = RecordedDraws([["random", value] for value in (0.9, 0.2, 0.1, 0.8)])
    assert rendered(entity_segments(sample, EntityRules(), draws)) == "a cat [3] and a [0]."


def test_the_papers_rule_keeps_rows_that_start_with_the_object():
    draws = RecordedDraws([["random", 0.1], ["random", 0.1]])
    assert rendered(entity_segments(sample_of("dog in the snow", "dog"), EntityRules(), draws)) == "[1] in the snow"


def test_probabilities_are_those_asked_for():
    for rule in ["per_caption", "per_entity"]:
        rules = EntityRules(drop=rule, drop_probability=0.3, background_probability=0.8)
        counts: Counter = Counter()
        random = Random(0)
        for _ in range(4000):
            text = rendered(entity_segments(sample_of("a cat and a dog", "dog", "cat"), rules, random))
            counts["cat"] += "cat" in text
            counts["both or none"] += ("cat" in text) == ("dog" in text)
            counts["background"] += "[0]" in text
        assert abs(counts["cat"] / 4000 - 0.7) < 0.03
        assert abs(counts["background"] / 4000 - 0.8) < 0.03
        assert abs(counts["both or none"] / 4000 - (1 if rule == "per_caption" else 0.58)) < 0.03


def test_extremes_never_and_always():
    sample = sample_of("a dog", "dog")
    always = EntityRules(drop_probability=1, background_probability=1)
    never = EntityRules(drop_probability=0, background_probability=0)
    for seed in range(50):
        assert rendered(entity_segments(sample, always, Random(seed))) == "a [0]"
        assert rendered(entity_segments(sample, never, Random(seed))) == "a dog [1]"


def test_what_cannot_be_placed_is_left_out():
    for words in [("red",), ("car", "car"), ("bus",), ("ca",)]:
        assert (
            rendered(entity_segments(sample_of("a red car", *words), EntityRules(drop_probability=0), Random(0)))
            == "a red car"
        )


def test_an_entity_inside_another_ones_words_is_left_out():
    sample = sample_of("a dog's-tail here", "dog", "tail")
    assert rendered(entity_segments(sample, EntityRules(drop_probability=0, background_probability=0), Random(0))) == (
        "a dog's-tail [1] here"
    )


def test_rules_are_checked():
    for key, value in [("drop_probability", 1.1), ("background_probability", -1), ("drop", "never")]:
        with pytest.raises(ValueError, match=key):
            EntityRules(**{key: value})
