"""Leakage on constructed images: a copy of the input scores 1, an independent drawing scores chance."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.benchmarks import METRICS
from evaluation.protocols.benchmark import Item, read_image
from evaluation.scores.judge import Judge
from evaluation.scores.leakage import SIDE, thumbnails
from evaluation.scores.metric import Context

KINDS, EACH, DRAWN = ("cat", "dog", "boat", "car"), 5, 12


def scene(rng: np.random.Generator, look: np.ndarray, wall: np.ndarray | None = None) -> Image.Image:
    """Draw a subject with the colours `look`, facing either way, before a wall of random or given colour."""
    pixels = np.empty((SIDE, SIDE, 3))
    pixels[:] = rng.uniform(0, 1, 3) if wall is None else wall
    top, left = rng.integers(6, 12, 2)
    body = np.repeat(look[None, :, None], 12, axis=0).repeat(5, axis=1).reshape(12, -1)[:, :15]
    body = np.stack([body] * 3, axis=-1)
    pixels[top : top + 12, left : left + 15] = body if rng.random() < 0.5 else body[:, ::-1]
    return Image.fromarray((pixels * 255).astype(np.uint8))


class World:
    """Subjects with an input image and other individuals, and a judge whose features are kind and look."""

    def __init__(self, folder: Path):
        self.folder, self.rng = folder, np.random.default_rng(0)
        self.features: dict[str, torch.Tensor] = {}
        self.inputs: dict[str, Path] = {}
        self.others: dict[str, tuple[Path, ...]] = {}
        self.looks: dict[str, np.ndarray] = {}
        for name in [f"{kind}{number}" for kind in KINDS for number in range(EACH)]:
            self.inputs[name] = self.individual(name)
            self.others[name] = tuple(self.individual(f"{name}-{other}") for other in range(3))

    def individual(self, name: str) -> Path:
        """Draw an individual with a new look."""
        self.looks[name] = self.rng.uniform(0, 1, 3)
        return self.save(f"{name}.png", name)

    def save(self, file: str, subject: str, image: Image.Image | None = None) -> Path:
        path = self.folder / file
        (image or scene(self.rng, self.looks[subject])).save(path)
        kind = next(number for number, kind in enumerate(KINDS) if subject.startswith(kind))
        self.features[str(path)] = torch.cat([4 * torch.eye(len(KINDS))[kind], torch.from_numpy(self.looks[subject])])
        return path

    def scores(self, generated: dict[str, list[Path]]) -> dict[str, tuple[float, float, float]]:
        judge = Judge(lambda files: torch.stack([self.features[str(file)] for file in files]).float(), ())
        context = Context({"judge": judge, "pixels": lambda files: thumbnails([read_image(file) for file in files])})
        items = [
            Item(file, name, "", given=self.inputs[name], others=self.others[name], labels={"kind": name[:-1]})
            for name, files in generated.items()
            for file in files
        ]
        metrics = [kind(context) for kind in METRICS["leakage"]]
        estimates = {metric.name: metric.aggregate(metric.score(items)) for metric in metrics}
        return {name: (estimate.value, estimate.low, estimate.high) for name, estimate in estimates.items()}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_copy_of_the_input_scores_1(world: World) -> None:
    scores = world.scores({name: [file] for name, file in world.inputs.items()})
    assert set(scores) == {"kept", "shown_kind", "shown_look", "leaked", "shown_background", "shown_pose"}
    assert set(scores.values()) == {(1.0, 1.0, 1.0)}


def test_a_redrawn_subject_is_kept_without_leakage(world: World) -> None:
    """Another background, position and pose: a model without leakage."""
    scores = world.scores({n: [world.save(f"{n}+{i}.png", n) for i in range(DRAWN)] for n in world.inputs})
    assert scores["kept"][0] == scores["shown_look"][0] == scores["shown_kind"][0] == 1
    for name in ("leaked", "shown_background", "shown_pose"):
        value, low, high = scores[name]
        assert low <= 0 <= high and abs(value) < 0.2, (name, scores[name])


def test_another_individual_keeps_only_the_kind(world: World) -> None:
    scores = world.scores({n: [world.individual(f"{n}x{i}") for i in range(DRAWN)] for n in world.inputs})
    assert scores["shown_kind"][0] > 0.95 and abs(scores["shown_look"][0]) < 0.2
    assert scores["kept"][0] == pytest.approx((scores["shown_kind"][0] + scores["shown_look"][0]) / 2)


def test_background_and_pose_are_measured_separately(world: World) -> None:
    """The input's wall behind a redrawn subject, and the input's subject before another wall."""
    walls, poses = {}, {}
    for name, file in world.inputs.items():
        given = np.asarray(read_image(file)) / 255
        wall = given[0, 0]
        walls[name] = [world.save(f"{name}w{i}.png", name, scene(world.rng, world.looks[name], wall)) for i in range(4)]
        subject, poses[name] = (given != wall).any(-1, keepdims=True), []
        for i in range(4):
            pixels = (np.where(subject, given, world.rng.uniform(0, 1, 3)) * 255).astype(np.uint8)
            poses[name].append(world.save(f"{name}p{i}.png", name, Image.fromarray(pixels)))
    scores = world.scores(walls)
    assert scores["shown_background"][0] > 0.99 and abs(scores["shown_pose"][0]) < 0.4
    scores = world.scores(poses)
    assert scores["shown_pose"][0] > 0.9 and abs(scores["shown_background"][0]) < 0.3
