"""Signed distances of the few shapes that Toyland is drawn from, and a canvas that paints them with smooth edges.

A distance is negative inside, in the units of the coordinates it is given. Edges are antialiased analytically (one
pixel wide), so that a scene renders at any size without supersampling and its masks are exact.
"""

from dataclasses import dataclass, field

import numpy as np

Field = np.ndarray  # (H, W) float32
Color = tuple[float, float, float] | np.ndarray  # RGB in [0, 1], or an (H, W, 3) picture


def ellipse(u: Field, v: Field, cx: float, cy: float, rx: float, ry: float) -> Field:
    """Distance to an ellipse, exact on its outline and good to a few percent near it."""
    x, y = (u - cx) / rx, (v - cy) / ry
    r = np.sqrt(x * x + y * y)
    slope = np.sqrt((x / rx) ** 2 + (y / ry) ** 2) / np.maximum(r, 1e-6)
    return (r - 1) / np.maximum(slope, 1e-6)


def box(u: Field, v: Field, cx: float, cy: float, hx: float, hy: float, round_: float = 0.0) -> Field:
    """Distance to a box of half sides hx, hy with corners rounded by `round_`."""
    dx, dy = np.abs(u - cx) - (hx - round_), np.abs(v - cy) - (hy - round_)
    outside = np.sqrt(np.maximum(dx, 0) ** 2 + np.maximum(dy, 0) ** 2)
    return outside + np.minimum(np.maximum(dx, dy), 0) - round_


def capsule(u: Field, v: Field, x0: float, y0: float, x1: float, y1: float, r: float) -> Field:
    """Distance to a line from (x0, y0) to (x1, y1) with a pen of radius r."""
    dx, dy = x1 - x0, y1 - y0
    t = np.clip(((u - x0) * dx + (v - y0) * dy) / (dx * dx + dy * dy + 1e-9), 0, 1)
    return np.sqrt((u - x0 - t * dx) ** 2 + (v - y0 - t * dy) ** 2) - r


def polygon(u: Field, v: Field, *points: tuple[float, float], round_: float = 0.0) -> Field:
    """Distance to a convex polygon given counter-clockwise or clockwise."""
    area = sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(points, points[1:] + points[:1], strict=True))
    sign = 1.0 if area > 0 else -1.0
    sides = []
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
        length = float(np.hypot(x1 - x0, y1 - y0)) + 1e-9
        sides.append(sign * ((u - x0) * (y1 - y0) - (v - y0) * (x1 - x0)) / length)
    return np.maximum.reduce(sides) - round_


def ring(u: Field, v: Field, cx: float, cy: float, rx: float, ry: float, width: float) -> Field:
    """Distance to the outline of an ellipse drawn with a pen `width` wide."""
    return np.abs(ellipse(u, v, cx, cy, rx, ry)) - width / 2


@dataclass
class Canvas:
    """A picture under the brush: RGB in [0, 1] and the coverage of everything painted so far."""

    picture: np.ndarray  # (H, W, 3) float32
    pixel: float  # size of one pixel in the units of the distances
    coverage: np.ndarray = field(init=False)  # (H, W) float32

    def __post_init__(self):
        self.coverage = np.zeros(self.picture.shape[:2], np.float32)

    def alpha(self, distance: Field) -> Field:
        return np.clip(0.5 - distance / self.pixel, 0, 1)

    def blend(self, alpha: Field, color: Color, *, covers: bool = True) -> None:
        """Paint `color` with `alpha`; `covers=False` paints on what is there without adding to the coverage."""
        self.picture += alpha[..., None] * (np.asarray(color, np.float32) - self.picture)
        if covers:
            self.coverage = np.maximum(self.coverage, alpha)

    def fill(self, distance: Field, color: Color, outline: float = 0.0, ink: Color = (0.1, 0.08, 0.1)) -> None:
        """Fill a shape, with an outline of the given width around it when one is asked for."""
        if outline > 0:
            self.blend(self.alpha(distance - outline), ink)
        self.blend(self.alpha(distance), color)
