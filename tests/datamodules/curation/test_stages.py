"""From heat to crops with the truth at hand; answers of language models, good and bad, and what is kept of them."""

import io

import numpy as np
import pytest
from PIL import Image

from datamodules.curation.config import Crops, Entities, Stored, TextFilter
from datamodules.curation.images import CutEntities, Prepare, crop, largest_region, square_box
from datamodules.curation.rows import decode_grey, encode_grey, new_row
from datamodules.curation.text import CaptionFilter, CheckEntities, choose_entities, parse_answer
from datamodules.curation.toyland import iou
from datamodules.entities import COLOURS, match_entities
from datamodules.images import Limits, StoredImage, encode_png
from datamodules.sample import Entity
from tests.datamodules.worlds import image


def disc(side: int, x: float, y: float, radius: float) -> np.ndarray:
    across = np.arange(side)
    return np.hypot(across - x, across[:, None] - y) < radius


def test_an_upright_image_is_what_is_stored():
    picture, stream, exif = Image.new("RGB", (40, 60)), io.BytesIO(), Image.Exif()
    picture.paste((255, 0, 0), (0, 0, 40, 30))
    exif[0x0112] = 3  # upside down
    picture.save(stream, "PNG", exif=exif)
    row = new_row("s", "k") | {"data": stream.getvalue()}
    (row,) = Prepare(Stored(side=8, min_side=8, format="png"), Limits())([row])
    stored = StoredImage(row["image"], "i", "s", "k").load()
    assert stored.getpixel((4, 7)) == (255, 0, 0) and stored.getpixel((4, 0)) == (0, 0, 0)


def test_the_largest_region_of_the_heat_scaled_and_dilated_is_the_mask():
    mask = disc(64, 20, 20, 9)
    heat = np.where(mask | disc(64, 50, 50, 4), 200, 20).astype(np.uint8)
    assert (largest_region(heat, 64, threshold=0.5, dilation=0) == mask).all()
    small = largest_region(disc(16, 7.5, 7.5, 5).astype(np.uint8) * 255, 64, 0.5, 0)
    assert iou(small, disc(64, 31.5, 31.5, 20)) > 0.9
    heat = np.zeros((100, 100), np.uint8)
    heat[40:60, 30:49] = heat[40:60, 52:70] = 255  # three pixels apart
    assert largest_region(heat, 100, 0.3, dilation=0).sum() == 20 * 19
    wide = largest_region(heat, 100, 0.3, dilation=0.05)
    assert np.argwhere(wide).min(0).tolist() == [38, 28] and np.argwhere(wide).max(0).tolist() == [61, 71]
    assert iou(wide, heat > 0) == pytest.approx((20 * 19 + 20 * 18) / (24 * 44), abs=1e-4)


def test_the_square_holds_the_mask_stays_inside_and_is_white_outside_the_mask_alone():
    for rows, columns, box in [
        (slice(10, 20), slice(30, 34), (27, 10, 37, 20)),
        (slice(0, 20), slice(0, 2), (0, 0, 20, 20)),  # slid in from the left
        (slice(40, 50), slice(45, 50), (40, 40, 50, 50)),  # and from the right
        (slice(0, 50), slice(3, 4), (0, 0, 50, 50)),
    ]:
        mask = np.zeros((50, 50), bool)
        mask[rows, columns] = True
        assert square_box(mask) == box
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 200, (40, 40, 3), np.uint8))
    mask = disc(40, 15, 22, 8)
    left, top, right, bottom = box = square_box(mask)
    background, white = (np.asarray(cut) for cut in crop(picture, mask, box))
    inside = mask[top:bottom, left:right]
    assert (background == np.asarray(picture)[top:bottom, left:right]).all()
    assert (white[inside] == background[inside]).all() and (white[~inside] == 255).all()


def test_unfit_masks_are_skipped_and_counted():
    crops, stored = Crops(min_area=0.005, max_area=0.5, min_side=4), Stored(side=32, min_side=1, format="png")
    masks = {
        "nothing_found": np.zeros((32, 32), bool),
        "mask_too_small": disc(32, 10, 10, 1),
        "mask_too_large": np.ones((32, 32), bool),
        "crop_too_small": np.pad(np.ones((3, 3), bool), ((5, 24), (5, 24))),
        "kept": disc(32, 16, 16, 6),
    }
    heats = [{"text": name, "heat": encode_grey(mask * np.uint8(255))} for name, mask in masks.items()]
    row = new_row("shard", "key") | {"caption": "x", "entities": heats}
    row["image"] = encode_png(Image.new("RGB", (32, 32)))
    (cut,) = CutEntities(crops, stored)([row])
    (entity,) = cut["entities"]
    assert entity["text"] == "kept" and (decode_grey(entity["mask"]) == masks["kept"]).all()
    assert cut["skipped_entities"] == {name: 1 for name in masks if name != "kept"}
    assert StoredImage(entity["white"], "white", "s", "k").load().size == (11, 11)
    (dropped,) = CutEntities(crops, stored)([row | {"entities": heats[:3]}])
    assert dropped["dropped"]["reason"] == "no_crops" and "image" not in dropped


def test_answers_are_parsed_with_patience():
    for answer, things in [
        ("dog, cat", ["dog", "cat"]),
        (" Things: a dog, the red kite and a child.\n\nCaption: a cat\nThings: cat", ["dog", "red kite", "child"]),
        ("Sure! Here are the things:\n- dog\n- hot dog\n", ["dog", "hot dog"]),
        ("1. Dog\n2. Cat\n3. **mug**", ["Dog", "Cat", "mug"]),
        ('["dog", "cat"]', ["dog", "cat"]),
        ("dog; cat;;", ["dog", "cat"]),
        *((none, []) for none in ("none", "None.", "[]")),
        *((bad, None) for bad in ("", " \n\n ", ", . ,", "[" * 5000)),
        ("I am sorry but as a language model I cannot see the picture that you mean", None),
    ]:
        assert parse_answer(answer, max_words=4) == things


def test_the_caption_alone_is_trusted_and_what_is_kept_is_what_training_places():
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
    caption = "A small brown dog, a hot dog and two red mugs on a brown table"
    candidates = ["brown", "dog", "hot dog", "mugs", "table", "TABLE", "spoon"]
    kept, _ = choose_entities(candidates, caption, set(COLOURS), max_entities=8)
    placed = match_entities(caption, [Entity(text, image(0), image(0)) for text in kept], COLOURS)
    assert [entity.text for entity, _ in placed] == kept == ["hot dog", "mugs", "table"]


def test_a_bad_answer_is_a_failure_and_an_empty_list_is_not():
    answers = ("", "none", "cat", "dog")
    rows = [new_row("shard", f"key{i}") | {"caption": "a dog", "answer": given} for i, given in enumerate(answers)]
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
        "a cat wearing a hat, a dog wearing a hat and a fish": None,
    }
    rows = [new_row("s", str(i)) | {"caption": text} for i, text in enumerate(captions)]
    filtered = CaptionFilter(TextFilter(blocked=["nude", "blood bank"]))(rows)
    assert [row.get("dropped", {}).get("reason") for row in filtered] == list(captions.values())
    assert all("dropped" not in row for row in CaptionFilter(TextFilter(min_words=1))(rows[:2]))  # an empty list is off
