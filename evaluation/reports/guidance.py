"""Fidelity against editability over guidance scales: what a model gains in one it tends to lose in the other.

A table has one point of each model's curve, the protocol's own scale. Here are more: the same requests, or fewer, made
again at other scales, each point under a protocol (and fingerprint) of its own.
"""

from collections.abc import Sequence

from evaluation.benchmarks import GUIDANCE, metric
from evaluation.images.systems import AFTER_STAGE_3
from evaluation.reports.plots import Point, chart
from evaluation.scores.results import Score, headings, markdown_table, place

FIDELITY, EDITABILITY = ("dino", "clip_i"), "clip_t"
Points = dict[str, list[tuple[float, dict[str, Score]]]]


def points_of(scores: Sequence[Score]) -> Points:
    """(scale, scores by metric) of each system, by scale; systems in the order of the table."""
    found: dict[str, dict[float, dict[str, Score]]] = {}
    for score in scores:
        if score.table == GUIDANCE and score.guidance_scale is not None:
            found.setdefault(score.system, {}).setdefault(score.guidance_scale, {})[score.metric] = score
    return {name: sorted(found[name].items()) for name in sorted(found, key=place)}


def markdown(scores: Sequence[Score]) -> list[str]:
    """The section of results.md; nothing without a curve."""
    points = points_of(scores)
    if not points:
        return []
    metrics = [metric(name) for name in (*FIDELITY, EDITABILITY, "near_copies")]
    rows = [
        [
            system,
            f"{scale:g}",
            *(found[m.name].text() if m.name in found else "–" for m in metrics),
            str(found[EDITABILITY].n),
        ]
        for system, line in points.items()
        for scale, found in line
    ]
    protocols = dict.fromkeys(score.protocol for line in points.values() for _, row in line for score in row.values())
    return [
        "## Over guidance scales",
        "",
        "Protocols " + ", ".join(f"`{protocol}`" for protocol in protocols) + ".",
        "",
        *markdown_table(["System", "Guidance", *headings(metrics), "n"], rows),
    ]


def charts(scores: Sequence[Score]) -> list[tuple[str, str]]:
    """(fidelity metric, SVG) of DINO and CLIP-I against CLIP-T; none without a curve."""
    points = points_of(scores)
    if not points:
        return []

    def triple(score: Score) -> tuple[float, float, float]:
        return score.value, score.low, score.high

    return [
        (
            name,
            chart(
                {
                    system: [Point(triple(row[EDITABILITY]), triple(row[name]), f"{scale:g}") for scale, row in line]
                    for system, line in points.items()
                },
                f"{metric(EDITABILITY).title} →",
                f"{metric(name).title} →",
                AFTER_STAGE_3,
            ),
        )
        for name in FIDELITY
    ]
