"""Pictures to train the parts on: drawn once, kept as bytes, with what their captions say of them."""

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kosmosg.files import replaced
from kosmosg.toyland.kinds import KINDS
from kosmosg.toyland.language import caption
from kosmosg.toyland.looks import PATTERNS
from kosmosg.toyland.scene import Scene, Subject, render, sample_scene
from kosmosg.toyland.settings import LIGHTS, SETTINGS, STYLES

PARTS_STREAM = 0x9A27
"""Keeps the parts' subjects apart from those of any data set, whose seeds are drawn elsewhere."""

LABELS = {
    "kind": list(KINDS),
    "setting": list(SETTINGS),
    "light": list(LIGHTS),
    "style": list(STYLES),
    "pattern": list(PATTERNS),
}


@dataclass
class Pool:
    images: Tensor
    """(N, 3, S, S) uint8"""
    captions: list[str]
    labels: Tensor
    """(N, 5): index into each of LABELS for the scene's first subject"""
    tints: Tensor
    """(N, 6): body and second colour of the first subject, RGB in [0, 1]"""

    def __len__(self) -> int:
        return len(self.captions)


def pixels(images: Tensor) -> Tensor:
    """uint8 → float32 in [-1, 1]."""
    return images.float().div_(127.5).sub_(1.0)


def _draw(number: int, seed: int, told: float) -> tuple[np.ndarray, str, list[int], list[float]]:
    rng = np.random.default_rng([seed, PARTS_STREAM, number])
    scene = sample_scene(rng)
    words = caption(scene, rng, told=bool(rng.random() < told), with_article=bool(rng.random() < 0.85))
    first = scene.placed[0].subject
    values = (first.kind, scene.setting, scene.light, scene.style, first.look.pattern)
    labels = [names.index(value) for names, value in zip(LABELS.values(), values, strict=True)]
    return np.asarray(render(scene).image), words, labels, [*first.look.body.rgb, *first.look.second.rgb]


def draw_pool(folder: Path, count: int, seed: int, told: float) -> Pool:
    """`count` scenes, of whose captions the share `told` names looks; read from `folder` when they are there."""
    path = folder / f"pool-{count}-{seed}-{told}.pt"
    if not path.exists():
        rows = _parallel(partial(_draw, seed=seed, told=told), count)
        images, captions, labels, tints = zip(*rows, strict=True)
        content = {
            "images": torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
            "captions": list(captions),
            "labels": torch.tensor(labels),
            "tints": torch.tensor(tints, dtype=torch.float32),
        }
        _save(content, path)
    return Pool(**torch.load(path, weights_only=True))


def _draw_pair(number: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, PARTS_STREAM + 1, number])
    subject = Subject.sample(rng)
    first: Scene = sample_scene(rng, [subject], plain=True)
    return np.stack([np.asarray(render(scene).image) for scene in (first, sample_scene(rng, [subject]))])


def draw_pairs(folder: Path, count: int, seed: int) -> Tensor:
    """(N, 2, 3, S, S) uint8: each subject twice, in the studio and somewhere else in another pose."""
    path = folder / f"pairs-{count}-{seed}.pt"
    if not path.exists():
        rows = _parallel(partial(_draw_pair, seed=seed), count)
        _save({"pairs": torch.from_numpy(np.stack(rows)).permute(0, 1, 4, 2, 3).contiguous()}, path)
    return torch.load(path, weights_only=True)["pairs"]


def _parallel(function, count: int) -> list:
    with ProcessPoolExecutor(os.cpu_count()) as workers:
        return list(workers.map(function, range(count), chunksize=128))


def _save(content: dict, path: Path) -> None:
    with replaced(path) as temporary:
        torch.save(content, temporary)
