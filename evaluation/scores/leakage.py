"""Leakage: which properties of the input image appear in the output.

Each score is 2p − 1, where p is the rate at which the output is closer to its own input image than to an image that
differs in this property: 1 for a copy of the input, 0 for an image generated without it.

Properties to keep are the kind (against inputs of other kinds) and the look (against other individuals of the kind),
both by the judge's feature. Properties that should not leak are the background (against inputs of other subjects, by
the colours of the corners) and the pose (against the mirrored input, by pixels; chance gives 0 because Toyland is
symmetric).

Shapes: `N` images, `F` features.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evaluation.protocols.benchmark import Item
from evaluation.scores.metric import Metric, Row

SIDE, CORNER = 32, 4
"""Sides of the thumbnails and of their corners, in pixels."""


def thumbnails(images: list[Image.Image]) -> Tensor:
    """N images → N×(SIDE·SIDE·3) in [0, 1]; the network named `pixels`."""
    small = [image.resize((SIDE, SIDE), Image.Resampling.BOX) for image in images]
    return torch.from_numpy(np.stack([np.asarray(image) for image in small])).flatten(1) / 255


def discrimination(own: Tensor, others: Tensor) -> float:
    """Return 2p − 1 of one image from its distances to its own input and to N others; ties count half."""
    return float((own < others).double().mean() - (own > others).double().mean())


class Shown(Metric):
    """Score of one property, or the mean of several."""

    decimals, optional, needs, floor = 2, True, ("judge",), None
    parts: tuple[type["Shown"], ...] = ()

    def score(self, items: Sequence[Item]) -> list[Row]:
        """Score the images with an input image and other individuals."""
        items = [item for item in items if item.given is not None and item.others]
        if not items:
            return []
        if not self.parts:
            return [Row(item, str(item.given), value) for item, value in self.values(items) if value is not None]
        by_part = [{id(row.item): row for row in part(self.context).score(items)} for part in self.parts]
        return [
            Row(item, str(item.given), sum(rows[id(item)].value for rows in by_part) / len(by_part))
            for item in items
            if all(id(item) in rows for rows in by_part)
        ]

    def values(self, items: Sequence[Item]) -> list[tuple[Item, float | None]]:
        """Return 2p − 1 of each image; None if there is nothing to compare it with."""
        raise NotImplementedError

    def inputs(self, items: Sequence[Item]) -> dict[Any, str]:
        """Return the input images with the kind of their subject."""
        return {item.given: item.labels.get("kind", "") for item in items if item.given is not None}


class ShownKind(Shown):
    """Kind, against the inputs of other kinds."""

    name, title, headline = "shown_kind", "Kind", False

    def values(self, items: Sequence[Item]) -> list[tuple[Item, float | None]]:
        """Compare by the judge's feature."""
        inputs = self.inputs(items)
        features = self.context.networks["judge"].features([*inputs, *(item.file for item in items)])
        values = []
        for item in items:
            others = [features[file] for file, kind in inputs.items() if kind != inputs[item.given]]
            cosine = torch.stack(others) @ features[item.file] if others else None
            own = -(features[item.given] @ features[item.file])
            values.append((item, None if cosine is None else discrimination(own, -cosine)))
        return values


class ShownLook(Shown):
    """Look, against other individuals of the kind."""

    name, title, headline = "shown_look", "Look", False

    def values(self, items: Sequence[Item]) -> list[tuple[Item, float | None]]:
        """Compare by the judge's feature."""
        shown = [[item.file, item.given, *item.others] for item in items]
        features = self.context.networks["judge"].features(file for files in shown for file in files)
        values: list[tuple[Item, float | None]] = []
        for item, files in zip(items, shown, strict=True):
            feature, own, *others = (features[file] for file in files)
            values.append((item, discrimination(-(own @ feature), -(torch.stack(others) @ feature))))
        return values


class ShownBackground(Shown):
    """Background, against the inputs of all other subjects."""

    name, title, better, headline = "shown_background", "Background", "↓", False

    def values(self, items: Sequence[Item]) -> list[tuple[Item, float | None]]:
        """Compare by the mean colours of the four corners."""
        inputs = list(self.inputs(items))
        if len(inputs) < 2:
            return [(item, None) for item in items]
        of_inputs = self.corners(inputs)
        distances = torch.cdist(self.corners([item.file for item in items]), of_inputs)
        values: list[tuple[Item, float | None]] = []
        for item, row in zip(items, distances, strict=True):
            own = inputs.index(item.given)
            values.append((item, discrimination(row[own], torch.cat([row[:own], row[own + 1 :]]))))
        return values

    def corners(self, files: Sequence[Path]) -> Tensor:
        """N files → N×12, the mean colour of each corner."""
        pixels = self.context.networks["pixels"](files).double().view(-1, SIDE, SIDE, 3)
        ends = (slice(None, CORNER), slice(-CORNER, None))
        return torch.cat([pixels[:, rows, columns].mean((1, 2)) for rows in ends for columns in ends], dim=1)


class ShownPose(Shown):
    """Pose, against the mirrored input."""

    name, title, better, headline = "shown_pose", "Pose", "↓", False

    def values(self, items: Sequence[Item]) -> list[tuple[Item, float | None]]:
        """Compare by pixels."""
        pixels = self.context.networks["pixels"]
        made, given = (pixels(files).double() for files in ([i.file for i in items], [i.given for i in items]))
        mirrored = given.view(-1, SIDE, SIDE, 3).flip(2).flatten(1)
        own, other = ((made - shown).square().sum(1) for shown in (given, mirrored))
        return [(item, discrimination(a, b[None])) for item, a, b in zip(items, own, other, strict=True)]


class Kept(Shown):
    """Mean of the properties that should be kept."""

    name, title, parts = "kept", "Kept", (ShownKind, ShownLook)


class Leaked(Shown):
    """Mean of the properties that should not leak."""

    name, title, better, parts = "leaked", "Leaked", "↓", (ShownBackground, ShownPose)
