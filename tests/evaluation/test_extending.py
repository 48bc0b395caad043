"""A new metric needs a class and an entry in METRICS to appear in all outputs."""

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import evaluate
from evaluation.benchmarks import METRICS
from evaluation.protocols.benchmark import Item, read_image
from evaluation.scores.metric import Metric, Row


class Brightness(Metric):
    """Mean of all pixels, in percent."""

    name, title, decimals, better, optional = "brightness", "Brightness", 1, "↓", True

    def score(self, items: Sequence[Item]) -> list[Row]:
        return [Row(item, "", 100 * np.asarray(read_image(item.file)).mean() / 255) for item in items if item.text]


def test_a_new_metric_appears_everywhere(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(METRICS, "dreambench", (*METRICS["dreambench"], Brightness))
    output = tmp_path / "evaluation"
    command = [*arguments, "coco=null", "curve.guidance_scales=[2]", "curve.max_subjects=1"]
    assert evaluate.main([*command, f"output={output}"]) == 0
    assert "Brightness ↓" in capsys.readouterr().out
    rows = [row for row in json.loads((output / "results.json").read_text()) if row["metric"] == "brightness"]
    assert {row["system"] for row in rows if row["table"] == "dreambench"} == {
        "Copy of the input",
        "Stable Diffusion (text)",
        "KOSMOS-G before stage 3",
        "KOSMOS-G after stage 3",
    }
    assert {row["table"] for row in rows} == {"dreambench", "guidance"}
    assert all(
        0 < row["low"] <= row["value"] <= row["high"] < 100 and row["n"] == 9
        for row in rows
        if row["table"] != "guidance"
    )
    with (output / "breakdown.csv").open() as stream:
        parts = [part for part in csv.DictReader(stream) if part["metric"] == "brightness"]
    assert {part["by"] for part in parts} == {"kind", "subject", "template", "words"}
    page, table = ((output / name).read_text() for name in ("report.html", "results.md"))
    after = next(row for row in rows if row["system"] == "KOSMOS-G after stage 3" and row["table"] == "dreambench")
    text = f"{after['value']:.1f} ({after['low']:.1f}–{after['high']:.1f})"
    assert page.count("Brightness ↓") > 1 and "| Words ↑ | Brightness ↓ | n |" in table and text in table
    assert evaluate.main(["tables", str(output), f"output={tmp_path / 'tables'}"]) == 0
    for suffix, arrow in (("md", "↓"), ("tex", r"$\downarrow$"), ("html", "↓")):
        assert f"Brightness {arrow}" in (tmp_path / "tables" / f"table-1-dreambench.{suffix}").read_text()
    other = shutil.copytree(output, tmp_path / "other")
    capsys.readouterr()
    assert evaluate.main(["compare", str(output), str(other)]) == 0
    assert "Brightness ↓" in capsys.readouterr().out
