"""What the tables and the page say follows the scores."""

import csv
import re
from pathlib import Path

import pytest

from evaluation.images.systems import AFTER_STAGE_3, BEFORE_STAGE_3, REAL_IMAGES
from evaluation.reports.plots import loss_charts, read_losses
from evaluation.reports.report import findings
from evaluation.scores.results import Score, markdown, read_results, table_rows, write_results


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
    assert [system for system, _ in rows] == [REAL_IMAGES, AFTER_STAGE_3, "Someone else's"]


def test_markdown_shows_value_interval_n_and_dashes() -> None:
    text = markdown([score(AFTER_STAGE_3, 0.7)], ["a note"])
    assert "| KOSMOS-G after stage 3 | 0.700 (0.680–0.720) | – | – | 750 |" in text and "- a note" in text


def test_findings_say_whether_intervals_are_apart() -> None:
    for after, apart in [(0.7, True), (0.3, True), (0.52, False)]:
        (finding,) = findings([score(BEFORE_STAGE_3, 0.5), score(AFTER_STAGE_3, after)])
        assert finding.apart is apart and finding.before == "0.500 (0.480–0.520)"


def test_curves_are_read_from_a_run(tmp_path: Path) -> None:
    with (tmp_path / "metrics.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["step", "train/loss", "lr", "val/loss"])
        writer.writeheader()
        writer.writerow({"step": 1, "train/loss": 2.0, "lr": 0.1, "val/loss": ""})
        writer.writerow({"step": 5, "train/loss": 1.0, "lr": 0.1, "val/loss": "nan"})
    assert read_losses(tmp_path) == {"train/loss": [(1, 2.0), (5, 1.0)]}
    ((title, ((name, svg),)),) = loss_charts([("Stage 2", tmp_path), ("Stage 3", tmp_path / "nowhere")])
    points = re.search(r'points="([^"]+)"', svg)
    assert (title, name) == ("Stage 2", "train/loss") and points is not None and len(points.group(1).split()) == 2
