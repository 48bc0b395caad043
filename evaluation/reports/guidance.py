"""Fidelity against editability over guidance scales: what a model gains in one it tends to lose in the other.

A table has one point of each model's curve, the protocol's own scale. Here are more: the same requests, or fewer, made
again at other scales, each point under a protocol (and fingerprint) of its own.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import replace

from evaluation.config import Curve
from evaluation.images.systems import AFTER_STAGE_3, TABLE_ORDER
from evaluation.protocols.protocol import DreamBenchProtocol
from evaluation.scores.results import METRICS, Score, markdown_table

TABLE = "guidance"
FIDELITY, EDITABILITY = ("dino", "clip_i"), "clip_t"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM, LEGEND = 560, 360, 58, 18, 8, 44, 17  # pixels; the legend adds its lines
TICKS = 5
COLORS = ("#7b8494", "#2563a8", "#4d7c0f", "#7c3aed", "#0f766e", "#a16207")
ACCENT, INK, SOFT, LINE = "#c2410c", "#1c2026", "#69707c", "#e3e6ea"
Points = dict[str, list[tuple[float, dict[str, Score]]]]


def protocol_at(protocol: DreamBenchProtocol, curve: Curve, scale: float) -> DreamBenchProtocol:
    """The protocol with another guidance scale, and with fewer requests where `curve` says so."""
    return replace(
        protocol,
        sampling=replace(protocol.sampling, guidance_scale=scale),
        images_per_prompt=curve.images_per_prompt or protocol.images_per_prompt,
        max_subjects=curve.max_subjects or protocol.max_subjects,
        max_templates=curve.max_templates or protocol.max_templates,
    )


def points_of(scores: Sequence[Score]) -> Points:
    """(scale, scores by metric) of each system, by scale; systems in the order of the table."""
    found: dict[str, dict[float, dict[str, Score]]] = {}
    for score in scores:
        if score.table == TABLE and score.guidance_scale is not None:
            found.setdefault(score.system, {}).setdefault(score.guidance_scale, {})[score.metric] = score
    order = {name: place for place, name in enumerate(TABLE_ORDER)}
    return {name: sorted(found[name].items()) for name in sorted(found, key=lambda name: order.get(name, len(order)))}


def markdown(scores: Sequence[Score]) -> list[str]:
    """The section of results.md; nothing without a curve."""
    points = points_of(scores)
    if not points:
        return []
    metrics = (*FIDELITY, EDITABILITY, "near_copies")
    rows = [
        [system, f"{scale:g}", *(found[m].text() if m in found else "–" for m in metrics), str(found[EDITABILITY].n)]
        for system, line in points.items()
        for scale, found in line
    ]
    protocols = dict.fromkeys(
        score.protocol for line in points.values() for _, found in line for score in found.values()
    )
    header = ["System", "Guidance", *(METRICS[metric] for metric in metrics), "n"]
    return [
        "## Over guidance scales",
        "",
        "Protocols " + ", ".join(f"`{protocol}`" for protocol in protocols) + ".",
        "",
        *markdown_table(header, rows),
    ]


def charts(scores: Sequence[Score]) -> list[tuple[str, str]]:
    """(fidelity metric, SVG) of DINO and CLIP-I against CLIP-T; none without a curve."""
    points = points_of(scores)
    return [(metric, chart(points, metric)) for metric in FIDELITY] if points else []


def chart(points: Points, fidelity: str) -> str:
    """One line for each system through its scales, with the intervals of both metrics, as an SVG document."""
    lines = {
        system: [(scale, found[EDITABILITY], found[fidelity]) for scale, found in line]
        for system, line in points.items()
    }
    shown = [point for line in lines.values() for point in line]
    top = TOP + LEGEND * len(lines)
    height = HEIGHT + LEGEND * len(lines)
    across = Axis([point[1] for point in shown], LEFT, WIDTH - RIGHT)
    upward = Axis([point[2] for point in shown], height - BOTTOM, top)
    parts = [*across.lines_up(upward), *upward.lines_across(across)]
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, height - 8, METRICS[EDITABILITY].replace("↑", "→"), SOFT))
    middle = (top + height - BOTTOM) / 2
    parts.append(text(14, middle, METRICS[fidelity].replace("↑", "→"), SOFT, turn=f"rotate(-90 14 {middle:.1f})"))
    for number, (system, line) in enumerate(lines.items()):
        color = ACCENT if system == AFTER_STAGE_3 else COLORS[number % len(COLORS)]
        parts += draw_line(line, across, upward, color)
        parts.append(f'<circle cx="{LEFT + 6}" cy="{TOP + LEGEND * number}" r="4" fill="{color}"/>')
        parts.append(text(LEFT + 16, TOP + 4 + LEGEND * number, system, INK, anchor="start"))
    label = f"{METRICS[fidelity][:-2]} against {METRICS[EDITABILITY][:-2]} over guidance scales"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{label}" font-family="system-ui, DejaVu Sans, sans-serif">' + "".join(parts) + "</svg>"
    )


class Axis:
    """Values between the ends of all intervals, on pixels from `start` to `end`."""

    def __init__(self, scores: Sequence[Score], start: float, end: float):
        low, high = min(score.low for score in scores), max(score.high for score in scores)
        margin = (high - low) * 0.08 or 0.01
        self.low, self.high, self.start, self.end = low - margin, high + margin, start, end

    def __call__(self, value: float) -> float:
        return self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """About `TICKS` round values."""
        rough = (self.high - self.low) / TICKS
        unit = 10 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
        first = math.ceil(self.low / step)
        return [step * number for number in range(first, math.floor(self.high / step) + 1)]

    def lines_up(self, upward: "Axis") -> list[str]:
        """Lines at the ticks of the horizontal axis, with their values below."""
        parts = []
        for tick in self.ticks():
            at = self(tick)
            parts.append(f'<path d="M{at:.1f},{upward.end} V{upward.start}" stroke="{LINE}"/>')
            parts.append(text(at, upward.start + 16, short(tick), SOFT))
        return parts

    def lines_across(self, across: "Axis") -> list[str]:
        """Lines at the ticks of the vertical axis, with their values at the left."""
        parts = []
        for tick in self.ticks():
            at = self(tick)
            parts.append(f'<path d="M{across.start},{at:.1f} H{across.end}" stroke="{LINE}"/>')
            parts.append(text(across.start - 6, at + 4, short(tick), SOFT, anchor="end"))
        return parts


def short(value: float) -> str:
    """`0.25`, `−0.1`, `0`."""
    return f"{round(value, 3) + 0.0:.3f}".rstrip("0").rstrip(".").replace("-", "−")


def draw_line(line: Sequence[tuple[float, Score, Score]], across: Axis, upward: Axis, color: str) -> list[str]:
    """A system's points, joined, with crosses of both intervals and their scales beside them."""
    places = [(across(told.value), upward(kept.value)) for _, told, kept in line]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"/>']
    for (scale, told, kept), (x, y) in zip(line, places, strict=True):
        cross = f"M{across(told.low):.1f},{y:.1f} H{across(told.high):.1f} M{x:.1f},{upward(kept.low):.1f} "
        cross += f"V{upward(kept.high):.1f}"
        parts.append(f'<path d="{cross}" stroke="{color}" stroke-opacity=".35"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>')
        parts.append(text(x + 7, y - 6, f"{scale:g}", color, anchor="start"))
    return parts


def text(x: float, y: float, words: str, color: str, anchor: str = "middle", turn: str = "") -> str:
    turned = f' transform="{turn}"' if turn else ""
    place = f'x="{x:.1f}" y="{y:.1f}"'
    return f'<text {place} font-size="11.5" fill="{color}" text-anchor="{anchor}"{turned}>{html.escape(words)}</text>'
