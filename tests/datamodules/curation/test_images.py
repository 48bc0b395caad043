"""From heat to crops, with the truth at hand."""

import io

import numpy as np
import pytest
from PIL import Image

from datamodules.curation.config import Crops, Stored
from datamodules.curation.images import CutEntities, Prepare, crop, largest_region, square_box
from datamodules.curation.rows import decode_grey, encode_grey, new_row
from datamodules.curation.toyland import iou
from datamodules.images import Limits, StoredImage, encode_png


def disc(side: int, x: float, y: float, radius: float) -> np.ndarray:
    across = np.arange(side)
    return np.hypot(across - x, across[:, None] - y) < radius


def test_an_upright_image_is_what_is_stored():
    image, stream, exif = Image.new("RGB", (40, 60)), io.BytesIO(), Image.Exif()
    image.paste((255, 0, 0), (0, 0, 40, 30))
    exif[0x0112] = 3  # upside down
    image.save(stream, "PNG", exif=exif)
    row = new_row("s", "k") | {"data": stream.getvalue()}
    (row,) = Prepare(Stored(side=8, min_side=8, format="png"), Limits())([row])
    stored = StoredImage(row["image"], "i", "s", "k").load()
    assert stored.getpixel((4, 7)) == (255, 0, 0) and stored.getpixel((4, 0)) == (0, 0, 0)


def test_the_largest_region_is_kept_alone():
    mask = disc(64, 20, 20, 9)
    heat = np.where(mask | disc(64, 50, 50, 4), 200, 20).astype(np.uint8)
    assert (largest_region(heat, 64, threshold=0.5, dilation=0) == mask).all()


def test_dilation_joins_near_parts_and_widens_by_what_is_asked():
    heat = np.zeros((100, 100), np.uint8)
    heat[40:60, 30:49] = heat[40:60, 52:70] = 255  # three pixels apart
    assert largest_region(heat, 100, 0.3, dilation=0).sum() == 20 * 19
    wide = largest_region(heat, 100, 0.3, dilation=0.05)
    assert np.argwhere(wide).min(0).tolist() == [38, 28] and np.argwhere(wide).max(0).tolist() == [61, 71]
    assert iou(wide, heat > 0) == pytest.approx((20 * 19 + 20 * 18) / (24 * 44), abs=1e-4)


def test_heat_of_another_size_is_scaled():
    found = largest_region(disc(16, 7.5, 7.5, 5).astype(np.uint8) * 255, 64, 0.5, 0)
    assert iou(found, disc(64, 31.5, 31.5, 20)) > 0.9


def test_the_square_holds_the_mask_and_stays_inside():
    for rows, columns, box in [
        (slice(10, 20), slice(30, 34), (27, 10, 37, 20)),
        (slice(0, 20), slice(0, 2), (0, 0, 20, 20)),  # slid in from the left
        (slice(40, 50), slice(45, 50), (40, 40, 50, 50)),  # and from the right
        (slice(0, 50), slice(3, 4), (0, 0, 50, 50)),
    ]:
        mask = np.zeros((50, 50), bool)
        mask[rows, columns] = True
        assert square_box(mask) == box


def test_the_white_crop_is_white_outside_the_mask_alone():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 200, (40, 40, 3), np.uint8))
    mask = disc(40, 15, 22, 8)
    box = square_box(mask)
    background, white = (np.asarray(cut) for cut in crop(image, mask, box))
    left, top, right, bottom = box
    inside = mask[top:bottom, left:right]
    assert (background == np.asarray(image)[top:bottom, left:right]).all()
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
    image = Image.new("RGB", (32, 32))
    row = new_row("shard", "key") | {"caption": "x", "entities": heats, "image": encode_png(image)}
    (cut,) = CutEntities(crops, stored)([row])
    assert [entity["text"] for entity in cut["entities"]] == ["kept"]
    assert cut["skipped_entities"] == {name: 1 for name in masks if name != "kept"}
    (entity,) = cut["entities"]
    assert (decode_grey(entity["mask"]) == masks["kept"]).all()
    assert StoredImage(entity["white"], "white", "s", "k").load().size == (11, 11)
    (dropped,) = CutEntities(crops, stored)([row | {"entities": heats[:3]}])
    assert dropped["dropped"]["reason"] == "no_crops" and "image" not in dropped
