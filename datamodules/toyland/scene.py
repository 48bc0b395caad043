"""Subjects and scenes of Toyland, and their rendering to images with exact masks.

Rendering is a pure function of the scene and the size.
"""

from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

from datamodules.toyland.brush import Brush, Canvas, Look, sample_look
from datamodules.toyland.kinds import ACCESSORIES, KINDS, PROPERTIES, draw
from datamodules.toyland.settings import LIGHTS, SETTINGS, STYLES

SIZE = 32
"""Side of a Toyland image in pixels."""


@dataclass(frozen=True)
class Subject:
    """One individual, such as a particular cat."""

    kind: str
    look: Look

    @staticmethod
    def sample(rng: np.random.Generator, kind: str | None = None) -> "Subject":
        return Subject(kind or str(rng.choice(list(KINDS))), sample_look(rng))

    @property
    def live(self) -> bool:
        return KINDS[self.kind].live


@dataclass(frozen=True)
class Placed:
    """A subject placed in a scene. x, y and half are in units of the image's side, tilt is in radians."""

    subject: Subject
    x: float = 0.5
    y: float = 0.58
    half: float = 0.36
    tilt: float = 0.0
    flip: bool = False
    accessory: str | None = None
    property: str | None = None

    def __post_init__(self):
        if self.property is not None and self.property not in PROPERTIES:
            raise ValueError(f"property {self.property!r} is unknown; allowed: {', '.join(PROPERTIES)}")


@dataclass(frozen=True)
class Scene:
    """One or more subjects in a setting, light and style; "" is the studio, daylight and no style."""

    placed: tuple[Placed, ...]
    setting: str = ""
    light: str = ""
    style: str = ""
    seed: int = 0
    """Seed of the setting's details, such as the positions of leaves or the heights of houses."""

    def __post_init__(self):
        for name, value, allowed in (
            ("setting", self.setting, SETTINGS),
            ("light", self.light, LIGHTS),
            ("style", self.style, STYLES),
        ):
            if value not in allowed:
                raise ValueError(f"{name} {value!r} is unknown; allowed: {', '.join(repr(a) for a in allowed)}")


@dataclass(frozen=True)
class Rendered:
    """The image of a scene and the masks of its subjects."""

    image: Image.Image
    masks: np.ndarray = field(repr=False)
    """(subjects, H, W) bool: the visible part of each subject, without accessories."""


def render(scene: Scene, size: int = SIZE) -> Rendered:
    """Draw a scene at `size` × `size` pixels."""
    rng = np.random.default_rng([scene.seed, 0x70])
    centers = (np.arange(size, dtype=np.float32) + 0.5) / size
    y, x = np.meshgrid(centers, centers, indexing="ij")
    canvas = Canvas(np.zeros((size, size, 3), np.float32), pixel=1 / size)
    SETTINGS[scene.setting](canvas, x, y, rng)
    masks: list[np.ndarray] = []
    for placed in scene.placed:
        cover, own = _draw_subject(canvas.picture, placed, x, y, size)
        masks = [mask & (cover < 0.5) for mask in masks]
        masks.append(own > 0.5)
    picture = LIGHTS[scene.light](canvas.picture, y, rng)
    picture = STYLES[scene.style](np.clip(picture, 0, 1), rng)
    pixels = np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)
    return Rendered(Image.fromarray(pixels), np.stack(masks) if masks else np.zeros((0, size, size), bool))


def _draw_subject(picture: np.ndarray, placed: Placed, x: np.ndarray, y: np.ndarray, size: int):
    """Paint one subject into the image. Returns the coverage of everything painted, and that of the body alone."""
    look = placed.subject.look
    flip_v = -1.0 if placed.property == "upside down" else 1.0
    if placed.property in ("red", "purple"):
        look = look.recolored(placed.property)
    du, dv = (x - placed.x) / placed.half, (y - placed.y) / placed.half
    c, s = np.cos(placed.tilt), np.sin(placed.tilt)
    u = (c * du + s * dv) / np.sqrt(look.aspect) * (-1.0 if placed.flip else 1.0)
    v = (c * dv - s * du) * np.sqrt(look.aspect) * flip_v
    # Paint only a window around the subject, since hats extend to 1.5 times the half side.
    reach = 1.65 * placed.half
    rows = slice(max(int((placed.y - reach) * size), 0), min(int((placed.y + reach) * size) + 1, size))
    columns = slice(max(int((placed.x - reach) * size), 0), min(int((placed.x + reach) * size) + 1, size))
    window = Canvas(picture[rows, columns], pixel=1 / size / placed.half)
    brush = Brush(window, u[rows, columns], v[rows, columns], look, outline=max(0.055, 0.9 / size / placed.half))
    own_window = draw(
        brush, KINDS[placed.subject.kind], placed.accessory, placed.property == "shiny", placed.property == "wet"
    )
    cover, own = np.zeros((size, size), np.float32), np.zeros((size, size), np.float32)
    cover[rows, columns], own[rows, columns] = window.coverage, own_window
    return cover, own


def place(rng: np.random.Generator, subjects: list[Subject]) -> tuple[Placed, ...]:
    """Place one to three subjects side by side, in random poses."""
    count = len(subjects)
    if not 1 <= count <= 3:
        raise ValueError(f"a scene must have 1 to 3 subjects, got {count}")
    half = {1: 0.36, 2: 0.25, 3: 0.17}[count]
    placed = []
    for i, subject in enumerate(subjects):
        scale = float(rng.uniform(0.86, 1.12))
        center = 0.5 if count == 1 else (i + 0.5) / count * 0.96 + 0.02
        jitter = rng.uniform(-1, 1, 2) * (0.07 if count == 1 else 0.02)
        placed.append(
            Placed(
                subject,
                x=float(center + jitter[0]),
                y=float((0.6 if count == 1 else 0.66) + jitter[1] * 0.7),
                half=half * scale,
                tilt=float(rng.normal(0, 0.09)),
                flip=bool(rng.random() < 0.5),
            )
        )
    return tuple(placed)


def sample_scene(rng: np.random.Generator, subjects: list[Subject] | None = None, *, plain: bool = False) -> Scene:
    """Draw a scene of one to three subjects, new ones if None. With `plain`, it is in the studio, without changes."""
    if subjects is None:
        kinds = rng.choice(list(KINDS), size=int(rng.choice([1, 2, 3], p=[0.66, 0.28, 0.06])), replace=False)
        subjects = [Subject.sample(rng, str(kind)) for kind in kinds]
    scene = Scene(place(rng, subjects), seed=int(rng.integers(2**31)))
    if plain:
        return scene
    named = [name for name in SETTINGS if name]
    scene = replace(
        scene,
        setting=str(rng.choice(named)) if rng.random() < 0.75 else "",
        light=str(rng.choice([name for name in LIGHTS if name])) if rng.random() < 0.2 else "",
        style=str(rng.choice([name for name in STYLES if name])) if rng.random() < 0.2 else "",
    )
    return replace(scene, placed=tuple(_dress(rng, p) for p in scene.placed))


def _dress(rng: np.random.Generator, placed: Placed) -> Placed:
    if rng.random() >= 0.28:
        return placed
    if placed.subject.live:
        return replace(placed, accessory=str(rng.choice(ACCESSORIES)))
    return replace(placed, property=str(rng.choice(PROPERTIES)))


def crop(rendered: Rendered, index: int, *, white: bool, size: int = SIZE, margin: float = 0.12) -> Image.Image | None:
    """Crop the square around one subject as in Fig. 4, on white or with its background. None if it is hidden."""
    mask = rendered.masks[index]
    if mask.sum() < 0.004 * mask.size:
        return None
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    side = round(max(bottom - top, right - left) * (1 + 2 * margin))
    y0, x0 = (top + bottom - side) // 2, (left + right - side) // 2
    pixels = np.asarray(rendered.image)
    if white:
        pixels = np.where(mask[..., None], pixels, 255).astype(np.uint8)
        picture = Image.fromarray(pixels).crop((x0, y0, x0 + side, y0 + side))
        inside = Image.fromarray(np.full(mask.shape, 255, np.uint8)).crop((x0, y0, x0 + side, y0 + side))
        picture = Image.composite(picture, Image.new("RGB", picture.size, (255, 255, 255)), inside)
    else:  # shift the square into the image, to avoid black borders
        side = min(side, mask.shape[0])
        x0, y0 = (int(np.clip(value, 0, mask.shape[0] - side)) for value in (x0, y0))
        picture = Image.fromarray(pixels).crop((x0, y0, x0 + side, y0 + side))
    return picture.resize((size, size), Image.Resampling.BICUBIC)
