"""Comparing finished evaluations: refused across protocols, data and encoders; paired by subject otherwise."""

import json
from pathlib import Path

import numpy as np
import pytest

from evaluate import main
from evaluation.protocols.benchmark import Item
from evaluation.scores.bootstrap import paired_interval
from evaluation.scores.results import Sample, Score, write_results, write_samples

AFTER = "KOSMOS-G after stage 3"


def write(
    folder: Path,
    shift: float = 0.0,
    protocol: str = "dreambench/x@1#aaaa",
    steps: int = 50,
    subjects: int = 4,
    **written,
) -> Path:
    """A finished evaluation of some subjects with two prompts each; `shift` is added to every cosine."""
    folder.mkdir(parents=True)
    cosines = [(f"subject{k // 2}", 0.1 * k + shift) for k in range(2 * subjects)]
    samples = [Sample("dreambench", AFTER, "dino", Item(Path("a.png"), u, ""), "b.png", score) for u, score in cosines]
    write_samples(samples, folder / "samples.csv")
    mean = float(np.mean([score for _, score in cosines]))
    scores = [
        Score("dreambench", "Real images", "dino", 0.8, 0.7, 0.9, 4, protocol),
        Score("dreambench", AFTER, "dino", mean, mean - 0.2, mean + 0.2, 8, protocol),
        Score("coco", AFTER, "fid", 7.0 + shift, 6.0, 8.0, 8, "coco/x@1#bbbb"),
    ]
    write_results(scores, folder / "results.json")
    config = {"dreambench": {"sampling": {"steps": steps}}, "coco": {}, "bootstrap": {"replicates": 500, "seed": 0}}
    written = {"dreambench data": "d", "dreambench.dino": "w", **{k.replace("_", " "): v for k, v in written.items()}}
    (folder / "provenance.json").write_text(json.dumps({"key": "k", "written": written, "config": config}))
    return folder


def test_rows_side_by_side_and_paired_differences(tmp_path, capsys):
    """A constant shift has no spread once subjects are paired, however wide the intervals of the two are."""
    assert main(["compare", str(write(tmp_path / "one")), str(write(tmp_path / "two", shift=-0.05))]) == 0
    told = capsys.readouterr().out
    assert "| two − one | KOSMOS-G after stage 3 | −0.050 (−0.050 … −0.050) | – | – |" in told
    assert "| two − one | KOSMOS-G after stage 3 | −0.05 | – |" in told
    assert told.count("Real images") == 1 and told.count("| one | KOSMOS") == told.count("| two | KOSMOS") == 2


def test_differences_are_of_the_means_that_the_tables_show(tmp_path, capsys):
    """A mean below 0 is shown as 0, so that it does not differ from another one."""
    assert main(["compare", str(write(tmp_path / "one", shift=-2.0)), str(write(tmp_path / "two", shift=-1.0))]) == 0
    assert "| two − one | KOSMOS-G after stage 3 | +0.000 (+0.000 … +0.000) |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"protocol": "dreambench/x@1#cccc", "steps": 100}, "sampling.steps: 50 and 100"),
        ({"protocol": "dreambench/x@1#cccc", "subjects": 3}, "protocol dreambench/x@1#aaaa and dreambench/x@1#cccc"),
        ({"dreambench_data": "e"}, "dreambench data: other files"),
        ({"dreambench.dino": "v"}, "dreambench.dino: other files"),
    ],
)
def test_what_does_not_compare_is_refused_or_marked(tmp_path, capsys, changes, told):
    folders = [str(write(tmp_path / "one")), str(write(tmp_path / "two", **changes))]
    assert main(["compare", *folders]) == 2
    heard = capsys.readouterr()
    assert told in heard.err and "force=true" in heard.err and not heard.out
    assert main(["compare", *folders, "force=true"]) == 0
    shown = capsys.readouterr().out
    assert told in shown and "| two † | KOSMOS" in shown and "| one † |" not in shown
    coco = shown.partition("## Captions")[2].partition("† Not")[0]
    assert "†" not in coco  # the captions' protocol is the same


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["one"], "2 or more different evaluations"),
        (["one", "one/results.json"], "2 or more different evaluations"),
        (["one", "nowhere"], "nowhere' holds no finished evaluation: results.json, samples.csv, provenance.json"),
        (["one", "two", "force=yes"], "force=yes is not allowed"),
        (["one", "two", "forse=true"], "'forse=true': there is no option 'forse' (allowed: force=…"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capsys, arguments, told):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "one")
    write(tmp_path / "two")
    assert main(["compare", *arguments]) == 2
    assert told in capsys.readouterr().err


def test_folders_of_one_name_are_told_apart(tmp_path, capsys):
    folders = [write(tmp_path / run / "evaluation", shift) for run, shift in (("a", 0.0), ("b", 0.1))]
    assert main(["compare", *map(str, folders)]) == 0
    assert "b/evaluation − a/evaluation" in capsys.readouterr().out


def test_paths_may_hold_equals_signs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folders = [
        str(write(Path("runs") / name, shift=shift).relative_to(".")) for name, shift in (("lr=1", 0.0), ("lr=2", 0.1))
    ]
    assert main(["compare", *folders, "force=false"]) == 0
    assert "| lr=2 − lr=1 |" in capsys.readouterr().out
    monkeypatch.chdir("runs")
    assert main(["compare", "lr=1", "./lr=2"]) == 0


def test_paired_interval_draws_units():
    rng = np.random.default_rng(0)
    units = [f"u{k}" for k in range(40) for _ in range(5)]
    base = rng.normal(0, 1, 40).repeat(5)
    gain = rng.normal(0.5, 0.3, 40).repeat(5)
    low, high = paired_interval(base.tolist(), units, (base + gain).tolist(), units, 2000, 0)
    expected = 1.96 * gain[::5].std(ddof=1) / np.sqrt(40)
    assert low == pytest.approx(gain.mean() - expected, abs=0.02)
    assert high == pytest.approx(gain.mean() + expected, abs=0.02)
    with pytest.raises(ValueError, match=r"1 units have scores on one side only, as \['u39'\]"):
        paired_interval(base.tolist(), units, base[:-5].tolist(), units[:-5], 10, 0)
