"""What a subject is drawn with: its square [-1, 1]² of the canvas (v points down) and pens that know its colours."""

from dataclasses import dataclass

import numpy as np

from kosmosg.toyland.looks import Look
from kosmosg.toyland.shapes import Canvas, Field, box, ellipse

INK = (0.1, 0.08, 0.1)
WHITE = (0.97, 0.97, 0.97)


@dataclass
class Brush:
    """The canvas seen from one subject: its coordinates, its look, and pens that know its colours."""

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
        """The subject's own marking, clipped to the shape whose distance is `within`."""
        look = self.look
        if look.marking == "disc":
            shape = ellipse(self.u, self.v, x + look.marking_x, y, 0.17, 0.17)
        elif look.marking == "bar":
            shape = box(self.u, self.v, x, y + look.marking_x * 0.6, 2.0, 0.085)
        else:
            return
        self.canvas.fill(np.maximum(shape, within + 0.01), look.marking_tint.rgb)
