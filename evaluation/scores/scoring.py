"""Images of a system → scores with intervals, and the score of every sample.

Shapes: `N` pairs, `F` features.
"""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaluation.config import Bootstrap, EvaluationConfig
from evaluation.parallel.sharing import Encode, Sharing
from evaluation.protocols.protocol import KID
from evaluation.protocols.requests import ScoredImage, read_image
from evaluation.protocols.resizing import resize
from evaluation.scores.bootstrap import fid_interval, kid_interval, mean_interval
from evaluation.scores.encoders import CLIPEncoder, DinoEncoder, JudgeEncoder, Remembered, feature_network
from evaluation.scores.judge import Judge, read_half
from evaluation.scores.metrics import CosineMean, FeatureFID, FeatureKID
from evaluation.scores.results import COLUMNS, PAIRS, Score
from kosmosg.files import write_text

Features = Callable[[Sequence], Tensor]
NEAR_COPY = 0.95
"""DINO cosine with the input image from which on an image counts as a near copy of it. One for all protocols and not to
be configured, so that the rate means one thing; how many photos of a subject reach it tells the row of real images."""


@dataclass(frozen=True)
class Sample:
    """The score of one pair: an image against a reference image, its input image, a text or labels."""

    table: str
    system: str
    metric: str
    unit: str
    file: str
    against: str
    score: float
    template: str = ""


@dataclass(frozen=True)
class Encoders:
    """Features by what is encoded; each file and text is encoded once in an evaluation."""

    clip_images: Features
    clip_texts: Features
    dino: Features | None = None
    fid_real: Features | None = None
    fid_generated: Features | None = None
    judge: Judge | None = None


def load_encoders(table: str, config: EvaluationConfig, sharing: Sharing) -> Encoders:
    """The encoders that the protocol of `table` names.

    Raises:
        FileNotFoundError, ValueError: weights that are missing or of another network.
    """
    protocol, device = getattr(config, table), config.torch_device(sharing.processes.local_rank)
    read = partial(read_image, upright=protocol.upright)

    def remembered(name: str, encode: Callable[[list], Tensor], read: Callable[[Any], Any]) -> Remembered:
        return Remembered(f"{table}.{name}", encode, sharing, read)

    clip = CLIPEncoder(protocol.clip, config.encoder_path(protocol.clip), device)
    encoders: dict[str, Any] = {
        "clip_images": remembered("clip_images", clip.images, read),
        "clip_texts": remembered("clip_texts", clip.texts, str),
    }
    if table == "dreambench":
        dino = DinoEncoder(protocol.dino, config.encoder_path(protocol.dino), device)
        encoders["dino"] = remembered("dino", dino.images, read)
        if protocol.judge is not None:
            judge = JudgeEncoder(protocol.judge, config.encoder_path(protocol.judge), device)
            read_part = partial(read_half, upright=protocol.upright)
            encoders["judge"] = Judge(remembered("judge", judge.images, read_part), judge.labels)
    else:
        fid = feature_network(protocol.fid, config.encoder_path(protocol.fid), device)
        encoders["fid_real"] = remembered("fid_real", fid.images, lambda file: resize(read(file), protocol.real_resize))
        encoders["fid_generated"] = remembered(
            "fid_generated", fid.images, lambda file: resize(read(file), protocol.generated_resize)
        )
    return Encoders(**encoders)


def shared_encoders(encoders: Mapping[str, Encoders]) -> dict[str, Encode]:
    """Those of every table by name, for processes that serve."""
    found = [getattr(of_table, field.name) for of_table in encoders.values() for field in fields(of_table)]
    found += [of_table.judge.encode for of_table in encoders.values() if of_table.judge is not None]
    return {encoder.name: encoder.batch for encoder in found if isinstance(encoder, Remembered)}


@dataclass(frozen=True)
class Scorer:
    """Scores of one table.

    Args:
        real: features N×F of FID's real side; None where the table has none.
        kid: how KID is drawn; None leaves it out.
    """

    table: str
    protocol: str
    encoders: Encoders
    bootstrap: Bootstrap
    real: Tensor | None = None
    kid: KID | None = None

    def __call__(self, system: str, images: Sequence[ScoredImage]) -> tuple[list[Score], list[Sample]]:
        """Every metric that the images allow: fidelity where they have references, CLIP-T where they have a
        text, what the judge says where they have labels."""
        scores: list[Score] = []
        samples: list[Sample] = []
        pairs = [(image, reference) for image in images for reference in image.references]
        told = [(image, image.text) for image in images if image.text]
        shown = [(image, image.given) for image in images if image.given is not None]
        encoders = self.encoders
        plan = [
            ("dino", pairs, encoders.dino, encoders.dino),
            ("clip_i", pairs, encoders.clip_images, encoders.clip_images),
            ("clip_t", told, encoders.clip_images, encoders.clip_texts),
            ("near_copies", shown, encoders.dino, encoders.dino),
        ]
        results: list[tuple[str, float, Sequence[tuple[ScoredImage, Any]], Tensor]] = []
        for metric, compared, left, right in plan:
            if not compared or left is None or right is None:
                continue
            cosines = CosineMean()
            cosines.update(
                left([image.file for image, _ in compared]),
                right([other for _, other in compared]),
                torch.arange(len(compared)),
            )
            found, value = cosines.samples(), float(cosines.compute())
            if metric == "near_copies":
                found = (found >= NEAR_COPY).double()
                value = float(found.mean())
            results.append((metric, value, compared, found))
        if encoders.judge is not None:
            judged = encoders.judge.verdicts(images) | encoders.judge.pair_verdicts(images)
            for metric, verdicts in judged.items():
                right = torch.tensor([right for _, _, right in verdicts], dtype=torch.float64)
                compared = [(image, against) for image, against, _ in verdicts]
                results.append((metric, float(right.mean()), compared, right))
        for metric, value, compared, found in results:
            units = [image.unit for image, _ in compared]
            low, high = mean_interval(found, units, self.bootstrap.replicates, self.bootstrap.seed)
            interval = (max(0.0, low), max(0.0, high))  # clamped as the mean is
            table = PAIRS if metric in COLUMNS[PAIRS] else self.table
            scores.append(Score(table, system, metric, value, *interval, len(compared), self.protocol))
            samples += [
                Sample(table, system, metric, image.unit, str(image.file), str(other), score, image.template)
                for (image, other), score in zip(compared, found.tolist(), strict=True)
            ]
        if self.real is not None:
            made = self._fid_features(images)
            scores.append(self._fid(system, self.real, made))
            if self.kid is not None:
                scores.append(self._kid(system, self.kid, self.real, made))
        return scores, samples

    def _fid_features(self, images: Sequence[ScoredImage]) -> Tensor:
        """Features of one row, N×F; real photos are resized as the real side is."""
        assert self.encoders.fid_real is not None and self.encoders.fid_generated is not None
        encode = self.encoders.fid_real if all(image.real for image in images) else self.encoders.fid_generated
        return encode([image.file for image in images])

    def _kid(self, system: str, kid: KID, real: Tensor, made: Tensor) -> Score:
        metric = FeatureKID(kid)
        for features, side in ((real, True), (made, False)):
            metric.update(features, torch.arange(len(features)), real=side)
        value, deviation = map(float, metric.compute())
        return self._score(system, "kid", value, kid_interval(value, deviation), len(made))

    def _fid(self, system: str, real: Tensor, made: Tensor) -> Score:
        distance = FeatureFID(real.shape[1])
        distance.update(real, real=True)
        distance.update(made, real=False)
        value = float(distance.compute())
        interval = fid_interval(real, made, value, self.bootstrap.fid_replicates, self.bootstrap.seed)
        return self._score(system, "fid", value, interval, len(made))

    def _score(self, system: str, metric: str, value: float, interval: tuple[float, float], n: int) -> Score:
        return Score(self.table, system, metric, value, *interval, n, self.protocol)


def write_samples(samples: Sequence[Sample], file: Path, folder: Path) -> None:
    """CSV of every pair's score; paths under `folder` are written relative to it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["table", "system", "metric", "unit", "template", "file", "against", "score"])
    for sample in samples:
        paths = [_relative(path, folder) for path in (sample.file, sample.against)]
        told = [sample.table, sample.system, sample.metric, sample.unit, sample.template]
        writer.writerow([*told, *paths, f"{sample.score:.6f}"])
    write_text(file, text.getvalue())


def _relative(path: str, folder: Path) -> str:
    return str(Path(path).relative_to(folder)) if Path(path).is_relative_to(folder) else path
