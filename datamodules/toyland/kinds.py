"""The sixteen kinds of subject, six of them live, with functions that draw them, and their accessories.

A kind is drawn with a `Brush`: `body` paints with the subject's pattern, `trim` with its second colour. Coordinates are
in [-1, 1]², v down. The `anchors` of live kinds give the positions of hats, glasses and scarves.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from datamodules.toyland.brush import INK, WHITE, Brush, box, capsule, ellipse, polygon, ring


def cat(b: Brush) -> None:
    u, v, p = b.u, b.v, b.look.part
    b.trim(capsule(u, v, 0.5, 0.6, 0.85, 0.05 - 0.3 * p, 0.09))
    body = ellipse(u, v, 0.05, 0.5, 0.52, 0.45)
    b.body(body)
    b.mark(0.05, 0.5, body)
    for s in (-1, 1):
        b.trim(polygon(u, v, (s * 0.48, -0.35), (s * 0.44, -0.82 - 0.16 * p), (s * 0.08, -0.58)))
    b.body(ellipse(u, v, 0, -0.28, 0.5, 0.42))
    b.eye(-0.19, -0.3)
    b.eye(0.19, -0.3)
    b.plain(polygon(u, v, (-0.07, -0.14), (0.07, -0.14), (0, -0.05)), (0.95, 0.5, 0.55), outline=False)
    for s in (-1, 1):
        b.body(ellipse(u, v, s * 0.25 + 0.05, 0.88, 0.16, 0.1))


def dog(b: Brush) -> None:
    u, v, p = b.u, b.v, b.look.part
    b.trim(capsule(u, v, -0.7, 0.1, -0.95, -0.25 - 0.15 * p, 0.09))
    for x in (-0.6, -0.35, 0.2, 0.42):
        b.body(box(u, v, x, 0.68, 0.1, 0.28, 0.08))
    body = box(u, v, -0.12, 0.25, 0.65, 0.33, 0.3)
    b.body(body)
    b.mark(-0.15, 0.25, body)
    b.body(ellipse(u, v, 0.52, -0.3, 0.38, 0.36))
    b.body(ellipse(u, v, 0.82, -0.18, 0.2, 0.16))
    b.plain(ellipse(u, v, 0.95, -0.24, 0.09, 0.08), INK, outline=False)
    b.trim(ellipse(u, v, 0.24, -0.25 + 0.1 * p, 0.14, 0.3 + 0.16 * p))
    b.eye(0.56, -0.38)


def fish(b: Brush) -> None:
    u, v, p = b.u, b.v, b.look.part
    b.trim(polygon(u, v, (-0.45, 0), (-0.98, -0.35 - 0.2 * p), (-0.98, 0.35 + 0.2 * p)))
    b.trim(polygon(u, v, (-0.25, -0.4), (0.05, -0.72 - 0.2 * p), (0.35, -0.35)))
    body = ellipse(u, v, 0.15, 0, 0.75, 0.5)
    b.body(body)
    b.mark(0.0, 0.05, body)
    b.trim(polygon(u, v, (0.1, 0.12), (-0.2, 0.42), (0.22, 0.36)))
    b.eye(0.58, -0.12, 0.12)


def bird(b: Brush) -> None:
    u, v, p = b.u, b.v, b.look.part
    for x in (-0.12, 0.12):
        b.plain(capsule(u, v, x, 0.6, x, 0.92, 0.04), (0.95, 0.6, 0.1))
    b.trim(polygon(u, v, (-0.45, 0.1), (-0.98, -0.1 - 0.25 * p), (-0.9, 0.35)))
    body = ellipse(u, v, -0.03, 0.2, 0.6, 0.46)
    b.body(body)
    b.mark(0.1, 0.35, body)
    b.trim(ellipse(u, v, -0.15, 0.15, 0.34, 0.2 + 0.06 * p))
    b.body(ellipse(u, v, 0.38, -0.4, 0.34, 0.33))
    b.plain(polygon(u, v, (0.66, -0.5), (0.98, -0.36), (0.66, -0.24)), (0.98, 0.65, 0.1))
    b.eye(0.46, -0.47)


def turtle(b: Brush) -> None:
    u, v, p = b.u, b.v, b.look.part
    for x in (-0.5, 0.3):
        b.trim(box(u, v, x, 0.55, 0.17, 0.22, 0.1))
    b.trim(polygon(u, v, (-0.7, 0.3), (-0.98, 0.5), (-0.6, 0.5)))
    b.trim(capsule(u, v, 0.5, 0.25, 0.72, -0.05 - 0.12 * p, 0.13))
    b.trim(ellipse(u, v, 0.75, -0.15 - 0.12 * p, 0.23, 0.2))
    shell = np.maximum(ellipse(u, v, -0.1, 0.42, 0.7, 0.85), v - 0.46)
    b.body(shell)
    b.mark(-0.1, 0.1, shell)
    b.plain(box(u, v, -0.1, 0.46, 0.74, 0.06, 0.05), INK, outline=False)
    b.eye(0.82, -0.2 - 0.12 * p, 0.08)


def butterfly(b: Brush) -> None:
    u, v, p = b.u, b.v, b.look.part
    for s in (-1, 1):
        upper = ellipse(u, v, s * 0.5, -0.28, 0.44, 0.42)
        b.body(upper)
        b.trim(ellipse(u, v, s * 0.4, 0.42, 0.32, 0.26 + 0.14 * p))
        b.mark(s * 0.5, -0.3, upper)
        b.plain(capsule(u, v, s * 0.04, -0.6, s * 0.24, -0.92, 0.03), INK, outline=False)
    b.plain(capsule(u, v, 0, -0.4, 0, 0.6, 0.1), (0.25, 0.2, 0.22))
    b.plain(ellipse(u, v, 0, -0.5, 0.17, 0.16), (0.3, 0.24, 0.26))
    b.eye(-0.07, -0.52, 0.06)
    b.eye(0.07, -0.52, 0.06)


def teapot(b: Brush) -> None:
    u, v, p = b.u, b.v, b.look.part
    b.trim(ring(u, v, -0.62, 0.15, 0.26 + 0.08 * p, 0.32, 0.13))
    b.trim(polygon(u, v, (0.4, 0.45), (0.92, -0.35), (0.74, -0.35), (0.4, 0.0)))
    body = ellipse(u, v, 0, 0.25, 0.62, 0.56)
    b.body(body)
    b.mark(0, 0.3, body)
    b.trim(np.maximum(ellipse(u, v, 0, -0.22, 0.38, 0.24), v + 0.2))
    b.trim(ellipse(u, v, 0, -0.52, 0.1, 0.1))
    b.trim(box(u, v, 0, 0.8, 0.36, 0.07, 0.05))


def vase(b: Brush) -> None:
    u, v, p = b.u, b.v, b.look.part
    for x, y in ((-0.25, -0.78), (0.0, -0.92), (0.25, -0.75)):
        b.plain(capsule(u, v, x * 0.4, -0.3, x, y + 0.1, 0.03), (0.2, 0.55, 0.2), outline=False)
        b.trim(ellipse(u, v, x, y + 0.06, 0.15, 0.13))
    neck = box(u, v, 0, -0.2, 0.18 + 0.14 * p, 0.25, 0.05)
    body = np.minimum(ellipse(u, v, 0, 0.4, 0.52, 0.5), neck)
    b.body(body)
    b.mark(0, 0.4, body)
    b.trim(box(u, v, 0, -0.4, 0.26 + 0.16 * p, 0.06, 0.05))
    b.trim(box(u, v, 0, 0.88, 0.3, 0.06, 0.04))


def clock(b: Brush) -> None:
    u, v, p = b.u, b.v, b.look.part
    for s in (-1, 1):
        b.trim(ellipse(u, v, s * 0.45, -0.66, 0.25, 0.2))
        b.trim(capsule(u, v, s * 0.4, 0.6, s * 0.58, 0.9, 0.08))
    body = ellipse(u, v, 0, 0.08, 0.76, 0.74)
    b.body(body)
    b.plain(ellipse(u, v, 0, 0.08, 0.5, 0.48), WHITE)
    angle = 2 * np.pi * p
    b.plain(capsule(u, v, 0, 0.08, 0.33 * np.sin(angle), 0.08 - 0.33 * np.cos(angle), 0.045), INK, outline=False)
    b.plain(capsule(u, v, 0, 0.08, 0.22, 0.08, 0.055), b.look.marking_tint.rgb, outline=False)


def boot(b: Brush) -> None:
    u, v, p = b.u, b.v, b.look.part
    shaft = box(u, v, -0.2, -0.1 - 0.1 * p, 0.36, 0.72, 0.1)
    foot = np.maximum(ellipse(u, v, 0.22, 0.66, 0.74, 0.46), v - 0.7)
    body = np.minimum(shaft, foot)
    b.body(body)
    b.mark(-0.1, 0.1, body)
    b.trim(box(u, v, -0.2, -0.78 - 0.08 * p, 0.42, 0.13, 0.06))
    b.trim(box(u, v, 0.18, 0.8, 0.8, 0.12, 0.06))


def car(b: Brush) -> None:
    u, v, p = b.u, b.v, b.look.part
    cabin = polygon(u, v, (-0.5, -0.05), (-0.32, -0.5), (0.3, -0.5), (0.52, -0.05), round_=0.05)
    body = np.minimum(cabin, box(u, v, 0, 0.2, 0.93, 0.3, 0.16))
    b.body(body)
    b.mark(-0.1, 0.2, body)
    for x in (-0.22, 0.2):
        b.plain(box(u, v, x, -0.22, 0.17, 0.17, 0.05), (0.75, 0.9, 0.98))
    r = 0.2 + 0.09 * p
    for x in (-0.52, 0.52):
        b.plain(ellipse(u, v, x, 0.52, r, r), (0.15, 0.15, 0.17))
        b.trim(ellipse(u, v, x, 0.52, r * 0.5, r * 0.5))
    b.plain(ellipse(u, v, 0.86, 0.15, 0.08, 0.1), (1.0, 0.95, 0.6))


def backpack(b: Brush) -> None:
    u, v, p = b.u, b.v, b.look.part
    b.trim(ring(u, v, 0, -0.75, 0.2, 0.2, 0.1))
    for s in (-1, 1):
        b.trim(box(u, v, s * 0.68, 0.25, 0.14, 0.38, 0.1))
    body = box(u, v, 0, 0.1, 0.62, 0.8, 0.34)
    b.body(body)
    b.mark(0, -0.3, body)
    b.trim(box(u, v, 0, 0.45, 0.4, 0.2 + 0.12 * p, 0.1))
    b.plain(box(u, v, 0, 0.38 - 0.1 * p, 0.3, 0.035), INK, outline=False)


def mug(b: Brush) -> None:
    u, v, p = b.u, b.v, b.look.part
    b.trim(ring(u, v, 0.55, 0.08, 0.3, 0.26 + 0.14 * p, 0.15))
    body = box(u, v, -0.12, 0.1, 0.58, 0.72, 0.12)
    b.body(body)
    b.mark(-0.12, 0.2, body)
    b.trim(ellipse(u, v, -0.12, -0.58, 0.58, 0.17))
    b.plain(ellipse(u, v, -0.12, -0.56, 0.44, 0.1), (0.32, 0.18, 0.1))


def robot(b: Brush) -> None:
    u, v, p = b.u, b.v, b.look.part
    b.plain(capsule(u, v, 0, -0.6, 0, -0.88, 0.04), (0.4, 0.4, 0.45))
    b.trim(ellipse(u, v, 0, -0.9, 0.09, 0.09))
    for s in (-1, 1):
        b.trim(capsule(u, v, s * 0.5, 0.05, s * 0.78, 0.38 - 0.5 * p, 0.1))
        b.trim(box(u, v, s * 0.24, 0.8, 0.17, 0.18, 0.05))
    body = box(u, v, 0, 0.28, 0.5, 0.4, 0.08)
    b.body(body)
    b.mark(0, 0.3, body)
    b.body(box(u, v, 0, -0.4, 0.42, 0.28, 0.08))
    for s in (-1, 1):
        b.plain(ellipse(u, v, s * 0.18, -0.44, 0.11, 0.11), (0.98, 0.95, 0.5))
    b.plain(box(u, v, 0, -0.22, 0.2, 0.035), INK, outline=False)


def umbrella(b: Brush) -> None:
    u, v, p = b.u, b.v, b.look.part
    b.plain(capsule(u, v, 0, -0.3, 0, 0.75, 0.05), (0.45, 0.3, 0.2))
    hook = np.maximum(ring(u, v, 0.16, 0.75, 0.16, 0.16, 0.1), 0.75 - v)
    b.plain(hook, (0.45, 0.3, 0.2))
    top = np.maximum(ellipse(u, v, 0, 0.02, 0.93, 0.75 + 0.12 * p), v - 0.02)
    b.body(top)
    b.mark(0, -0.3, top)
    for x in (-0.62, 0.0, 0.62):
        b.trim(np.maximum(ellipse(u, v, x, 0.02, 0.31, 0.12), v - 0.04))
    b.trim(ellipse(u, v, 0, -0.8 - 0.08 * p, 0.08, 0.08))


def lamp(b: Brush) -> None:
    u, v, p = b.u, b.v, b.look.part
    b.trim(ellipse(u, v, 0, 0.84, 0.42, 0.12))
    b.trim(capsule(u, v, 0, 0.05, 0, 0.8, 0.07 + 0.09 * p))
    shade = polygon(u, v, (-0.34 - 0.1 * p, -0.85), (0.34 + 0.1 * p, -0.85), (0.74, 0.1), (-0.74, 0.1), round_=0.02)
    b.body(shade)
    b.mark(0, -0.3, shade)
    b.plain(box(u, v, 0, 0.1, 0.74, 0.045), (1.0, 0.93, 0.6))


@dataclass(frozen=True)
class Anchors:
    """Positions of accessories, in the kind's coordinates."""

    head: tuple[float, float]
    top: float
    """v of the crown of the head"""
    width: float
    """half width of the head"""
    eyes: float
    """v of the eyes"""
    neck: tuple[float, float]


@dataclass(frozen=True)
class Kind:
    name: str
    draw: Callable[[Brush], None]
    anchors: Anchors | None = None

    @property
    def live(self) -> bool:
        return self.anchors is not None


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("cat", cat, Anchors((0.0, -0.28), -0.66, 0.46, -0.3, (0.0, 0.12))),
        Kind("dog", dog, Anchors((0.55, -0.3), -0.62, 0.38, -0.38, (0.42, 0.06))),
        Kind("fish", fish, Anchors((0.45, 0.0), -0.42, 0.36, -0.12, (0.3, 0.3))),
        Kind("bird", bird, Anchors((0.38, -0.4), -0.7, 0.34, -0.47, (0.3, -0.08))),
        Kind("turtle", turtle, Anchors((0.76, -0.2), -0.4, 0.24, -0.22, (0.62, 0.1))),
        Kind("butterfly", butterfly, Anchors((0.0, -0.5), -0.64, 0.2, -0.52, (0.0, -0.3))),
        Kind("teapot", teapot),
        Kind("vase", vase),
        Kind("clock", clock),
        Kind("boot", boot),
        Kind("car", car),
        Kind("backpack", backpack),
        Kind("mug", mug),
        Kind("robot", robot),
        Kind("umbrella", umbrella),
        Kind("lamp", lamp),
    )
}
LIVE = tuple(name for name, kind in KINDS.items() if kind.live)
OBJECTS = tuple(name for name, kind in KINDS.items() if not kind.live)


def _wear(b: Brush, anchors: Anchors, what: str) -> None:
    u, v, (x, _y), w = b.u, b.v, anchors.head, max(anchors.width, 0.3)
    top = anchors.top
    if what == "a red hat":
        b.plain(np.maximum(ellipse(u, v, x, top + 0.06, w * 0.85, w * 0.8), v - top - 0.06), (0.86, 0.1, 0.12))
        b.plain(box(u, v, x + 0.12, top + 0.08, w * 1.15, 0.07, 0.05), (0.7, 0.05, 0.08))
    elif what == "a black top hat":
        b.plain(box(u, v, x, top - w * 0.45, w * 0.62, w * 0.62, 0.03), (0.1, 0.1, 0.12))
        b.plain(box(u, v, x, top - w * 0.05, w * 0.63, 0.06), (0.8, 0.2, 0.25), outline=False)
        b.plain(box(u, v, x, top + 0.1, w * 1.15, 0.07, 0.05), (0.1, 0.1, 0.12))
    elif what == "a yellow crown":
        base = box(u, v, x, top - 0.02, w * 0.75, 0.13)
        spikes = []
        for s in (-1, 0, 1):
            middle = x + s * w * 0.5
            spikes.append(
                polygon(u, v, (middle - w * 0.26, top - 0.1), (middle, top - 0.5), (middle + w * 0.26, top - 0.1))
            )
        b.plain(np.minimum.reduce([base, *spikes]), (1.0, 0.85, 0.1))
    elif what == "pink glasses":
        for s in (-1, 1):
            b.plain(ring(u, v, x + s * w * 0.5, anchors.eyes, w * 0.42, w * 0.4, 0.1), (1.0, 0.35, 0.7))
        b.plain(capsule(u, v, x - w * 0.1, anchors.eyes, x + w * 0.1, anchors.eyes, 0.05), (1.0, 0.35, 0.7))
    elif what == "a blue scarf":
        nx, ny = anchors.neck
        b.plain(box(u, v, nx, ny, w * 0.85, 0.11, 0.1), (0.15, 0.35, 0.95))
        b.plain(box(u, v, nx - w * 0.35, ny + 0.27, 0.11, 0.22, 0.05), (0.15, 0.35, 0.95))
    else:
        raise ValueError(f"accessory {what!r} is unknown; allowed: {', '.join(ACCESSORIES)}")


ACCESSORIES = ("a red hat", "a black top hat", "a yellow crown", "pink glasses", "a blue scarf")
PROPERTIES = ("red", "purple", "shiny", "wet", "upside down")
DROPS = (
    (-0.45, -0.05), (0.4, 0.3), (0.0, 0.6), (0.15, -0.3), (-0.75, 0.7), (0.85, 0.75), (-0.6, -0.7), (0.75, -0.65),
)  # fmt: skip
"""Positions of the drops on wet subjects."""


def draw(b: Brush, kind: Kind, accessory: str | None, shiny: bool, wet: bool) -> np.ndarray:
    """Draw a subject and return the coverage of its body without accessories, (H, W) float32."""
    kind.draw(b)
    own = b.canvas.coverage.copy()
    if shiny:  # two slanted highlights
        gleam = np.minimum(
            capsule(b.u, b.v, -0.42, 0.15, 0.05, -0.5, 0.09), capsule(b.u, b.v, -0.12, 0.4, 0.42, -0.34, 0.05)
        )
        b.canvas.blend(b.canvas.alpha(gleam) * own * 0.95, (1, 1, 1), covers=False)
    if wet:
        for x, y in DROPS:
            b.plain(ellipse(b.u, b.v, x, y, 0.1, 0.14), (0.55, 0.85, 1.0), outline=True)
    if accessory is not None:
        if kind.anchors is None:
            raise ValueError(f"a {kind.name} is an object and wears nothing; live kinds: {', '.join(LIVE)}")
        _wear(b, kind.anchors, accessory)
    return own
