"""Stages that use Toyland's ground truth instead of the three models, and a score of the recovered masks.

The input is the images of Toyland's caption shards, without their captions. The scene of an image is drawn again from
its number, which is the key.
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
"""Mean difference over pixels (of 255) that JPEG may cause. The difference of another scene is several times larger."""
HEAT_SIDE, BLUR, NOISE, SPECKS = 64, 0.02, 0.05, 2
"""Imperfections of a real segmenter: side in pixels, blur in image sides, noise, number of wrong hot spots."""


class GroundTruth:
    """Stages (datamodules/curation/rows.py) as methods: `caption`, `entities`, `masks` and `score`."""

    def __init__(self, config: Toyland, seed: int):
        self.config, self.seed = config, seed

    def caption(self, batch: Batch) -> Batch:
        """Add `caption`, without the entities' looks, as in the constructed set. Raises SampleError `not_toyland`."""
        return [row | {"caption": self._caption(row)} for row in batch]

    def entities(self, batch: Batch) -> Batch:
        """Add `answer`: the kinds of the subjects, as a language model would list them."""
        return [row | {"answer": ", ".join(kinds(self.scene(row)))} for row in batch]

    def masks(self, batch: Batch) -> Batch:
        """Add `heat` to each entity, made from its true mask."""
        return [row | {"entities": self._heat(row)} for row in batch]

    def score(self, batch: Batch) -> Batch:
        """Add `iou` to each entity: intersection over union of its recovered and its true mask (0 … 1)."""
        return [row | {"entities": self._scores(row)} for row in batch]

    def scene(self, row: Row) -> Scene:
        """Return the scene of a row."""
        if not row["key"].isdigit():
            raise SampleError("not_toyland", row["shard"], row["key"], "keys of Toyland's captions are numbers")
        return sample_scene(sample_generator(self.config.seed, "captions", self.config.split, int(row["key"])))

    def random(self, row: Row, purpose: str) -> np.random.Generator:
        """Return a row's random number generator, which does not depend on the worker."""
        return sample_generator(self.seed, f"curation/{purpose}", self.config.split, int(row["key"]))

    def _caption(self, row: Row) -> str:
        scene, image, rng = self.scene(row), row_image(row), self.random(row, "caption")
        expected = render(scene).image.resize(image.size, Image.Resampling.BICUBIC)
        difference = float(np.abs(np.asarray(image, float) - np.asarray(expected, float)).mean())
        if difference > LARGEST_DIFFERENCE:
            scene_name = f"scene {row['key']} of '{self.config.split}'"
            detail = f"it differs from {scene_name} by {difference:.0f} of 255; check toyland.*"
            raise SampleError("not_toyland", row["shard"], row["key"], detail)
        return language.caption(scene, rng, with_looks=False, with_article=bool(rng.random() < 0.5))

    def _heat(self, row: Row) -> list[dict]:
        scene, rng = self.scene(row), self.random(row, "heat")
        rendered = render(scene)
        return [
            entity | {"heat": encode_grey(draw_heat(true_mask(scene, rendered, entity["text"]), rng))}
            for entity in row["entities"]
        ]

    def _scores(self, row: Row) -> list[dict]:
        scene = self.scene(row)
        rendered = render(scene)
        return [
            entity | {"iou": iou(decode_grey(entity["mask"]), true_mask(scene, rendered, entity["text"]))}
            for entity in row["entities"]
        ]


def draw_heat(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Make a heat map (HEAT_SIDE, HEAT_SIDE) uint8 from a true mask (S, S) bool."""
    heat, pixels = resize(mask, (HEAT_SIDE, HEAT_SIDE)).astype(float), np.arange(HEAT_SIDE)
    for x, y in rng.uniform(0, HEAT_SIDE, (SPECKS, 2)):
        heat = np.maximum(heat, np.hypot(pixels - x, pixels[:, None] - y) < 0.02 * HEAT_SIDE)
    heat = ndimage.gaussian_filter(heat, BLUR * HEAT_SIDE) + NOISE * rng.standard_normal(heat.shape)
    return np.round(np.clip(heat, 0, 1) * 255).astype(np.uint8)


def kinds(scene: Scene) -> list[str]:
    """Return the kinds of the scene's subjects."""
    return [placed.subject.kind for placed in scene.placed]


def true_mask(scene: Scene, rendered: Rendered, kind: str) -> np.ndarray:
    """Return the mask (S, S) of the subject of this kind; empty if there is none."""
    masks = rendered.masks
    return masks[kinds(scene).index(kind)] if kind in kinds(scene) else np.zeros(masks.shape[1:], bool)


def iou(mask: np.ndarray, true: np.ndarray) -> float:
    """Intersection over union of a mask and the true mask, which is resized to the same shape."""
    true = resize(true, mask.shape)
    union = (mask | true).sum()
    return round(float((mask & true).sum() / union), 4) if union else 0.0


def resize(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Resize a bool mask by nearest neighbour."""
    return np.asarray(Image.fromarray(mask).resize((shape[1], shape[0]), Image.Resampling.NEAREST))
