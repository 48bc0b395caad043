"""GenEval: whether a detector finds the objects of the prompt, in the right number, colour and position.

The rules are those of GenEval's own script. The detector is a transformers model that predicts boxes without masks, so
colours are read from whole boxes.
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
from evaluation.scores.bootstrap import QUANTILES, resampled_means
from evaluation.scores.metric import Estimate, Metric, Row

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COLOUR_TEXTS = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")


@dataclass(frozen=True)
class Detection:
    """A detected object: class name, confidence, and box in pixels (left, top, right, bottom)."""

    name: str
    confidence: float
    box: tuple[float, float, float, float]


class ObjectDetector:
    """An object detector of transformers.

    Raises:
        EvaluationError: the folder holds no object detector.
    """

    def __init__(self, settings: Detector, folder: Path, device: torch.device):
        try:
            options = {"trust_remote_code": False}
            self.model = AutoModelForObjectDetection.from_pretrained(folder, **options).eval().to(device)
            self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **options)
        except (ValueError, OSError) as error:
            raise EvaluationError(f"'{folder}' is not an object detector: {error}") from error
        self.device = device
        self.threshold = min(settings.threshold, settings.counting_threshold)
        self.names = list(self.model.config.id2label.values())

    @torch.inference_mode()
    def images(self, images: list[Image.Image]) -> list[list[Detection]]:
        """N images → the detections of each, by decreasing confidence."""
        detections = []
        for image in images:
            outputs = self.model(**self.processor(images=[image], return_tensors="pt").to(self.device))
            (seen,) = self.processor.post_process_object_detection(
                outputs, threshold=self.threshold, target_sizes=[image.size[::-1]]
            )
            rows = zip(seen["labels"].tolist(), seen["scores"].tolist(), seen["boxes"].tolist(), strict=True)
            objects = [Detection(self.model.config.id2label[label], score, tuple(box)) for label, score, box in rows]
            detections.append(sorted(objects, key=lambda detection: -detection.confidence))
        return detections


def relations(a: Detection, b: Detection, threshold: float) -> set[str]:
    """Return the position of `a` relative to `b`, after subtracting `threshold` times the sizes of both."""
    boxes = np.array([a.box, b.box]).reshape(2, 2, 2)
    offset = boxes[0].mean(0) - boxes[1].mean(0)
    sizes = np.abs(np.diff(boxes, axis=1))[:, 0].sum(0)
    apart = np.maximum(np.abs(offset) - threshold * sizes, 0) * np.sign(offset)
    if np.all(np.abs(apart) < 1e-3):
        return set()
    x, y = apart / np.linalg.norm(offset)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, true in holds.items() if true}


class Correct(Metric):
    """Share of images with everything that the prompt asks for and nothing that it excludes."""

    name, title, decimals, needs = "correct", "Correct", 3, ("detector", "clip_texts", "clip_images")

    def score(self, items: Sequence[Item]) -> list[Row]:
        """Return whether each image is correct, and what is wrong."""
        asked = [item for item in items if item.asked]
        detections = self.context.networks["detector"]([item.file for item in asked])
        rows = []
        for item, objects in zip(asked, detections, strict=True):
            wrong = self.wrong(item.file, objects, item.asked)
            rows.append(Row(item, wrong, not wrong))
        return rows

    def wrong(self, file: Path, detections: Sequence[Detection], asked: Mapping[str, Any]) -> str:
        """Return what differs from the prompt's metadata; empty if nothing does."""
        settings: Detector = self.context.protocol.detector
        threshold = settings.counting_threshold if asked["tag"] == "counting" else settings.threshold
        objects: dict[str, list[Detection]] = defaultdict(list)
        names = {label: name for name, label in settings.aliases.items()}
        for detection in detections:
            name = names.get(detection.name, detection.name)
            if detection.confidence > threshold and len(objects[name]) < settings.max_objects:
                objects[name].append(detection)
        problems, groups = [], []
        for clause in asked.get("include", []):
            name, count = clause["class"], clause["count"]
            chosen, before = objects[name][:count], len(problems)
            if len(chosen) < count:
                problems.append(f"expected {name}>={count}, found {len(chosen)}")
            else:
                if (colour := clause.get("color")) is not None:
                    colours = [self.colour(Crop(file, detection.box), name) for detection in chosen]
                    if colours.count(colour) < count:
                        problems.append(f"expected {colour} {name}>={count}, found {', '.join(colours)}")
                if (position := clause.get("position")) is not None and len(problems) == before:
                    relation, target = position
                    if groups[target] is None:
                        problems.append(f"no target for {name} to be {relation}")
                    elif any(
                        relation not in relations(one, other, settings.position_threshold)
                        for one in chosen
                        for other in groups[target]
                    ):
                        problems.append(f"expected {name} {relation} target")
            groups.append(chosen if len(problems) == before else None)
        for clause in asked.get("exclude", []):
            if len(objects[clause["class"]]) >= clause["count"]:
                problems.append(f"expected {clause['class']}<{clause['count']}")
        return "; ".join(problems)

    def colour(self, crop: Crop, name: str) -> str:
        """Classify the colour of an object by zero-shot CLIP."""
        networks = self.context.networks
        texts = [text.format(colour, name) for colour in COLOURS for text in COLOUR_TEXTS]
        words = normalize(networks["clip_texts"](texts).double(), dim=-1).view(len(COLOURS), len(COLOUR_TEXTS), -1)
        similarity = normalize(words.mean(1), dim=-1) @ networks["clip_images"]([crop]).double()[0]
        return COLOURS[int(similarity.argmax())]

    def aggregate(self, rows: Sequence[Row]) -> Estimate:
        """Return the mean over the tasks' means, with its bootstrap interval over the prompts of each task."""
        groups: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            groups[row.item.group].append(row)
        bootstrap, means, replicates = self.context.bootstrap, [], []
        for number, own in enumerate(groups.values()):
            names, unit_of = np.unique([row.item.unit for row in own], return_inverse=True)
            values = [float(row.value) for row in own]
            means.append(np.mean(values))
            seed = bootstrap.seed + number
            replicates.append(resampled_means(values, unit_of, len(names), bootstrap.replicates, seed))
        low, high = np.quantile(np.mean(replicates, axis=0), QUANTILES)
        return Estimate(float(np.mean(means)), float(low), float(high), len(rows))
