"""What of the input image shows in the output, told by whether the output tells the input from others.

Every part is 2p − 1, where p is the rate at which the output is nearer to its own input image than to another that
differs in this part: 1 for a copy of the input, 0 for an image drawn without it.

What should show: the kind (against the inputs of other kinds) and the look (against other individuals of the kind), by
the judge's feature. What should not: the background with its light (against the inputs of other subjects, by the
colours of the corners) and the pose (against the input's own mirror image, by pixels). Chance gives the last 0 because
Toyland is as likely as its mirror image.

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
"""Pixels of the compared images' side, and of their corners'."""


def thumbnails(images: list[Image.Image]) -> Tensor:
    """N images → N×(SIDE·SIDE·3) in [0, 1]: the network called `pixels`."""
    small = [image.resize((SIDE, SIDE), Image.Resampling.BOX) for image in images]
    return torch.from_numpy(np.stack([np.asarray(image) for image in small])).flatten(1) / 255


def told_apart(own: Tensor, others: Tensor) -> float:
    """2p − 1 of one image: its distance from its own input, and from each of N others; ties count half."""
    return float((own < others).double().mean() - (own > others).double().mean())


class Shown(Metric):
    """One part, or the mean of several."""

    decimals, optional, needs, floor = 2, True, ("judge",), None
    parts: tuple[type["Shown"], ...] = ()

    def score(self, items: Sequence[Item]) -> list[Row]:
        """Of the images of one subject whose input image is known, and others that differ from it."""
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
        """2p − 1 of each image; None where there is nothing to compare it with."""
        raise NotImplementedError

    def inputs(self, items: Sequence[Item]) -> dict[Any, str]:
        """The input images, with the kind of each subject."""
        return {item.given: item.labels.get("kind", "") for item in items if item.given is not None}


class ShownKind(Shown):
    """Against the inputs of other kinds."""

    name, title, headline = "shown_kind", "Kind", False

    def values(self, items: Sequence[Item]) -> list[tuple[Item, float | None]]:
        """By the judge's feature."""
        inputs = self.inputs(items)
        features = self.context.networks["judge"].features([*inputs, *(item.file for item in items)])
        found = []
        for item in items:
            others = [features[file] for file, kind in inputs.items() if kind != inputs[item.given]]
            cosine = torch.stack(others) @ features[item.file] if others else None
            own = -(features[item.given] @ features[item.file])
            found.append((item, None if cosine is None else told_apart(own, -cosine)))
        return found


class ShownLook(Shown):
    """Against other individuals of the kind."""

    name, title, headline = "shown_look", "Look", False

    def values(self, items: Sequence[Item]) -> list[tuple[Item, float | None]]:
        """By the judge's feature."""
        shown = [[item.file, item.given, *item.others] for item in items]
        features = self.context.networks["judge"].features(file for files in shown for file in files)
        found: list[tuple[Item, float | None]] = []
        for item, files in zip(items, shown, strict=True):
            feature, own, *others = (features[file] for file in files)
            found.append((item, told_apart(-(own @ feature), -(torch.stack(others) @ feature))))
        return found


class ShownBackground(Shown):
    """Against the inputs of all other subjects."""

    name, title, better, headline = "shown_background", "Background", "↓", False

    def values(self, items: Sequence[Item]) -> list[tuple[Item, float | None]]:
        """By the mean colours of the four corners."""
        inputs = list(self.inputs(items))
        if len(inputs) < 2:
            return [(item, None) for item in items]
        of_inputs = self.corners(inputs)
        distances = torch.cdist(self.corners([item.file for item in items]), of_inputs)
        found: list[tuple[Item, float | None]] = []
        for item, row in zip(items, distances, strict=True):
            own = inputs.index(item.given)
            found.append((item, told_apart(row[own], torch.cat([row[:own], row[own + 1 :]]))))
        return found

    def corners(self, files: Sequence[Path]) -> Tensor:
        """N files → N×12."""
        pixels = self.context.networks["pixels"](files).double().view(-1, SIDE, SIDE, 3)
        ends = (slice(None, CORNER), slice(-CORNER, None))
        return torch.cat([pixels[:, rows, columns].mean((1, 2)) for rows in ends for columns in ends], dim=1)


class ShownPose(Shown):
    """Against the mirror image of the input."""

    name, title, better, headline = "shown_pose", "Pose", "↓", False

    def values(self, items: Sequence[Item]) -> list[tuple[Item, float | None]]:
        """By pixels."""
        pixels = self.context.networks["pixels"]
        made, given = (pixels(files).double() for files in ([i.file for i in items], [i.given for i in items]))
        mirrored = given.view(-1, SIDE, SIDE, 3).flip(2).flatten(1)
        own, other = ((made - shown).square().sum(1) for shown in (given, mirrored))
        return [(item, told_apart(a, b[None])) for item, a, b in zip(items, own, other, strict=True)]


class Kept(Shown):
    """What should show."""

    name, title, parts = "kept", "Kept", (ShownKind, ShownLook)


class Leaked(Shown):
    """What should not."""

    name, title, better, parts = "leaked", "Leaked", "↓", (ShownBackground, ShownPose)
