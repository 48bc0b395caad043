"""The six kinds that live: `body` is painted with the subject's pattern, `trim` with its second colour."""

import numpy as np

from kosmosg.toyland.brush import INK, Brush
from kosmosg.toyland.shapes import box, capsule, ellipse, polygon


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
