"""The sixteen kinds of subject, six of them live, what they can wear, and how one is drawn.

A drawing is a function of a `Brush`; `anchors` of live kinds say where a hat, glasses or a scarf sit.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kosmosg.toyland.brush import Brush
from kosmosg.toyland.live_kinds import bird, butterfly, cat, dog, fish, turtle
from kosmosg.toyland.object_kinds import backpack, boot, car, clock, lamp, mug, robot, teapot, umbrella, vase
from kosmosg.toyland.shapes import box, capsule, ellipse, polygon, ring


@dataclass(frozen=True)
class Anchors:
    """Where things are worn, in the kind's own square."""

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
        spikes = [
            polygon(
                u,
                v,
                (x + s * w * 0.5 - w * 0.26, top - 0.1),
                (x + s * w * 0.5, top - 0.5),
                (x + s * w * 0.5 + w * 0.26, top - 0.1),
            )
            for s in (-1, 0, 1)
        ]
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


def draw(b: Brush, kind: Kind, accessory: str | None, shiny: bool, wet: bool) -> np.ndarray:
    """Draw a subject and return the coverage of its own body, without what it wears: the exact mask, (H, W) float32."""
    kind.draw(b)
    own = b.canvas.coverage.copy()
    if shiny:  # two slanted gleams, as a glossy surface shows
        gleam = np.minimum(
            capsule(b.u, b.v, -0.42, 0.15, 0.05, -0.5, 0.09), capsule(b.u, b.v, -0.12, 0.4, 0.42, -0.34, 0.05)
        )
        b.canvas.blend(b.canvas.alpha(gleam) * own * 0.95, (1, 1, 1), covers=False)
    if wet:
        for x, y in (
            (-0.45, -0.05),
            (0.4, 0.3),
            (0.0, 0.6),
            (0.15, -0.3),
            (-0.75, 0.7),
            (0.85, 0.75),
            (-0.6, -0.7),
            (0.75, -0.65),
        ):
            b.plain(ellipse(b.u, b.v, x, y, 0.1, 0.14), (0.55, 0.85, 1.0), outline=True)
    if accessory is not None:
        if kind.anchors is None:
            raise ValueError(f"a {kind.name} is an object and wears nothing; live kinds: {', '.join(LIVE)}")
        _wear(b, kind.anchors, accessory)
    return own
