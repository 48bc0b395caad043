"""Toyland's ground truth in the place of the three models, and what the recovered masks are worth.

The input are the pictures of Toyland's caption shards; their captions are not read. A picture's scene is drawn again
from its number, which is its key. Masks are told as a segmenter would: blurred, noisy, with hot specks elsewhere.
"""

import numpy as np
from PIL import Image
from scipy import ndimage

from datamodules.curation.rows import Batch, Row, decode_grey, encode_grey, row_image
from datamodules.curation.stage_config import Toyland
from datamodules.errors import SampleError
from datamodules.toyland.language import caption
from datamodules.toyland.samples import sample_generator
from datamodules.toyland.scene import Scene, render, sample_scene

PART = "captions"
LARGEST_DIFFERENCE = 12.0
"""Mean over pixels, of 255: what storing a picture as JPEG may change. Another scene is several times as far."""


class World:
    """The scenes of the pictures."""

    def __init__(self, config: Toyland, seed: int):
        self.config, self.seed = config, seed

    def scene(self, row: Row) -> tuple[Scene, np.ndarray]:
        """The scene that a row's picture shows, and the masks of its subjects, (subjects, S, S) bool.

        Raises:
            SampleError: `not_toyland` - it shows another scene, or none.
        """
        if not row["key"].isdigit():
            raise SampleError("not_toyland", row["shard"], row["key"], "keys of Toyland's captions are numbers")
        scene = sample_scene(sample_generator(self.config.seed, PART, self.config.split, int(row["key"])))
        found, rendered = row_image(row), render(scene)
        drawn = rendered.image.resize(found.size, Image.Resampling.BICUBIC)
        difference = float(np.abs(np.asarray(found, float) - np.asarray(drawn, float)).mean())
        if difference > LARGEST_DIFFERENCE:
            detail = (
                f"{difference:.0f} of 255 from scene {int(row['key'])} of '{self.config.split}'; is toyland.* right?"
            )
            raise SampleError("not_toyland", row["shard"], row["key"], detail)
        return scene, rendered.masks

    def random(self, row: Row, purpose: str) -> np.random.Generator:
        """A row's own random numbers, whoever works on it."""
        return sample_generator(self.seed, f"curation/{purpose}", self.config.split, int(row["key"]))


class ToylandCaptions(World):
    """`caption` without looks, as the constructed set has them."""

    def __call__(self, batch: Batch) -> Batch:
        """Tell what each picture shows."""
        return [row | {"caption": self._caption(row)} for row in batch]

    def _caption(self, row: Row) -> str:
        rng = self.random(row, "caption")
        return caption(self.scene(row)[0], rng, told=False, with_article=bool(rng.random() < 0.5))


class ToylandAnswers(World):
    """`answer`: the subjects' kinds, as a language model lists them."""

    def __call__(self, batch: Batch) -> Batch:
        """Name the things of each caption."""
        return [
            row | {"answer": ", ".join(placed.subject.kind for placed in self.scene(row)[0].placed)} for row in batch
        ]


class ToylandHeat(World):
    """`heat` of each entity, from its true mask."""

    def __call__(self, batch: Batch) -> Batch:
        """Draw the heat maps."""
        return [row | {"entities": self._entities(row)} for row in batch]

    def _entities(self, row: Row) -> list[dict]:
        (scene, drawn), rng = self.scene(row), self.random(row, "heat")
        masks = [true_mask(scene, drawn, entity["text"]) for entity in row["entities"]]
        return [
            entity | {"heat": encode_grey(self.heat(mask, rng))}
            for entity, mask in zip(row["entities"], masks, strict=True)
        ]

    def heat(self, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A true mask (S, S) bool → heat (H, H) uint8."""
        side, config = self.config.heat_side, self.config
        large = Image.fromarray(mask * np.uint8(255)).resize((side, side), Image.Resampling.NEAREST)
        heat = np.asarray(large, float) / 255
        across = np.arange(side)
        for x, y in rng.uniform(0, side, (config.specks, 2)):
            heat = np.maximum(heat, np.hypot(across - x, across[:, None] - y) < 0.02 * side)
        heat = ndimage.gaussian_filter(heat, config.blur * side) + config.noise * rng.standard_normal((side, side))
        return np.round(np.clip(heat, 0, 1) * 255).astype(np.uint8)


class ScoreMasks(World):
    """`iou` of each entity: its recovered mask against the true one, intersection over union (0 … 1)."""

    def __call__(self, batch: Batch) -> Batch:
        """Score the masks."""
        return [row | {"entities": self._entities(row)} for row in batch]

    def _entities(self, row: Row) -> list[dict]:
        scene, drawn = self.scene(row)
        return [
            entity | {"iou": iou(decode_grey(entity["mask"]), true_mask(scene, drawn, entity["text"]))}
            for entity in row["entities"]
        ]


def true_mask(scene: Scene, drawn: np.ndarray, kind: str) -> np.ndarray:
    """The mask of the subject of this kind; empty where there is none."""
    kinds = [placed.subject.kind for placed in scene.placed]
    return drawn[kinds.index(kind)] if kind in kinds else np.zeros(drawn.shape[1:], bool)


def iou(found: np.ndarray, true: np.ndarray) -> float:
    """Intersection over union of two masks; the true one is scaled to the found one's side."""
    if found.shape != true.shape:
        true = np.asarray(Image.fromarray(true).resize(found.shape[::-1], Image.Resampling.NEAREST))
    union = (found | true).sum()
    return round(float((found & true).sum() / union), 4) if union else 0.0
