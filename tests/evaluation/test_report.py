"""What results.md and the report say follows the scores: near copies, parts of a mean, the curve, findings."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from evaluation.config import Curve
from evaluation.images.systems import AFTER_STAGE_3, BEFORE_STAGE_3, REAL_IMAGES
from evaluation.plan import protocol_at
from evaluation.protocols.benchmark import Item
from evaluation.protocols.dreambench import NEAR_COPY, DreamBench
from evaluation.protocols.protocol import DreamBenchProtocol, identity
from evaluation.reports.breakdown import breakdown, part_text, sections, shown_system
from evaluation.reports.plots import guidance_charts, loss_charts, read_losses
from evaluation.reports.report import findings
from evaluation.reports.tables import points_of, results_markdown
from evaluation.scores.bootstrap import Bootstrap
from evaluation.scores.metric import Context
from evaluation.scores.results import Sample, Score, read_results, score_images, table_rows, write_results

BOOTSTRAP = Bootstrap(replicates=200)
NO_PARTS = breakdown([], BOOTSTRAP)
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

    scores, samples = score_images("dreambench", "p@1#0", Context({"dino": features}, BOOTSTRAP), "System", images)
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


KINDS = {"cat": "live", "dog": "live", "boat": "object"}


def samples_of(system: str = AFTER_STAGE_3) -> list[Sample]:
    """DINO: 0.2 of the cat, 0.4 and 0.8 of the dog, 0.6 of the boat; CLIP-T is 1 - DINO."""
    rows = [("cat", "red", 0.2), ("dog", "red", 0.4), ("dog", "wet", 0.8), ("boat", "wet", 0.6), ("cat", "wet", 0.2)]
    return [
        Sample("dreambench", system, metric, Item(Path(), unit, "", parts=parts), "r", value)
        for unit, word, dino in rows
        for parts in [{"kind": (KINDS[unit], unit), "subject": (unit, word), "template": (word, unit)}]
        for metric, value in (("dino", dino), ("clip_t", 1 - dino))
    ]


PHOTO = Sample("dreambench", "Real images", "dino", Item(Path(), "cat", ""), "b", 1.0)


def test_parts_are_means_the_worst_first() -> None:
    parts = breakdown([*samples_of(), PHOTO], BOOTSTRAP)
    assert set(parts["system"]) == {AFTER_STAGE_3}, "photos answer no prompts"
    means = parts.set_index(["by", "part", "metric"])
    assert tuple(means.loc["subject", "dog", "dino"][["value", "n"]]) == (pytest.approx(0.6), 2)
    assert tuple(means.loc["template", "wet", "clip_t"][["value", "n"]]) == (pytest.approx(1.4 / 3), 3)
    assert tuple(means.loc["kind", "live", "dino"][["value", "n"]]) == (pytest.approx(0.4), 4)
    order = {section.by: list(section.rows.iloc[:, 0]) for section in sections(parts)}
    assert order == {"kind": ["live", "object"], "subject": ["cat", "boat", "dog"], "template": ["wet", "red"]}
    assert sections(breakdown([PHOTO], BOOTSTRAP)) == []


def test_intervals_are_over_units() -> None:
    """A kind's over its subjects; a subject's over its templates; none where there is one."""
    rows = breakdown(samples_of(), BOOTSTRAP).query("metric == 'dino'").to_dict(orient="records")
    parts = {(row["by"], row["part"]): row for row in rows}
    live, dog, boat = parts["kind", "live"], parts["subject", "dog"], parts["subject", "boat"]
    assert (live["low"], live["high"]) == pytest.approx((0.2, 0.6)) and live["units"] == 2
    assert (dog["low"], dog["high"]) == pytest.approx((0.4, 0.8)) and dog["units"] == 2
    assert part_text({**dog, "value": -0.1, "low": -0.2, "high": 0.05}) == "−0.100 (−0.200 … 0.050)"
    assert boat["units"] == 1 and part_text(boat) == "0.600" and part_text(dog) == "0.600 (0.400–0.800)"


def test_results_show_the_last_model() -> None:
    parts = breakdown([*samples_of(BEFORE_STAGE_3), *samples_of()], BOOTSTRAP)
    assert shown_system([AFTER_STAGE_3, "Theirs"]) == AFTER_STAGE_3 and shown_system([BEFORE_STAGE_3]) == BEFORE_STAGE_3
    text = results_markdown([], [], parts)
    assert text.count("| live |") == 2 and text.index("| cat |") < text.index("| dog |") < text.index("| wet |")


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
    text = results_markdown(SCORES, [], NO_PARTS)
    assert f"| {AFTER_STAGE_3} | 1.5 | 0.500 (0.450–0.550) |" in text and "`p@1#7.5`" in text
    assert "guidance" not in results_markdown(SCORES[-1:], [], NO_PARTS) and guidance_charts(SCORES[-1:]) == {}
    for svg in guidance_charts(SCORES).values():
        assert svg.startswith("<svg") and "A &lt;rival&gt;" in svg and ">1.5<" in svg


def test_a_point_is_a_protocol_of_its_own() -> None:
    curve = Curve(guidance_scales=[3.0], max_subjects=5, images_per_prompt=1)
    at = protocol_at(PROTOCOL, curve, 3.0)
    assert (at.sampling.guidance_scale, at.max_subjects, at.max_templates, at.images_per_prompt) == (3.0, 5, None, 1)
    assert identity(at) != identity(PROTOCOL)
    same = protocol_at(PROTOCOL, Curve(guidance_scales=[7.5]), PROTOCOL.sampling.guidance_scale)
    assert identity(same) == identity(PROTOCOL)


def score(system: str, value: float, spread: float = 0.02, metric: str = "dino", table: str = "dreambench") -> Score:
    return Score(table, system, metric, value, value - spread, value + spread, 750, "p@1#0")


def test_results_are_read_back(tmp_path: Path) -> None:
    scores = [score(AFTER_STAGE_3, 0.7), score(REAL_IMAGES, 0.8)]
    write_results(scores, tmp_path / "results.json")
    assert read_results(tmp_path / "results.json") == scores
    (tmp_path / "results.json").write_text('[{"value": 1}]')
    with pytest.raises(ValueError, match=r"no results\.json of this project"):
        read_results(tmp_path / "results.json")


def test_rows_stand_in_the_order_of_the_table() -> None:
    rows = table_rows([score("Someone else's", 0.5), score(AFTER_STAGE_3, 0.7), score(REAL_IMAGES, 0.8)], "dreambench")
    assert list(rows) == [REAL_IMAGES, AFTER_STAGE_3, "Someone else's"]


def test_markdown_shows_value_interval_n_and_dashes() -> None:
    text = results_markdown([score(AFTER_STAGE_3, 0.7)], ["a note"], NO_PARTS)
    assert "| KOSMOS-G after stage 3 | 0.700 (0.680–0.720) | – | – | 750 |" in text and "- a note" in text


def test_findings_say_whether_intervals_are_apart() -> None:
    for after, apart in [(0.7, True), (0.3, True), (0.52, False)]:
        (finding,) = findings([score(BEFORE_STAGE_3, 0.5), score(AFTER_STAGE_3, after)])
        assert finding["apart"] is apart and finding["before"] == "0.500 (0.480–0.520)"


def test_curves_are_read_from_a_run(tmp_path: Path) -> None:
    with (tmp_path / "metrics.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["step", "train/loss", "lr", "val/loss"])
        writer.writeheader()
        writer.writerow({"step": 1, "train/loss": 2.0, "lr": 0.1, "val/loss": ""})
        writer.writerow({"step": 5, "train/loss": 1.0, "lr": 0.1, "val/loss": "nan"})
    assert list(read_losses(tmp_path)) == ["train/loss"]
    assert read_losses(tmp_path)["train/loss"].to_dict() == {1: 2.0, 5: 1.0}
    charts = loss_charts({"Stage 2": tmp_path, "Stage 3": tmp_path / "nowhere"})
    assert list(charts) == ["Stage 2"] and charts["Stage 2"]["train/loss"].startswith("<svg")
    assert charts == loss_charts({"Stage 2": tmp_path}), "the same chart is the same bytes"


def test_the_column_stands_where_there_are_scores() -> None:
    def score(metric: str, value: float) -> Score:
        return Score("coco", "System", metric, value, value - 0.001, value + 0.001, 6, "p@1#0")

    assert (
        "KID" not in results_markdown([score("fid", 8.0)], [], NO_PARTS).partition("# The paper")[0].partition("##")[2]
    )
    table = results_markdown([score("fid", 8.0), score("kid", 0.00342)], [], NO_PARTS)
    assert "| System | FID ↓ | KID ↓ | CLIP-T ↑ | n |" in table
    assert "| System | 8.00 (8.00–8.00) | 0.00342 (0.00242–0.00442) | – | 6 |" in table
    assert "of KID, ±1.96 standard deviations over subsets" in table, "which is no 95 % interval"
