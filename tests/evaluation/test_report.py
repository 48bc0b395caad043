"""results.md and the report: near copies, breakdowns, the curve over guidance scales, findings."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from evaluation.config import Curve
from evaluation.images.systems import AFTER_STAGE_3, BEFORE_STAGE_3, REAL_IMAGES
from evaluation.plan import protocol_at
from evaluation.protocols.benchmark import Item
from evaluation.protocols.dreambench import NEAR_COPY
from evaluation.protocols.protocol import DreamBenchProtocol, identity
from evaluation.reports.breakdown import breakdown, part_text, sections, shown_system
from evaluation.reports.report import findings, guidance_charts, loss_charts, read_losses
from evaluation.reports.tables import points_of, results_markdown
from evaluation.scores.bootstrap import Bootstrap
from evaluation.scores.metric import Context
from evaluation.scores.results import Sample, Score, read_results, score_images, table_rows, write_results

BOOTSTRAP = Bootstrap(replicates=200)
NO_PARTS = breakdown([], BOOTSTRAP)
PROTOCOL = DreamBenchProtocol(name="dreambench/tiny", facts="dreambench.json", images_per_prompt=2)


def test_near_copies_are_copies_of_the_input(tmp_path: Path) -> None:
    """Whatever the references are."""
    given, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    cosines = {"a": NEAR_COPY + 0.001, "b": NEAR_COPY - 0.001, "c": 1.0, "d": -1.0}
    features = {
        tmp_path / name: normalize(c * given + (1 - c * c) ** 0.5 * other, dim=0) for name, c in cosines.items()
    }
    features |= {tmp_path / "given": given, tmp_path / "other": other}
    items = [
        Item(tmp_path / name, subject, "", (tmp_path / "other",), given=tmp_path / "given")
        for name, subject in zip("abcd", ("dog", "dog", "dog", "cat"), strict=True)
    ]
    items.append(Item(tmp_path / "other", "cat", "", (tmp_path / "given",)))  # a photo has no input
    networks = {"dino": lambda files: torch.stack([features[file] for file in files])}
    scores, samples = score_images("dreambench", "p@1#0", Context(networks, BOOTSTRAP), "System", items)
    (rate,) = [score for score in scores if score.metric == "near_copies"]
    assert rate.value == 0.5 and rate.n == 4 and rate.low <= 0.5 <= rate.high
    assert [s.score for s in samples if s.metric == "near_copies"] == [1, 0, 1, 0]


KINDS = {"cat": "live", "dog": "live", "boat": "object"}


def samples_of(system: str = AFTER_STAGE_3) -> list[Sample]:
    """DINO is 0.2 for the cat, 0.4 and 0.8 for the dog, 0.6 for the boat; CLIP-T is 1 - DINO."""
    rows = [("cat", "red", 0.2), ("dog", "red", 0.4), ("dog", "wet", 0.8), ("boat", "wet", 0.6), ("cat", "wet", 0.2)]
    return [
        Sample("dreambench", system, metric, Item(Path(), unit, "", parts=parts), "r", value)
        for unit, word, dino in rows
        for parts in [{"kind": (KINDS[unit], unit), "subject": (unit, word), "template": (word, unit)}]
        for metric, value in (("dino", dino), ("clip_t", 1 - dino))
    ]


PHOTO = Sample("dreambench", "Real images", "dino", Item(Path(), "cat", ""), "b", 1.0)


def test_parts_are_sorted_by_their_means() -> None:
    parts = breakdown([*samples_of(), PHOTO], BOOTSTRAP)
    assert set(parts["system"]) == {AFTER_STAGE_3}, "photos have no prompts"
    means = parts.set_index(["by", "part", "metric"])
    assert tuple(means.loc["subject", "dog", "dino"][["value", "n"]]) == (pytest.approx(0.6), 2)
    assert tuple(means.loc["template", "wet", "clip_t"][["value", "n"]]) == (pytest.approx(1.4 / 3), 3)
    assert tuple(means.loc["kind", "live", "dino"][["value", "n"]]) == (pytest.approx(0.4), 4)
    order = {section.by: list(section.rows.iloc[:, 0]) for section in sections(parts)}
    assert order == {"kind": ["live", "object"], "subject": ["cat", "boat", "dog"], "template": ["wet", "red"]}
    assert sections(breakdown([PHOTO], BOOTSTRAP)) == []


def test_intervals_of_parts_are_over_units() -> None:
    """Of a kind over its subjects, of a subject over its templates; none for a single unit."""
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


def score(system: str, value: float, spread: float = 0.02, metric: str = "dino", table: str = "dreambench") -> Score:
    return Score(table, system, metric, value, value - spread, value + spread, 750, "p@1#0")


def point(system: str, scale: float, dino: float, clip_t: float) -> list[Score]:
    values = {"dino": dino, "clip_i": dino, "clip_t": clip_t, "near_copies": 0.0}
    run = {"table": "guidance", "protocol": f"p@1#{scale:g}", "guidance_scale": scale}
    return [replace(score(system, value, 0.05, metric), **run) for metric, value in values.items()]


SCORES = [
    *point(AFTER_STAGE_3, 7.5, 0.7, 0.28),
    *point(AFTER_STAGE_3, 1.5, 0.5, 0.30),
    *point("A <rival>", 7.5, 0.6, 0.31),
    score(AFTER_STAGE_3, 0.7),
]


def test_the_curve_is_sorted_by_scale() -> None:
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


def test_a_point_has_its_own_protocol() -> None:
    curve = Curve(guidance_scales=[3.0], max_subjects=5, images_per_prompt=1)
    at = protocol_at(PROTOCOL, curve, 3.0)
    assert (at.sampling.guidance_scale, at.max_subjects, at.max_templates, at.images_per_prompt) == (3.0, 5, None, 1)
    assert identity(at) != identity(PROTOCOL)
    same = protocol_at(PROTOCOL, Curve(guidance_scales=[7.5]), PROTOCOL.sampling.guidance_scale)
    assert identity(same) == identity(PROTOCOL)


def test_results_are_read_back(tmp_path: Path) -> None:
    scores = [score(AFTER_STAGE_3, 0.7), score(REAL_IMAGES, 0.8)]
    write_results(scores, tmp_path / "results.json")
    assert read_results(tmp_path / "results.json") == scores
    (tmp_path / "results.json").write_text('[{"value": 1}]')
    with pytest.raises(ValueError, match=r"not a results\.json of this project"):
        read_results(tmp_path / "results.json")


def test_tables_have_rows_in_order_dashes_and_notes() -> None:
    rows = table_rows([score("Someone else's", 0.5), score(AFTER_STAGE_3, 0.7), score(REAL_IMAGES, 0.8)], "dreambench")
    assert list(rows) == [REAL_IMAGES, AFTER_STAGE_3, "Someone else's"]
    text = results_markdown([score(AFTER_STAGE_3, 0.7)], ["a note"], NO_PARTS)
    assert "| KOSMOS-G after stage 3 | 0.700 (0.680–0.720) | – | – | 750 |" in text and "- a note" in text


def test_findings_say_whether_intervals_are_disjoint() -> None:
    for after, apart in [(0.7, True), (0.3, True), (0.52, False)]:
        (finding,) = findings([score(BEFORE_STAGE_3, 0.5), score(AFTER_STAGE_3, after)])
        assert finding["apart"] is apart and finding["before"] == "0.500 (0.480–0.520)"


def test_losses_are_read_from_a_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train/loss,lr,val/loss\n1,2.0,0.1,\n5,1.0,0.1,nan\n")
    assert list(read_losses(tmp_path)) == ["train/loss"]
    assert read_losses(tmp_path)["train/loss"].to_dict() == {1: 2.0, 5: 1.0}
    charts = loss_charts({"Stage 2": tmp_path, "Stage 3": tmp_path / "nowhere"})
    assert list(charts) == ["Stage 2"] and charts["Stage 2"]["train/loss"].startswith("<svg")
    assert charts == loss_charts({"Stage 2": tmp_path}), "charts are reproducible byte for byte"


def test_optional_columns_need_scores() -> None:
    fid = score("System", 8.0, 0.001, "fid", "coco")
    ours = results_markdown([fid], [], NO_PARTS).partition("# The paper")[0].partition("##")[2]
    assert "KID" not in ours
    table = results_markdown([fid, score("System", 0.00342, 0.001, "kid", "coco")], [], NO_PARTS)
    assert "| System | FID ↓ | KID ↓ | CLIP-T ↑ | n |" in table
    assert "| System | 8.00 (8.00–8.00) | 0.00342 (0.00242–0.00442) | – | 750 |" in table
    assert "of KID, ±1.96 standard deviations over subsets" in table, "which is not a 95 % interval"
