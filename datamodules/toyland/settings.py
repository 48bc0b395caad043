"""Settings, lights and styles of scenes.

A setting paints the background of the image. Coordinates are in [0, 1], x to the right and y down. Named settings
correspond to DreamBench's templates; prompts without a setting, such as "a cat", show the unnamed backdrop.
"""

from collections.abc import Callable

import numpy as np

from datamodules.toyland.brush import Canvas, Field, box, capsule, ellipse, polygon

Random = np.random.Generator


def _split(c: Canvas, y: Field, horizon: float, above, below) -> None:
    c.blend(np.ones_like(y), above)
    c.blend(c.alpha(horizon - y), below)


def _scatter(rng: Random, count: int, y0: float, y1: float) -> list[tuple[float, float]]:
    return [(float(rng.uniform(0, 1)), float(rng.uniform(y0, y1))) for _ in range(count)]


def backdrop(c: Canvas, x: Field, y: Field, rng: Random) -> None:
    """The studio: a pale wall and floor of random hue."""
    wall = 0.72 + 0.24 * rng.random(3)
    _split(c, y, float(rng.uniform(0.62, 0.76)), wall, wall * float(rng.uniform(0.78, 0.9)))


def jungle(c: Canvas, x: Field, y: Field, rng: Random) -> None:
    _split(c, y, 0.7, (0.1, 0.36, 0.16), (0.2, 0.28, 0.1))
    for px, _ in _scatter(rng, 3, 0, 1):
        c.fill(box(x, y, px, 0.35, 0.035, 0.5), (0.3, 0.2, 0.1))
    for px, py in _scatter(rng, 9, 0.0, 0.45) + _scatter(rng, 4, 0.8, 1.0):
        angle = rng.uniform(-0.9, 0.9)
        dx, dy = 0.13 * np.cos(angle), 0.13 * np.sin(angle)
        green = (0.1 + 0.15 * rng.random(), 0.5 + 0.3 * rng.random(), 0.15)
        c.fill(capsule(x, y, px - dx, py - dy, px + dx, py + dy, 0.045), green)


def snow(c: Canvas, x: Field, y: Field, rng: Random) -> None:
    _split(c, y, 0.6, (0.68, 0.78, 0.9), (0.96, 0.97, 1.0))
    for px in rng.uniform(0, 1, 3):
        c.fill(polygon(x, y, (px - 0.1, 0.6), (px, 0.3), (px + 0.1, 0.6)), (0.3, 0.48, 0.45))
    for px, py in _scatter(rng, 14, 0, 0.95):
        c.blend(c.alpha(ellipse(x, y, px, py, 0.016, 0.016)), (1, 1, 1))


def beach(c: Canvas, x: Field, y: Field, rng: Random) -> None:
    _split(c, y, 0.42, (0.5, 0.8, 0.98), (0.1, 0.48, 0.8))
    shore = y + 0.025 * np.sin(9 * x + 6 * rng.random())
    c.fill(0.585 - shore, (0.95, 0.97, 0.97))
    c.fill(0.62 - shore, (0.94, 0.83, 0.56))
    c.fill(ellipse(x, y, float(rng.uniform(0.1, 0.9)), 0.14, 0.085, 0.085), (1.0, 0.92, 0.4))


def cobblestones(c: Canvas, x: Field, y: Field, rng: Random) -> None:
    _split(c, y, 0.4, (0.7, 0.66, 0.6), (0.3, 0.29, 0.3))
    for row in range(5):
        cy = 0.45 + row * 0.125
        for col in range(7):
            shade = float(rng.uniform(0.48, 0.68))
            cx = (col + 0.5 * (row % 2)) / 6.2
            c.fill(ellipse(x, y, cx, cy, 0.07, 0.052), (shade, shade * 0.97, shade * 0.93))


def pink_fabric(c: Canvas, x: Field, y: Field, rng: Random) -> None:
    wave = np.sin(11 * (x + 0.35 * np.sin(4 * y + 6 * rng.random())) + 6 * rng.random())
    c.blend(np.ones_like(y), np.stack([0.97 + 0 * wave, 0.55 + 0.1 * wave, 0.72 + 0.08 * wave], -1))


def wooden_floor(c: Canvas, x: Field, y: Field, rng: Random) -> None:
    _split(c, y, 0.42, (0.9, 0.87, 0.8), (0.62, 0.4, 0.22))
    for row, edge in enumerate(np.linspace(0.42, 1.0, 6)):
        c.fill(np.abs(y - edge) - 0.009, (0.38, 0.22, 0.1))
        c.fill(
            np.maximum(
                np.abs(x - (0.3 + 0.37 * row + rng.random() * 0.2) % 1) - 0.008, np.abs(y - edge - 0.055) - 0.055
            ),
            (0.38, 0.22, 0.1),
        )


def city(c: Canvas, x: Field, y: Field, rng: Random) -> None:
    _split(c, y, 0.74, (0.62, 0.8, 0.95), (0.42, 0.42, 0.45))
    left = -0.03
    while left < 1:
        width, top, shade = rng.uniform(0.12, 0.2), rng.uniform(0.1, 0.42), rng.uniform(0.35, 0.6)
        c.fill(
            box(x, y, left + width / 2, (top + 0.74) / 2, width / 2 - 0.008, (0.74 - top) / 2),
            (shade, shade, shade * 1.15),
        )
        for wy in np.arange(top + 0.07, 0.7, 0.12):
            for wx in (left + width * 0.3, left + width * 0.7):
                c.fill(box(x, y, wx, wy, 0.018, 0.024), (1.0, 0.92, 0.55))
        left += width


def mountain(c: Canvas, x: Field, y: Field, rng: Random) -> None:
    _split(c, y, 0.66, (0.66, 0.86, 1.0), (0.42, 0.66, 0.35))
    for px, height in ((rng.uniform(0.15, 0.35), 0.42), (rng.uniform(0.6, 0.85), 0.55)):
        top = 0.66 - height
        c.fill(polygon(x, y, (px - 0.36, 0.66), (px, top), (px + 0.36, 0.66)), (0.47, 0.45, 0.52))
        c.fill(
            polygon(x, y, (px - 0.36 * 0.3, top + height * 0.3), (px, top), (px + 0.36 * 0.3, top + height * 0.3)),
            (0.97, 0.97, 1.0),
        )


def blue_house(c: Canvas, x: Field, y: Field, rng: Random) -> None:
    _split(c, y, 0.68, (0.85, 0.92, 0.98), (0.5, 0.72, 0.4))
    px = float(rng.uniform(0.3, 0.7))
    c.fill(box(x, y, px, 0.48, 0.34, 0.21), (0.2, 0.42, 0.85))
    c.fill(polygon(x, y, (px - 0.42, 0.28), (px, 0.04), (px + 0.42, 0.28)), (0.55, 0.22, 0.18))
    for s in (-1, 1):
        c.fill(box(x, y, px + s * 0.22, 0.44, 0.065, 0.075), (1.0, 0.95, 0.7), 0.015, (1, 1, 1))


def purple_rug(c: Canvas, x: Field, y: Field, rng: Random) -> None:
    _split(c, y, 0.5, (0.88, 0.84, 0.74), (0.7, 0.55, 0.38))
    rug = ellipse(x, y, 0.5, 0.8, 0.56, 0.27)
    c.fill(rug, (0.48, 0.2, 0.62))
    c.fill(np.abs(rug + 0.05) - 0.012, (0.85, 0.7, 0.3))


def wheat(c: Canvas, x: Field, y: Field, rng: Random) -> None:
    _split(c, y, 0.38, (0.6, 0.82, 0.98), (0.86, 0.68, 0.22))
    for px, py in _scatter(rng, 26, 0.36, 0.98):
        c.fill(capsule(x, y, px, py, px + rng.uniform(-0.02, 0.02), py - 0.11, 0.012), (0.98, 0.85, 0.42))


def autumn(c: Canvas, x: Field, y: Field, rng: Random) -> None:
    _split(c, y, 0.7, (0.95, 0.88, 0.75), (0.62, 0.42, 0.2))
    px = float(rng.choice([0.12, 0.88]))
    c.fill(box(x, y, px, 0.4, 0.05, 0.35), (0.36, 0.22, 0.12))
    c.fill(ellipse(x, y, px, 0.12, 0.34, 0.22), (0.88, 0.42, 0.1))
    for lx, ly in _scatter(rng, 16, 0.02, 0.98):
        c.fill(ellipse(x, y, lx, ly, 0.032, 0.022), (0.95, float(rng.uniform(0.25, 0.65)), 0.1))


def water(c: Canvas, x: Field, y: Field, rng: Random) -> None:
    _split(c, y, 0.3, (0.78, 0.9, 0.98), (0.15, 0.5, 0.78))
    for row in np.linspace(0.36, 0.96, 6):
        ripple = np.abs(y - row - 0.018 * np.sin(16 * x + 6 * rng.random())) - 0.011
        c.fill(ripple, (0.5, 0.78, 0.95))


def sunflowers(c: Canvas, x: Field, y: Field, rng: Random) -> None:
    _split(c, y, 0.35, (0.7, 0.88, 1.0), (0.3, 0.66, 0.25))
    for px, py in _scatter(rng, 8, 0.42, 0.95):
        c.fill(ellipse(x, y, px, py, 0.065, 0.065), (1.0, 0.82, 0.1))
        c.fill(ellipse(x, y, px, py, 0.03, 0.03), (0.4, 0.22, 0.08))


SETTINGS: dict[str, Callable[[Canvas, Field, Field, Random], None]] = {
    "": backdrop,
    "in the jungle": jungle,
    "in the snow": snow,
    "on the beach": beach,
    "on a cobblestone street": cobblestones,
    "on pink fabric": pink_fabric,
    "on a wooden floor": wooden_floor,
    "with a city in the background": city,
    "with a mountain in the background": mountain,
    "with a blue house in the background": blue_house,
    "on a purple rug": purple_rug,
    "in a wheat field": wheat,
    "with autumn leaves around": autumn,
    "floating on water": water,
    "on green grass with sunflowers": sunflowers,
}


def _night(p: np.ndarray, y: Field, rng: Random) -> np.ndarray:
    return p * np.array([0.34, 0.38, 0.58], np.float32) + np.array([0.0, 0.01, 0.06], np.float32)


def _sunset(p: np.ndarray, y: Field, rng: Random) -> np.ndarray:
    glow = np.clip(1.0 - 0.5 * y, 0, 1)[..., None] * np.array([1.0, 0.42, 0.1], np.float32)
    return 0.62 * p * np.array([1.1, 0.8, 0.66], np.float32) + 0.38 * glow


def _fog(p: np.ndarray, y: Field, rng: Random) -> np.ndarray:
    return 0.42 * p + 0.58 * np.array([0.86, 0.88, 0.9], np.float32)


LIGHTS = {"": lambda p, y, rng: p, "at night": _night, "at sunset": _sunset, "in the fog": _fog}


def _gray(p: np.ndarray) -> np.ndarray:
    return p @ np.array([0.3, 0.59, 0.11], np.float32)


def _sketch(p: np.ndarray, rng: Random) -> np.ndarray:
    """A pencil drawing: dark edges and pale colours."""
    g = np.pad(p, ((1, 1), (1, 1), (0, 0)), mode="edge")
    edges = np.abs(g[2:, 1:-1] - g[:-2, 1:-1]).max(-1) + np.abs(g[1:-1, 2:] - g[1:-1, :-2]).max(-1)
    wash = 0.72 + 0.28 * (0.5 * p + 0.5 * _gray(p)[..., None])
    strength = 0.5 + p.shape[0] / 128  # edges are steeper at lower resolutions
    return wash * (1 - 0.8 * np.clip((edges - 0.12) * strength, 0, 1))[..., None]


def _mosaic(p: np.ndarray, rng: Random) -> np.ndarray:
    """About ten by ten square tiles with pale joints."""
    size = p.shape[0]
    tile = max(size // 10, 3)
    index = np.minimum((np.arange(size) // tile) * tile + tile // 2, size - 1)
    tiles = p[index][:, index].copy()
    joint = (np.arange(size) % tile) == 0
    tiles[joint] = 0.6 * tiles[joint] + 0.4 * 0.95
    tiles[:, joint] = 0.6 * tiles[:, joint] + 0.4 * 0.95
    return tiles


def _woodcut(p: np.ndarray, rng: Random) -> np.ndarray:
    """Three tones of ink on cream paper."""
    g = _gray(p)
    ink = 0.5 * np.clip((0.36 - g) * 12, 0, 1) + 0.36 * np.clip((0.66 - g) * 12, 0, 1)
    paper = np.array([0.96, 0.92, 0.82], np.float32)
    return paper * (1 - np.array([0.9, 0.95, 1.0], np.float32) * ink[..., None])


STYLES = {"": lambda p, rng: p, "as a sketch": _sketch, "as a mosaic": _mosaic, "as a woodcut": _woodcut}
