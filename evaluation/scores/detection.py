"""GenEval: whether a detector finds what the prompt asks for, in number, colour and place.

The rules are those of GenEval's own script; the detector is one of transformers, which gives boxes without masks, so
that colours are read off whole boxes.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from evaluation.protocols.benchmark import Crop, EvaluationError, Item
from evaluation.protocols.protocol import Detector
from evaluation.scores.bootstrap import QUANTILES, draws
from evaluation.scores.metric import Measured, Metric, Row

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COLOUR_TEXTS = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")


@dataclass(frozen=True)
class Found:
    """An object that a detector sees: its class, its confidence, its box in pixels (left, top, right, bottom)."""

    name: str
    confidence: float
    box: tuple[float, float, float, float]


class ObjectDetector:
    """A detector of transformers.

    Raises:
        EvaluationError: a folder that holds none.
    """

    def __init__(self, stated: Detector, folder: Path, device: torch.device):
        try:
            options = {"trust_remote_code": False}
            self.model = AutoModelForObjectDetection.from_pretrained(folder, **options).eval().to(device)
            self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **options)
        except (ValueError, OSError) as error:
            raise EvaluationError(f"'{folder}' is no object detector: {error}") from error
        self.device = device
        self.least = min(stated.threshold, stated.counting_threshold)
        self.names = list(self.model.config.id2label.values())

    @torch.inference_mode()
    def images(self, images: list[Image.Image]) -> list[list[Found]]:
        """N images → what is seen in each, the most confident first."""
        found = []
        for image in images:
            outputs = self.model(**self.processor(images=[image], return_tensors="pt").to(self.device))
            (seen,) = self.processor.post_process_object_detection(
                outputs, threshold=self.least, target_sizes=[image.size[::-1]]
            )
            rows = zip(seen["labels"].tolist(), seen["scores"].tolist(), seen["boxes"].tolist(), strict=True)
            objects = [Found(self.model.config.id2label[label], score, tuple(box)) for label, score, box in rows]
            found.append(sorted(objects, key=lambda one: -one.confidence))
        return found


def relations(a: Found, b: Found, threshold: float) -> set[str]:
    """Where `a` is relative to `b`, once both sizes are allowed for."""
    boxes = np.array([a.box, b.box]).reshape(2, 2, 2)
    offset = boxes[0].mean(0) - boxes[1].mean(0)
    sizes = np.abs(np.diff(boxes, axis=1))[:, 0].sum(0)
    apart = np.maximum(np.abs(offset) - threshold * sizes, 0) * np.sign(offset)
    if np.all(np.abs(apart) < 1e-3):
        return set()
    across, down = apart / np.linalg.norm(offset)
    told = {"left of": across < -0.5, "right of": across > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {name for name, true in told.items() if true}


class Correct(Metric):
    """All that the prompt asks for is there, and nothing that it excludes."""

    name, title, decimals, needs = "correct", "Correct", 3, ("detector", "clip_texts", "clip_images")

    def score(self, items: Sequence[Item]) -> list[Row]:
        """Of every image, with what is wrong."""
        asked = [item for item in items if item.asked]
        seen = self.context.networks["detector"]([item.file for item in asked])
        rows = []
        for item, objects in zip(asked, seen, strict=True):
            wrong = self.wrong(item.file, objects, item.asked)
            rows.append(Row(item, wrong, not wrong))
        return rows

    def wrong(self, file: Path, objects: Sequence[Found], asked: Mapping[str, Any]) -> str:
        """What is not as asked for; empty where all is."""
        stated = self.stated()
        least = stated.counting_threshold if asked["tag"] == "counting" else stated.threshold
        there: dict[str, list[Found]] = defaultdict(list)
        called = {label: name for name, label in stated.aliases.items()}
        for found in objects:
            name = called.get(found.name, found.name)
            if found.confidence > least and len(there[name]) < stated.max_objects:
                there[name].append(found)
        problems, groups = [], []
        for clause in asked.get("include", []):
            name, count = clause["class"], clause["count"]
            chosen, before = there[name][:count], len(problems)
            if len(chosen) < count:
                problems.append(f"expected {name}>={count}, found {len(chosen)}")
            else:
                if (colour := clause.get("color")) is not None:
                    colours = [self.colour(Crop(file, found.box), name) for found in chosen]
                    if colours.count(colour) < count:
                        problems.append(f"expected {colour} {name}>={count}, found {', '.join(colours)}")
                if (place := clause.get("position")) is not None and len(problems) == before:
                    relation, target = place
                    if groups[target] is None:
                        problems.append(f"no target for {name} to be {relation}")
                    elif any(
                        relation not in relations(one, other, stated.position_threshold)
                        for one in chosen
                        for other in groups[target]
                    ):
                        problems.append(f"expected {name} {relation} target")
            groups.append(chosen if len(problems) == before else None)
        for clause in asked.get("exclude", []):
            if len(there[clause["class"]]) >= clause["count"]:
                problems.append(f"expected {clause['class']}<{clause['count']}")
        return "; ".join(problems)

    def colour(self, item: Crop, name: str) -> str:
        """The colour that CLIP finds nearest, zero-shot."""
        networks = self.context.networks
        texts = [text.format(colour, name) for colour in COLOURS for text in COLOUR_TEXTS]
        words = normalize(networks["clip_texts"](texts).double(), dim=-1).view(len(COLOURS), len(COLOUR_TEXTS), -1)
        nearest = normalize(words.mean(1), dim=-1) @ networks["clip_images"]([item]).double()[0]
        return COLOURS[int(nearest.argmax())]

    def stated(self) -> Detector:
        """Thresholds of the protocol."""
        assert self.context.benchmark is not None
        return self.context.benchmark.protocol.detector

    def aggregate(self, rows: Sequence[Row]) -> Measured:
        """The mean over kinds of task, each of them the mean over its images; intervals by drawing prompts of each."""
        groups: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            groups[row.item.group].append(row)
        bootstrap, means, replicates = self.context.bootstrap, [], []
        for number, own in enumerate(groups.values()):
            _, of_unit = np.unique([row.item.unit for row in own], return_inverse=True)
            counts, sums = np.bincount(of_unit), np.bincount(of_unit, weights=[float(row.value) for row in own])
            drawn = draws(len(counts), bootstrap.replicates, bootstrap.seed + number)
            replicates.append(np.concatenate([(some @ sums) / (some @ counts) for some in drawn]))
            means.append(sums.sum() / counts.sum())
        low, high = np.quantile(np.mean(replicates, axis=0), QUANTILES)
        return Measured(float(np.mean(means)), float(low), float(high), len(rows))
