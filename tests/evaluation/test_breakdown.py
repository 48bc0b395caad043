"""Near copies, parts of a mean, and the curve over guidance scales."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from evaluation.config import Curve
from evaluation.images.systems import AFTER_STAGE_3, BEFORE_STAGE_3
from evaluation.plan import protocol_at
from evaluation.protocols.dreambench import NEAR_COPY, DreamBench
from evaluation.protocols.protocol import DreamBenchProtocol, identity
from evaluation.protocols.requests import Item
from evaluation.reports.breakdown import Part, breakdown, markdown, sections, shown_system
from evaluation.reports.guidance import charts, points_of
from evaluation.reports.guidance import markdown as guidance_markdown
from evaluation.scores.bootstrap import Bootstrap
from evaluation.scores.metric import Context
from evaluation.scores.results import Score
from evaluation.scores.scoring import Sample, Scorer

BOOTSTRAP = Bootstrap(replicates=200)
PROTOCOL = DreamBenchProtocol(name="dreambench/tiny", facts="dreambench.json", images_per_prompt=2)


def test_near_copies_are_those_of_the_input(tmp_path: Path) -> None:
    """Whatever the references are: the given image alone says what a copy is."""
    given, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    cosines = {"a": NEAR_COPY + 0.001, "b": NEAR_COPY - 0.001, "c": 1.0, "d": -1.0}
    known = {tmp_path / name: normalize(c * given + (1 - c * c) ** 0.5 * other, dim=0) for name, c in cosines.items()}
    known |= {tmp_path / "given": given, tmp_path / "other": other}
    images = [
        Item(tmp_path / name, subject, "", (tmp_path / "other",), given=tmp_path / "given")
        for name, subject in zip("abcd", ("dog", "dog", "dog", "cat"), strict=True)
    ]
    images.append(Item(tmp_path / "other", "cat", "", (tmp_path / "given",)))  # a photo: nothing was given

    def features(items) -> torch.Tensor:
        return torch.stack([known[item] for item in items])

    scores, samples = Scorer("dreambench", "p@1#0", Context({"dino": features}, BOOTSTRAP))("System", images)
    (rate,) = [score for score in scores if score.metric == "near_copies"]
    assert rate.value == 0.5 and rate.n == 4 and rate.low <= 0.5 <= rate.high
    assert [s.score for s in samples if s.metric == "near_copies"] == [1, 0, 1, 0]


def test_images_know_template_and_input(dreambench_folder: Path) -> None:
    dataset = DreamBench(replace(PROTOCOL, max_templates=2), dreambench_folder)
    found = [dataset.item(request, Path("x")) for request in dataset.requests()]
    assert [image.group for image in found[:4]] == ["a {} in the snow"] * 2 + ["a {} wearing a hat"] * 2
    assert [image.group for image in found[8:]] == ["a {} in the snow"] * 2 + ["a {} on the beach"] * 2
    assert {image.unit: image.given.name for image in found if image.given} == {
        "fish": "01.png",
        "dog": "00.png",
        "boat": "00.png",
    }
    every = DreamBench(replace(PROTOCOL, references="all"), dreambench_folder)
    photos = {(image.unit, image.file.name): image.given for image in every.other_real_images()}
    assert photos["fish", "01.png"] is None, "the kept image is no copy of itself"
    assert photos["fish", "00.png"] == dreambench_folder / "fish" / "01.png"


def samples_of(system: str = AFTER_STAGE_3) -> list[Sample]:
    """DINO: 0.2 of the cat, 0.4 and 0.8 of the dog, 0.6 of the boat; CLIP-T is 1 - DINO."""
    rows = [("cat", "red", 0.2), ("dog", "red", 0.4), ("dog", "wet", 0.8), ("boat", "wet", 0.6), ("cat", "wet", 0.2)]
    return [
        Sample("dreambench", system, metric, unit, f"{i}.png", "r", value, template)
        for i, (unit, template, dino) in enumerate(rows)
        for metric, value in (("dino", dino), ("clip_t", 1 - dino))
    ]


KINDS = {"cat": "live", "dog": "live", "boat": "object"}


class Told:
    """Stands for the benchmark: photos answer no prompts, captions have no subject."""

    def parts(self, unit: str, group: str) -> dict[str, tuple[str, str]]:
        return {"kind": (KINDS[unit], unit), "subject": (unit, group), "template": (group, unit)} if group else {}


def parts_of(samples: list[Sample]) -> list[Part]:
    return breakdown(samples, {"dreambench": Told(), "coco": Told()}, BOOTSTRAP)  # type: ignore[dict-item]


def test_parts_are_means_the_worst_first() -> None:
    photos = [Sample("dreambench", "Real images", "dino", "cat", "a", "b", 1.0)]
    captions = [Sample("coco", AFTER_STAGE_3, "clip_t", "0", "a", "b", 1.0)]
    parts = parts_of([*samples_of(), *photos, *captions])
    assert {part.system for part in parts} == {AFTER_STAGE_3}, "photos answer no prompts, captions have no subject"
    means = {(part.by, part.part, part.metric): (part.value, part.n) for part in parts}
    assert means["subject", "dog", "dino"] == (pytest.approx(0.6), 2)
    assert means["template", "wet", "clip_t"] == (pytest.approx(1.4 / 3), 3)
    assert means["kind", "live", "dino"] == (pytest.approx(0.4), 4)
    order = {section.by: [name for name, _, _ in section.rows] for section in sections(parts)}
    assert order == {"kind": ["live", "object"], "subject": ["cat", "boat", "dog"], "template": ["wet", "red"]}


def test_intervals_are_over_units() -> None:
    """A kind's over its subjects; a subject's over its templates; none where there is one."""
    parts = {(part.by, part.part): part for part in parts_of(samples_of()) if part.metric == "dino"}
    live, dog, boat = parts["kind", "live"], parts["subject", "dog"], parts["subject", "boat"]
    assert (live.low, live.high) == pytest.approx((0.2, 0.6)) and live.units == 2
    assert (dog.low, dog.high) == pytest.approx((0.4, 0.8)) and dog.units == 2
    assert replace(dog, value=-0.1, low=-0.2, high=0.05).text() == "−0.100 (−0.200 … 0.050)"
    assert boat.units == 1 and boat.text() == "0.600" and dog.text() == "0.600 (0.400–0.800)"


def test_results_show_the_last_model() -> None:
    parts = parts_of([*samples_of(BEFORE_STAGE_3), *samples_of()])
    assert shown_system([AFTER_STAGE_3, "Theirs"]) == AFTER_STAGE_3 and shown_system([BEFORE_STAGE_3]) == BEFORE_STAGE_3
    text = "\n".join(markdown(parts))
    assert text.count("| live |") == 2 and text.index("| cat |") < text.index("| dog |") < text.index("| wet |")
    assert markdown([]) == [] and shown_system([]) is None


def point(system: str, scale: float, dino: float, clip_t: float) -> list[Score]:
    values = {"dino": dino, "clip_i": dino, "clip_t": clip_t, "near_copies": 0.0}
    protocol = f"p@1#{scale:g}"
    return [
        Score("guidance", system, metric, value, value - 0.05, value + 0.05, 30, protocol, guidance_scale=scale)
        for metric, value in values.items()
    ]


SCORES = [
    *point(AFTER_STAGE_3, 7.5, 0.7, 0.28),
    *point(AFTER_STAGE_3, 1.5, 0.5, 0.30),
    *point("A <rival>", 7.5, 0.6, 0.31),
    Score("dreambench", AFTER_STAGE_3, "dino", 0.7, 0.6, 0.8, 30, "p@1#0"),
]


def test_points_are_in_the_order_of_scales() -> None:
    points = points_of(SCORES)
    assert [(system, [scale for scale, _ in line]) for system, line in points.items()] == [
        (AFTER_STAGE_3, [1.5, 7.5]),
        ("A <rival>", [7.5]),
    ]
    text = "\n".join(guidance_markdown(SCORES))
    assert f"| {AFTER_STAGE_3} | 1.5 | 0.500 (0.450–0.550) |" in text and "`p@1#7.5`" in text
    assert guidance_markdown(SCORES[-1:]) == [] and charts(SCORES[-1:]) == []


def test_a_point_is_a_protocol_of_its_own() -> None:
    curve = Curve(guidance_scales=[3.0], max_subjects=5, images_per_prompt=1)
    at = protocol_at(PROTOCOL, curve, 3.0)
    assert (at.sampling.guidance_scale, at.max_subjects, at.max_templates, at.images_per_prompt) == (3.0, 5, None, 1)
    assert identity(at) != identity(PROTOCOL)
    same = protocol_at(PROTOCOL, Curve(guidance_scales=[7.5]), PROTOCOL.sampling.guidance_scale)
    assert identity(same) == identity(PROTOCOL)
