"""The leakage meter on constructed images: a pasted copy scores 1, an independent drawing what chance gives."""

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
    """A subject of some colours, facing either way, before a wall of any colour."""
    pixels = np.empty((SIDE, SIDE, 3))
    pixels[:] = rng.uniform(0, 1, 3) if wall is None else wall
    top, left = rng.integers(6, 12, 2)
    body = np.repeat(look[None, :, None], 12, axis=0).repeat(5, axis=1).reshape(12, -1)[:, :15]
    body = np.stack([body] * 3, axis=-1)
    pixels[top : top + 12, left : left + 15] = body if rng.random() < 0.5 else body[:, ::-1]
    return Image.fromarray((pixels * 255).astype(np.uint8))


class World:
    """Subjects with an input image each, others of their kind, and what a judge that sees looks alone says of files."""

    def __init__(self, folder: Path):
        self.folder, self.rng = folder, np.random.default_rng(0)
        self.features: dict[str, torch.Tensor] = {}
        self.inputs: dict[str, Path] = {}
        self.others: dict[str, tuple[Path, ...]] = {}
        self.looks: dict[str, np.ndarray] = {}
        for kind in KINDS:
            for number in range(EACH):
                name = f"{kind}{number}"
                self.looks[name] = self.rng.uniform(0, 1, 3)
                self.inputs[name] = self.save(f"{name}.png", name)
                others = []
                for other in range(3):
                    self.looks[f"{name}-{other}"] = self.rng.uniform(0, 1, 3)
                    others.append(self.save(f"{name}-{other}.png", f"{name}-{other}"))
                self.others[name] = tuple(others)

    def save(self, file: str, subject: str, image: Image.Image | None = None) -> Path:
        path = self.folder / file
        (image or scene(self.rng, self.looks[subject])).save(path)
        kind = next(place for place, kind in enumerate(KINDS) if subject.startswith(kind))
        self.features[str(path)] = torch.cat([4 * torch.eye(len(KINDS))[kind], torch.from_numpy(self.looks[subject])])
        return path

    def scores(self, made: dict[str, list[Path]]) -> dict[str, tuple[float, float, float]]:
        judge = Judge(lambda files: torch.stack([self.features[str(file)] for file in files]).float(), ())
        context = Context({"judge": judge, "pixels": lambda files: thumbnails([read_image(file) for file in files])})
        items = [
            Item(file, name, "", given=self.inputs[name], others=self.others[name], labels={"kind": name[:-1]})
            for name, files in made.items()
            for file in files
        ]
        metrics = [kind(context) for kind in METRICS["leakage"]]
        found = {metric.name: metric.aggregate(metric.score(items)) for metric in metrics}
        return {name: (measured.value, measured.low, measured.high) for name, measured in found.items()}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_pasted_copy_scores_1(world: World) -> None:
    found = world.scores({name: [file] for name, file in world.inputs.items()})
    assert set(found) == {"kept", "shown_kind", "shown_look", "leaked", "shown_background", "shown_pose"}
    assert set(found.values()) == {(1.0, 1.0, 1.0)}


def test_the_same_subject_drawn_anew_keeps_all_and_leaks_nothing(world: World) -> None:
    """In other places and poses: as a model that does both right."""
    drawn = {name: [world.save(f"{name}+{i}.png", name) for i in range(DRAWN)] for name in world.inputs}
    found = world.scores(drawn)
    assert found["kept"][0] == found["shown_look"][0] == found["shown_kind"][0] == 1
    for name in ("leaked", "shown_background", "shown_pose"):
        value, low, high = found[name]
        assert low <= 0 <= high and abs(value) < 0.2, (name, found[name])


def test_another_of_the_kind_is_known_by_its_kind_alone(world: World) -> None:
    drawn = {}
    for name in world.inputs:
        drawn[name] = []
        for i in range(DRAWN):
            world.looks[f"{name}x{i}"] = world.rng.uniform(0, 1, 3)
            drawn[name].append(world.save(f"{name}x{i}.png", f"{name}x{i}"))
    found = world.scores(drawn)
    assert found["shown_kind"][0] > 0.95 and abs(found["shown_look"][0]) < 0.2
    assert found["kept"][0] == pytest.approx((found["shown_kind"][0] + found["shown_look"][0]) / 2)


def test_each_part_is_seen_by_itself(world: World) -> None:
    """The wall of the input behind a subject drawn anew; the input's own subject before another wall."""
    walls, poses = {}, {}
    for name, file in world.inputs.items():
        given = np.asarray(read_image(file)) / 255
        wall = given[0, 0]
        walls[name] = [world.save(f"{name}w{i}.png", name, scene(world.rng, world.looks[name], wall)) for i in range(4)]
        poses[name] = []
        for i in range(4):
            subject = (given != wall).any(-1, keepdims=True)
            pixels = (np.where(subject, given, world.rng.uniform(0, 1, 3)) * 255).astype(np.uint8)
            poses[name].append(world.save(f"{name}p{i}.png", name, Image.fromarray(pixels)))
    found = world.scores(walls)
    assert found["shown_background"][0] > 0.99 and abs(found["shown_pose"][0]) < 0.4
    found = world.scores(poses)
    assert found["shown_pose"][0] > 0.9 and abs(found["shown_background"][0]) < 0.3
