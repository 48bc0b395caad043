"""Toyland's ground truth in the place of the three models, and how far the recovered masks are from the true ones.

The input are the images of Toyland's caption shards; their captions are not read. An image's scene is drawn again from
its number, which is its key.
"""

import numpy as np
from PIL import Image
from scipy import ndimage

from datamodules.curation.config import Toyland
from datamodules.curation.rows import Batch, Row, decode_grey, encode_grey, row_image
from datamodules.errors import SampleError
from datamodules.toyland import language
from datamodules.toyland.samples import sample_generator
from datamodules.toyland.scene import Rendered, Scene, render, sample_scene

LARGEST_DIFFERENCE = 12.0
"""Mean over pixels, of 255: what storing an image as JPEG may change. Another scene is several times as far."""
HEAT_SIDE, BLUR, NOISE, SPECKS = 64, 0.02, 0.05, 2
"""Heat maps are as bad as a segmenter's: pixels, blur in image sides, noise, hot spots elsewhere."""


class GroundTruth:
    """The methods `caption`, `entities`, `masks` and `score` are stages (datamodules/curation/rows.py)."""

    def __init__(self, config: Toyland, seed: int):
        self.config, self.seed = config, seed

    def caption(self, batch: Batch) -> Batch:
        """`caption` without looks, as the constructed set has them. Raises SampleError `not_toyland`."""
        return [row | {"caption": self._caption(row)} for row in batch]

    def entities(self, batch: Batch) -> Batch:
        """`answer`: the subjects' kinds, as a language model lists them."""
        return [row | {"answer": ", ".join(kinds(self.scene(row)))} for row in batch]

    def masks(self, batch: Batch) -> Batch:
        """`heat` of each entity, from its true mask."""
        return [row | {"entities": self._heat(row)} for row in batch]

    def score(self, batch: Batch) -> Batch:
        """`iou` of each entity: its recovered mask against the true one, intersection over union (0 … 1)."""
        return [row | {"entities": self._scores(row)} for row in batch]

    def scene(self, row: Row) -> Scene:
        """The scene of a row's key."""
        if not row["key"].isdigit():
            raise SampleError("not_toyland", row["shard"], row["key"], "keys of Toyland's captions are numbers")
        return sample_scene(sample_generator(self.config.seed, "captions", self.config.split, int(row["key"])))

    def random(self, row: Row, purpose: str) -> np.random.Generator:
        """A row's own random numbers, whoever works on it."""
        return sample_generator(self.seed, f"curation/{purpose}", self.config.split, int(row["key"]))

    def _caption(self, row: Row) -> str:
        scene, found, rng = self.scene(row), row_image(row), self.random(row, "caption")
        drawn = render(scene).image.resize(found.size, Image.Resampling.BICUBIC)
        difference = float(np.abs(np.asarray(found, float) - np.asarray(drawn, float)).mean())
        if difference > LARGEST_DIFFERENCE:
            detail = f"{difference:.0f} of 255 from scene {row['key']} of '{self.config.split}'; is toyland.* right?"
            raise SampleError("not_toyland", row["shard"], row["key"], detail)
        return language.caption(scene, rng, told=False, with_article=bool(rng.random() < 0.5))

    def _heat(self, row: Row) -> list[dict]:
        scene, rng, listed = self.scene(row), self.random(row, "heat"), []
        rendered = render(scene)
        for entity in row["entities"]:
            listed.append(entity | {"heat": encode_grey(draw_heat(true_mask(scene, rendered, entity["text"]), rng))})
        return listed

    def _scores(self, row: Row) -> list[dict]:
        scene = self.scene(row)
        rendered = render(scene)
        return [
            entity | {"iou": iou(decode_grey(entity["mask"]), true_mask(scene, rendered, entity["text"]))}
            for entity in row["entities"]
        ]


def draw_heat(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A true mask (S, S) bool → heat (HEAT_SIDE, HEAT_SIDE) uint8."""
    heat, across = resize(mask, (HEAT_SIDE, HEAT_SIDE)).astype(float), np.arange(HEAT_SIDE)
    for x, y in rng.uniform(0, HEAT_SIDE, (SPECKS, 2)):
        heat = np.maximum(heat, np.hypot(across - x, across[:, None] - y) < 0.02 * HEAT_SIDE)
    heat = ndimage.gaussian_filter(heat, BLUR * HEAT_SIDE) + NOISE * rng.standard_normal(heat.shape)
    return np.round(np.clip(heat, 0, 1) * 255).astype(np.uint8)


def kinds(scene: Scene) -> list[str]:
    """Of the scene's subjects."""
    return [placed.subject.kind for placed in scene.placed]


def true_mask(scene: Scene, rendered: Rendered, kind: str) -> np.ndarray:
    """The mask (S, S) of the subject of this kind; empty where there is none."""
    masks = rendered.masks
    return masks[kinds(scene).index(kind)] if kind in kinds(scene) else np.zeros(masks.shape[1:], bool)


def iou(found: np.ndarray, true: np.ndarray) -> float:
    """Intersection over union of two masks; the true one is scaled to the found one's side."""
    true = resize(true, found.shape)
    union = (found | true).sum()
    return round(float((found & true).sum() / union), 4) if union else 0.0


def resize(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A bool mask at another resolution, by nearest neighbour."""
    return np.asarray(Image.fromarray(mask).resize((shape[1], shape[0]), Image.Resampling.NEAREST))
