"""Answers of language models, good and bad, and what is kept of them."""

from datamodules.curation.config import Entities, TextFilter
from datamodules.curation.rows import new_row
from datamodules.curation.text import CaptionFilter, CheckEntities, choose_entities, parse_answer
from datamodules.entities import COLOURS, match_entities
from datamodules.sample import Entity
from tests.datamodules.worlds import image


def test_answers_are_parsed_with_patience():
    for answer, things in [
        ("dog, cat", ["dog", "cat"]),
        (" Things: a dog, the red kite and a child.\n\nCaption: a cat\nThings: cat", ["dog", "red kite", "child"]),
        ("Sure! Here are the things:\n- dog\n- hot dog\n", ["dog", "hot dog"]),
        ("1. Dog\n2. Cat\n3. **mug**", ["Dog", "Cat", "mug"]),
        ('["dog", "cat"]', ["dog", "cat"]),
        ("dog", ["dog"]),
        ("dog; cat;;", ["dog", "cat"]),
        ("none", []),
        ("None.", []),
        ("[]", []),
        ("", None),
        (" \n\n ", None),
        (", . ,", None),
        ("I am sorry but as a language model I cannot see the picture that you mean", None),
        ("[" * 5000, None),
    ]:
        assert parse_answer(answer, max_words=4) == things


def test_the_caption_alone_is_trusted():
    for candidates, caption, kept, skipped in [
        (["cat", "Dog"], "a dog and a cat", ["dog", "cat"], {}),
        (["cat"], "a caterpillar", [], {"not_in_caption": 1}),
        (["dog", "DOG"], "a Dog", ["Dog"], {"duplicate": 1}),
        (["red", "car"], "a red car", ["car"], {"ignored_word": 1}),
        (["dog", "hot dog"], "a hot dog and a dog", ["hot dog"], {"ambiguous": 1}),
        (["a", "b", "c"], "a b c", ["a", "b"], {"too_many": 1}),
        (["(dog", "dog)"], "a (dog) x", [], {"not_in_caption": 2}),
    ]:
        assert choose_entities(candidates, caption, set(COLOURS), max_entities=2) == (kept, skipped)


def test_what_is_kept_is_what_training_places():
    caption = "A small brown dog, a hot dog and two red mugs on a brown table"
    kept, _ = choose_entities(
        ["brown", "dog", "hot dog", "mugs", "table", "TABLE", "spoon"], caption, set(COLOURS), max_entities=8
    )
    entities = [Entity(text, image(0), image(0)) for text in kept]
    matched = [entity.text for entity, _ in match_entities(caption, entities, COLOURS)]
    assert matched == kept == ["hot dog", "mugs", "table"]


def test_a_bad_answer_is_a_failure_and_an_empty_list_is_not():
    rows = [
        new_row("shard", f"key{i}") | {"caption": "a dog", "answer": a}
        for i, a in enumerate(["", "none", "cat", "dog"])
    ]
    checked = CheckEntities(Entities())(rows)
    dropped = [(row["dropped"]["reason"], row["dropped"]["filtered"]) for row in checked[:3]]
    assert dropped == [("unparsable_answer", False), ("no_entities", True), ("no_entities", True)]
    assert checked[2]["skipped_entities"] == {"not_in_caption": 1}
    assert checked[3]["entities"] == [{"text": "dog"}] and "answer" not in checked[3]
    assert "answer" in rows[3]  # a batch that fails later is tried again with the rows as they were


def test_blocked_short_long_and_looping_captions_are_dropped():
    captions = {
        "a Nude, painted": "blocked_text",
        "the blood bank": "blocked_text",
        "a denuded hill in autumn": None,
        "a dog": "caption_length",
        "word " * 61: "caption_length",
        "a man in a man in a man in a hat": "repeated_words",
        "dog dog dog dog dog": "repeated_words",
        "a cat wearing a hat, a dog wearing a hat and a fish": None,
    }
    rows = [new_row("s", str(i)) | {"caption": text} for i, text in enumerate(captions)]
    filtered = CaptionFilter(TextFilter(blocked=["nude", "blood bank"]))(rows)
    assert [row.get("dropped", {}).get("reason") for row in filtered] == list(captions.values())
    assert all("dropped" not in row for row in CaptionFilter(TextFilter(min_words=1))(rows[:2]))  # an empty list is off
