"""What a subject looks like: continuous colours, pattern, proportions and markings that words tell only coarsely."""

import colorsys
from dataclasses import dataclass, replace

import numpy as np

from kosmosg.toyland.shapes import Field

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
        """The coarse name that a caption would use."""
        if self.saturation < 0.2:
            return "white" if self.value > 0.75 else "gray" if self.value > 0.35 else "black"
        gaps = {name: abs((self.hue - hue + 0.5) % 1.0 - 0.5) for name, hue in HUES.items()}
        return min(gaps, key=gaps.__getitem__)


@dataclass(frozen=True)
class Look:
    """Everything that tells one subject from another of its kind. Lengths are in units of half the subject's size."""

    body: Tint
    second: Tint
    """Colour of the pattern and of the trimmings (ears, handles, fins)."""
    pattern: str
    period: float
    """Distance between two stripes, spots, checks or patches."""
    angle: float
    """Direction of the pattern in radians."""
    phase: float
    aspect: float
    """Width over height, relative to the kind's own."""
    part: float
    """Size in [0, 1] of the kind's telling part: ears, tail, handle, wheels."""
    marking: str
    marking_tint: Tint
    marking_x: float

    def paint(self, u: Field, v: Field) -> np.ndarray:
        """The body's colour at every point, (H, W, 3) float32."""
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
        """The same look with a body of the named colour: what "{}, red" asks for."""
        return replace(self, body=Tint(HUES[hue_name], max(self.body.saturation, 0.85), max(self.body.value, 0.8)))

    @property
    def words(self) -> tuple[str, str]:
        """("red", "with yellow stripes"): the coarse description; the second is empty for a plain body."""
        pattern = PATTERNS[self.pattern]
        return self.body.word, f"with {self.second.word} {pattern}" if pattern else ""


def _tint(rng: np.random.Generator, neutral: float = 0.15) -> Tint:
    if rng.random() < neutral:
        return Tint(rng.random(), 0.12 * rng.random(), rng.choice([0.12, 0.5, 0.95]) + 0.05 * rng.random())
    return Tint(rng.random(), 0.6 + 0.4 * rng.random(), 0.6 + 0.4 * rng.random())


def _contrasting(rng: np.random.Generator, tint: Tint) -> Tint:
    """A tint that stands out from another one, so that a pattern can be seen."""
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
