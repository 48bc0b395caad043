"""Runs of an experiment: rows named by their run folders, gathered over seeds in the paper's tables."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from evaluate import main
from evaluation.config import EvaluationConfig
from evaluation.images.systems import TEXT_SYSTEMS, run_folders, run_system
from evaluation.protocols.benchmark import EvaluationError
from evaluation.reports.galleries import CELL, GAP
from evaluation.run import evaluate
from evaluation.scores.results import Score, read_results, write_results
from kosmosg.config import load_config
from kosmosg.models.stable_diffusion import StableDiffusion
from tests.evaluation.test_compare import write

CPU = torch.device("cpu")
STABLE_DIFFUSION_TEXT = TEXT_SYSTEMS[StableDiffusion]
PROTOCOL = "coco/x@1#bbbb"


def write_run(folder: Path, model: Path, **config) -> Path:
    shutil.copytree(model, folder / "model")
    (folder / "config.yaml").write_text(json.dumps({"stage": "alignment", "seed": 0, **config}))
    (folder / "finished.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("config", "name", "stage"),
    [
        ({"ablation": "without_l_rec", "seed": 2, "recipe": {"rec_weight": 0}}, "without_l_rec, seed 2", "alignment"),
        ({}, "alignment, seed 0", "alignment"),
        ({"ablation": "e", "stage": "instruction_tuning", "recipe": {"trainable": "aligner"}}, "e, seed 0",
         "alignment"),
        ({"stage": "instruction_tuning", "recipe": {"trainable": "all"}}, "instruction_tuning, seed 0",
         "instruction_tuning"),
    ],
)  # fmt: skip
def test_a_run_folder_names_its_row(tiny_model, tiny_stable_diffusion, tmp_path, config, name, stage):
    system = run_system(write_run(tmp_path / "run", tiny_model, **config), str(tiny_stable_diffusion), CPU)
    assert system.name == name and system.stage == stage


def test_patterns_take_what_is_finished(tiny_model, tmp_path):
    runs = [write_run(tmp_path / name, tiny_model) for name in ("b-seed-0", "a-seed-1", "a-seed-0")]
    (runs[1] / "finished.json").unlink()
    assert run_folders([str(tmp_path / "*"), str(runs[0])]) == [runs[2], runs[0]]
    assert run_folders([str(tmp_path / "nothing-*"), str(runs[0])]) == [runs[0]]
    with pytest.raises(EvaluationError, match=r"a-seed-1' is no finished run folder"):
        run_folders([str(runs[1])])
    with pytest.raises(EvaluationError, match=r"no finished run folder fits .*nothing-\*'"):
        run_folders([str(tmp_path / "nothing-*")])


def test_scores_say_which_run_they_are_of(arguments, tiny_model, tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / "runs" / f"{seed}", tiny_model, ablation="decoder_12_layers", seed=seed)
    options = ["dreambench=null", "models.before_stage_3=null", "models.after_stage_3=null"]
    options += [f"output={tmp_path / 'evaluation'}", f"models.runs=['{tmp_path}/runs/*']"]
    config = load_config([*arguments, *options], EvaluationConfig)
    scores = evaluate(config)
    assert scores == read_results(tmp_path / "evaluation" / "results.json")
    found = {(s.system, s.experiment, s.stage, s.seed) for s in scores if s.metric == "fid"}
    assert found == {
        ("Real images", None, None, None),
        (STABLE_DIFFUSION_TEXT, None, None, None),
        ("decoder_12_layers, seed 0", "decoder_12_layers", "alignment", 0),
        ("decoder_12_layers, seed 1", "decoder_12_layers", "alignment", 1),
    }
    report = (tmp_path / "evaluation" / "report.html").read_text()
    assert "decoder_12_layers, seed 1" in report
    with Image.open(tmp_path / "evaluation" / "sheets" / "captions.png") as sheet:
        assert sheet.width // (CELL + GAP) == 3, "caption, Stable Diffusion, and one run of the experiment"
    config.models.runs.append(str(write_run(tmp_path / "twice", tiny_model, ablation="decoder_12_layers")))
    with pytest.raises(EvaluationError, match=r"twice' is a second run called 'decoder_12_layers, seed 0'"):
        evaluate(config)


def run_scores(experiment: str, seed: int, fid: float, stage: str = "alignment") -> list[Score]:
    run = (PROTOCOL, experiment, stage, seed)
    name = f"{experiment}, seed {seed}"
    return [
        Score("coco", name, "fid", fid, fid - 1, fid + 1, 500, *run),
        Score("coco", name, "clip_t", fid / 100, 0.0, 0.2, 500, *run),
    ]


def finished(folder: Path, *scores: list[Score], **written: str) -> str:
    write(folder, **written)
    write_results([score for some in scores for score in some], folder / "results.json")
    return str(folder)


def tables(*folders: str, output: Path) -> str:
    assert main(["tables", *folders, f"output={output}"]) == 0
    return (output / "table-2.md").read_text()


def test_seeds_are_gathered_in_the_papers_order_and_words(tmp_path):
    others = [Score("coco", STABLE_DIFFUSION_TEXT, "fid", 6.66, 5.0, 8.0, 500, PROTOCOL)]
    table = tables(
        finished(
            tmp_path / "one", others,
            run_scores("without_l_rec", 0, 13.0),
            *(run_scores("alignernet_24_layers", seed, 9 + seed) for seed in (0, 1, 2)),
            run_scores("decoder_12_layers", 0, 12.0),
            run_scores("weighting_sds", 0, 7.0, stage="instruction_tuning"),
        ),
        output=tmp_path / "tables",
    )  # fmt: skip
    printed, fixed, gathered, every = split(table)
    assert "| AlignerNet of 24 layers | 9.55 | – | – |" in printed and printed.count("fails") == 2
    assert "| Stable Diffusion (text) | 6.66 (5.00–8.00) | – | 500 |" in fixed and "seed" not in fixed
    assert rows(gathered) == [
        "| Decoder of 12 layers alone | 12.00 | 0.120 | 1 seed × 500 |",
        "| AlignerNet of 24 layers | 10.00 (9.00–11.00) | 0.100 (0.090–0.110) | 3 seeds × 500 |",
        "| without_l_rec | 13.00 | 0.130 | 1 seed × 500 |",
    ]
    assert rows(every)[1:3] == [
        "| AlignerNet of 24 layers, seed 0 | 9.00 (8.00–10.00) | 0.090 (0.000–0.200) | 500 |",
        "| AlignerNet of 24 layers, seed 1 | 10.00 (9.00–11.00) | 0.100 (0.000–0.200) | 500 |",
    ]
    assert "mean over seeds (lowest–highest of a seed)" in table and "weighting_sds" not in table
    assert "weighting_sds" in (tmp_path / "tables" / "table-1-coco.md").read_text()


def split(table: str) -> list[str]:
    """The Markdown tables of a page."""
    return ["\n".join(line for line in block.splitlines() if line.startswith("|"))
            for block in table.split("\n\n") if block.startswith("|")]  # fmt: skip


def rows(table: str) -> list[str]:
    return table.splitlines()[2:]


def test_seeds_of_several_evaluations_stand_together_where_they_compare(tmp_path):
    folders = [
        finished(tmp_path / f"seed-{seed}", run_scores("alignernet_24_layers", seed, 9.0 + seed)) for seed in (0, 1)
    ]
    table = tables(*folders, output=tmp_path / "tables")
    assert "| AlignerNet of 24 layers | 9.50 (9.00–10.00) |" in table and "seed-0, seed-1: coco/x" in table
    other = finished(tmp_path / "other", run_scores("alignernet_24_layers", 2, 99.0), **{"coco.fid": "another"})
    table = tables(*folders, other, output=tmp_path / "tables")
    assert "| AlignerNet of 24 layers | 9.50 (9.00–10.00) |" in table
    assert "| AlignerNet of 24 layers | 99.00 | 0.990 | 1 seed × 500 |" in table


def test_a_seed_counts_once(tmp_path, capsys):
    folders = [finished(tmp_path / name, run_scores("alignernet_24_layers", 0, 9.0)) for name in ("one", "two")]
    assert main(["tables", *folders, f"output={tmp_path / 'tables'}"]) == 2
    assert "seed 0 of 'alignernet_24_layers' is in 'one' and in 'two'" in capsys.readouterr().err
