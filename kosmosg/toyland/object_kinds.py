"""The ten kinds that are objects: `body` is painted with the subject's pattern, `trim` with its second colour."""

import numpy as np

from kosmosg.toyland.brush import INK, WHITE, Brush
from kosmosg.toyland.shapes import box, capsule, ellipse, polygon, ring


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
