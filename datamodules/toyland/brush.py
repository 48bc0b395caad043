"""Drawing tools: shapes, a canvas, the looks of subjects, and a brush that paints with the colours of a look.

A shape is a signed distance, negative inside, in the units of its coordinates. Edges are antialiased analytically over
one pixel, so that scenes can be rendered at any size without supersampling and masks are exact. A look consists of
continuous colours, a pattern, proportions and markings, which words describe only coarsely.
"""

import colorsys
from dataclasses import dataclass, field, replace

import numpy as np

Field = np.ndarray  # (H, W) float32
Color = tuple[float, float, float] | np.ndarray  # RGB in [0, 1], or an (H, W, 3) image

INK = (0.1, 0.08, 0.1)
WHITE = (0.97, 0.97, 0.97)
HUES = {
    "red": 0.0,
    "orange": 0.08,
    "yellow": 0.155,
    "green": 0.35,
    "teal": 0.49,
    "blue": 0.61,
    "purple": 0.76,
    "pink": 0.9,
}
PATTERNS = {"plain": "", "stripes": "stripes", "spots": "spots", "checks": "checks", "patches": "patches"}
MARKINGS = ("none", "disc", "bar")


def ellipse(u: Field, v: Field, cx: float, cy: float, rx: float, ry: float) -> Field:
    """Distance to an ellipse, exact on its outline and accurate to a few percent near it."""
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
    """Distance to a line from (x0, y0) to (x1, y1), drawn with a pen of radius r."""
    dx, dy = x1 - x0, y1 - y0
    t = np.clip(((u - x0) * dx + (v - y0) * dy) / (dx * dx + dy * dy + 1e-9), 0, 1)
    return np.sqrt((u - x0 - t * dx) ** 2 + (v - y0 - t * dy) ** 2) - r


def polygon(u: Field, v: Field, *points: tuple[float, float], round_: float = 0.0) -> Field:
    """Distance to a convex polygon, with points in either direction."""
    area = sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(points, points[1:] + points[:1], strict=True))
    sign = 1.0 if area > 0 else -1.0
    sides = []
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
        length = float(np.hypot(x1 - x0, y1 - y0)) + 1e-9
        sides.append(sign * ((u - x0) * (y1 - y0) - (v - y0) * (x1 - x0)) / length)
    return np.maximum.reduce(sides) - round_


def ring(u: Field, v: Field, cx: float, cy: float, rx: float, ry: float, width: float) -> Field:
    """Distance to the outline of an ellipse, drawn with a pen of this width."""
    return np.abs(ellipse(u, v, cx, cy, rx, ry)) - width / 2


@dataclass
class Canvas:
    """An image being painted: RGB in [0, 1], and the coverage of everything painted so far."""

    picture: np.ndarray  # (H, W, 3) float32
    pixel: float  # size of one pixel in the units of the distances
    coverage: np.ndarray = field(init=False)  # (H, W) float32

    def __post_init__(self):
        self.coverage = np.zeros(self.picture.shape[:2], np.float32)

    def alpha(self, distance: Field) -> Field:
        return np.clip(0.5 - distance / self.pixel, 0, 1)

    def blend(self, alpha: Field, color: Color, *, covers: bool = True) -> None:
        """Paint `color` with `alpha`; with `covers=False` the coverage is unchanged."""
        self.picture += alpha[..., None] * (np.asarray(color, np.float32) - self.picture)
        if covers:
            self.coverage = np.maximum(self.coverage, alpha)

    def fill(self, distance: Field, color: Color, outline: float = 0.0, ink: Color = (0.1, 0.08, 0.1)) -> None:
        """Fill a shape, with an outline of the given width around it."""
        if outline > 0:
            self.blend(self.alpha(distance - outline), ink)
        self.blend(self.alpha(distance), color)


@dataclass(frozen=True)
class Tint:
    """A colour as hue, saturation and value, each in [0, 1]."""

    hue: float
    saturation: float
    value: float

    @property
    def rgb(self) -> tuple[float, float, float]:
        return colorsys.hsv_to_rgb(self.hue % 1.0, self.saturation, self.value)

    @property
    def word(self) -> str:
        """The coarse name used in captions."""
        if self.saturation < 0.2:
            return "white" if self.value > 0.75 else "gray" if self.value > 0.35 else "black"
        gaps = {name: abs((self.hue - hue + 0.5) % 1.0 - 0.5) for name, hue in HUES.items()}
        return min(gaps, key=gaps.__getitem__)


@dataclass(frozen=True)
class Look:
    """Everything in which subjects of a kind differ. Lengths are in units of half the subject's size."""

    body: Tint
    second: Tint
    """Colour of the pattern and of details such as ears, handles and fins."""
    pattern: str
    period: float
    """Distance between stripes, spots, checks or patches."""
    angle: float
    """Direction of the pattern in radians."""
    phase: float
    aspect: float
    """Width over height, relative to that of the kind."""
    part: float
    """Size in [0, 1] of the kind's characteristic part: ears, tail, handle, wheels."""
    marking: str
    marking_tint: Tint
    marking_x: float

    def paint(self, u: Field, v: Field) -> np.ndarray:
        """Return the body's colour at every point, (H, W, 3) float32."""
        c, s = np.cos(self.angle), np.sin(self.angle)
        a, b = (c * u + s * v) / self.period + self.phase, (c * v - s * u) / self.period + self.phase
        if self.pattern == "stripes":
            level = np.abs(a % 1.0 - 0.5) * 2 - 0.55
            scale = self.period / 2
        elif self.pattern == "spots":
            level = 0.36 - np.hypot(a % 1.0 - 0.5, b % 1.0 - 0.5)
            scale = self.period
        elif self.pattern == "checks":
            level = np.sin(2 * np.pi * a) * np.sin(2 * np.pi * b)
            scale = self.period / 6
        elif self.pattern == "patches":
            level = np.sin(3.1 * a + 2 * np.sin(1.7 * b)) + np.sin(2.3 * b + self.phase * 7) - 0.25
            scale = self.period / 3
        else:
            level, scale = np.full_like(u, -1.0), 1.0
        pixel = abs(float(u[0, 1] - u[0, 0])) + abs(float(v[1, 0] - v[0, 0]))
        mix = np.clip(0.5 + level * scale / max(pixel, 1e-6), 0, 1)[..., None]
        color = (1 - mix) * np.asarray(self.body.rgb) + mix * np.asarray(self.second.rgb)
        return color.astype(np.float32)

    def recolored(self, hue_name: str) -> "Look":
        """Return the look with a body of the named colour, for prompts such as "{}, red"."""
        return replace(self, body=Tint(HUES[hue_name], max(self.body.saturation, 0.85), max(self.body.value, 0.8)))

    @property
    def words(self) -> tuple[str, str]:
        """Coarse description such as ("red", "with yellow stripes"); the second part is "" for a plain body."""
        pattern = PATTERNS[self.pattern]
        return self.body.word, f"with {self.second.word} {pattern}" if pattern else ""


def _tint(rng: np.random.Generator, neutral: float = 0.15) -> Tint:
    if rng.random() < neutral:
        return Tint(rng.random(), 0.12 * rng.random(), rng.choice([0.12, 0.5, 0.95]) + 0.05 * rng.random())
    return Tint(rng.random(), 0.6 + 0.4 * rng.random(), 0.6 + 0.4 * rng.random())


def _contrasting(rng: np.random.Generator, tint: Tint) -> Tint:
    """Draw a tint with enough contrast to another one for a visible pattern."""
    while True:
        other = _tint(rng, 0.35)
        if np.linalg.norm(np.subtract(other.rgb, tint.rgb)) > 0.6:
            return other


def sample_look(rng: np.random.Generator) -> Look:
    body = _tint(rng)
    second = _contrasting(rng, body)
    return Look(
        body=body,
        second=second,
        pattern=str(rng.choice(list(PATTERNS), p=[0.28, 0.22, 0.2, 0.14, 0.16])),
        period=float(rng.uniform(0.5, 0.85)),
        angle=float(rng.uniform(0, np.pi)),
        phase=float(rng.random()),
        aspect=float(rng.uniform(0.85, 1.18)),
        part=float(rng.random()),
        marking=str(rng.choice(MARKINGS, p=[0.5, 0.25, 0.25])),
        marking_tint=_contrasting(rng, body),
        marking_x=float(rng.uniform(-0.25, 0.25)),
    )


@dataclass
class Brush:
    """Paints one subject on a canvas, in the subject's coordinates and with the colours of its look."""

    canvas: Canvas
    u: Field
    v: Field
    look: Look
    outline: float = 0.06

    def __post_init__(self):
        self._body = self.look.paint(self.u, self.v)
        self._shade = (1.06 - 0.16 * np.clip(self.v, -1, 1))[..., None]  # light from above

    def body(self, distance: Field) -> None:
        self.canvas.fill(distance, np.clip(self._body * self._shade, 0, 1), self.outline)

    def trim(self, distance: Field) -> None:
        self.canvas.fill(distance, np.clip(np.asarray(self.look.second.rgb) * self._shade, 0, 1), self.outline)

    def plain(self, distance: Field, color, outline: bool = True) -> None:
        self.canvas.fill(distance, color, self.outline if outline else 0.0)

    def eye(self, x: float, y: float, r: float = 0.1) -> None:
        self.plain(ellipse(self.u, self.v, x, y, r, r), WHITE, outline=False)
        self.plain(ellipse(self.u, self.v, x + 0.02, y + 0.01, r * 0.6, r * 0.6), INK, outline=False)

    def mark(self, x: float, y: float, within: Field) -> None:
        """Paint the subject's marking, clipped to the shape with the distance `within`."""
        look = self.look
        if look.marking == "disc":
            shape = ellipse(self.u, self.v, x + look.marking_x, y, 0.17, 0.17)
        elif look.marking == "bar":
            shape = box(self.u, self.v, x, y + look.marking_x * 0.6, 2.0, 0.085)
        else:
            return
        self.canvas.fill(np.maximum(shape, within + 0.01), look.marking_tint.rgb)
