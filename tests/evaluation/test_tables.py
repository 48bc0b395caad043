"""Comparisons of finished evaluations, the paper's tables, and refusals if scores are not comparable."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluate import main
from evaluation.config import EvaluationConfig
from evaluation.images.systems import AFTER_STAGE_3, BEFORE_STAGE_3, TEXT_SYSTEMS, run_folders, run_system
from evaluation.protocols.benchmark import EvaluationError, Item
from evaluation.reports.galleries import CELL, GAP
from evaluation.reports.paper import ALIGNMENT, COCO, DREAMBENCH
from evaluation.run import evaluate
from evaluation.scores.bootstrap import paired_interval
from evaluation.scores.results import Sample, Score, read_results, write_results, write_samples
from kosmosg.config import load_config
from kosmosg.models.stable_diffusion import StableDiffusion

TEXT = TEXT_SYSTEMS[StableDiffusion]
COCO_PROTOCOL = "coco/x@1#bbbb"


def write(
    folder: Path,
    shift: float = 0.0,
    protocol: str = "dreambench/x@1#aaaa",
    steps: int = 50,
    subjects: int = 4,
    scores: list[Score] | None = None,
    **written,
) -> str:
    """Write a finished evaluation of some subjects with two prompts each; `shift` is added to all cosines."""
    folder.mkdir(parents=True)
    cosines = [(f"subject{k // 2}", 0.1 * k + shift) for k in range(2 * subjects)]
    pairs = [(Item(Path("a.png"), unit, ""), cosine) for unit, cosine in cosines]
    samples = [Sample("dreambench", AFTER_STAGE_3, "dino", item, "b.png", cosine) for item, cosine in pairs]
    write_samples(samples, folder / "samples.csv")
    mean = float(np.mean([cosine for _, cosine in cosines]))
    whole = [
        Score("dreambench", "Real images", "dino", 0.8, 0.7, 0.9, 4, protocol),
        Score("dreambench", AFTER_STAGE_3, "dino", mean, mean - 0.2, mean + 0.2, 8, protocol),
        Score("coco", AFTER_STAGE_3, "fid", 7.0 + shift, 6.0, 8.0, 8, COCO_PROTOCOL),
    ]
    write_results(whole if scores is None else scores, folder / "results.json")
    config = {"dreambench": {"sampling": {"steps": steps}}, "coco": {}, "bootstrap": {"replicates": 500, "seed": 0}}
    written = {"dreambench data": "d", "dreambench.dino": "w", **{k.replace("_", " "): v for k, v in written.items()}}
    (folder / "provenance.json").write_text(json.dumps({"key": "k", "written": written, "config": config}))
    return str(folder)


def test_comparison_has_rows_and_paired_differences(tmp_path, capsys):
    """A constant shift has a paired interval of zero width, although both rows have wide intervals."""
    assert main(["compare", write(tmp_path / "one"), write(tmp_path / "two", shift=-0.05)]) == 0
    page = capsys.readouterr().out
    assert "| two − one | KOSMOS-G after stage 3 | −0.050 (−0.050 … −0.050) | – | – |" in page
    assert "| two − one | KOSMOS-G after stage 3 | −0.05 | – |" in page
    assert page.count("Real images") == 1 and page.count("| one | KOSMOS") == page.count("| two | KOSMOS") == 2


def test_differences_are_of_clamped_means(tmp_path, capsys):
    """Means below 0 are shown as 0 and therefore equal."""
    assert main(["compare", write(tmp_path / "one", shift=-2.0), write(tmp_path / "two", shift=-1.0)]) == 0
    assert "| two − one | KOSMOS-G after stage 3 | +0.000 (+0.000 … +0.000) |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"protocol": "dreambench/x@1#cccc", "steps": 100}, "sampling.steps: 50 and 100"),
        ({"protocol": "dreambench/x@1#cccc", "subjects": 3}, "protocol dreambench/x@1#aaaa and dreambench/x@1#cccc"),
        ({"dreambench_data": "e"}, "dreambench data: other files"),
        ({"dreambench.dino": "v"}, "dreambench.dino: other files"),
    ],
)
def test_incomparable_scores_are_refused_or_marked(tmp_path, capsys, changes, reason):
    folders = [write(tmp_path / "one"), write(tmp_path / "two", **changes)]
    assert main(["compare", *folders]) == 2
    output = capsys.readouterr()
    assert reason in output.err and "force=true" in output.err and not output.out
    assert main(["compare", *folders, "force=true"]) == 0
    shown = capsys.readouterr().out
    assert reason in shown and "| two † | KOSMOS" in shown and "| one † |" not in shown
    assert "†" not in shown.partition("## Captions")[2].partition("† Not")[0], "the captions' protocol is the same"


REFUSALS = [
    (["compare", "one"], "at least 2 different evaluations"),
    (["compare", "one", "one/results.json"], "at least 2 different evaluations"),
    (["compare", "one", "nowhere"], "not a finished evaluation: results.json, samples.csv, provenance.json"),
    (["compare", "one", "two", "force=yes"], "force=yes is not allowed"),
    (["compare", "one", "two", "forse=true"], "'forse=true': there is no option 'forse' (allowed: force=…"),
    (["tables"], "at least 1 different evaluations"),
    (["tables", "empty"], "no scores for any of the paper's tables"),
    (["tables", "seed", "again"], "seed 0 of 'alignernet_24_layers' is in both 'seed' and 'again'"),
]


def test_invalid_arguments_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, scores in (("one", None), ("two", None), ("empty", []), ("seed", 9.0), ("again", 9.0)):
        write(Path(name), scores=runs("alignernet_24_layers", 0, scores) if isinstance(scores, float) else scores)
    for arguments, message in REFUSALS:
        assert main(arguments) == 2, arguments
        assert message in capsys.readouterr().err, arguments


def test_evaluations_have_the_shortest_unique_names(tmp_path, monkeypatch, capsys):
    """Names may contain equals signs."""
    monkeypatch.chdir(tmp_path)
    folders = [write(Path(run) / "evaluation", shift) for run, shift in (("lr=1", 0.0), ("lr=2", 0.1))]
    assert main(["compare", *folders, "force=false"]) == 0
    assert "| lr=2/evaluation − lr=1/evaluation |" in capsys.readouterr().out


def test_paired_interval_resamples_units():
    rng = np.random.default_rng(0)
    units = [f"u{k}" for k in range(40) for _ in range(5)]
    base = rng.normal(0, 1, 40).repeat(5)
    gain = rng.normal(0.5, 0.3, 40).repeat(5)
    low, high = paired_interval(base.tolist(), units, (base + gain).tolist(), units, 2000, 0)
    expected = 1.96 * gain[::5].std(ddof=1) / np.sqrt(40)
    assert low == pytest.approx(gain.mean() - expected, abs=0.02)
    assert high == pytest.approx(gain.mean() + expected, abs=0.02)
    with pytest.raises(ValueError, match=r"1 units have scores on one side only, for example \['u39'\]"):
        paired_interval(base.tolist(), units, base[:-5].tolist(), units[:-5], 10, 0)


@pytest.fixture
def files(tmp_path, capsys):
    """The tables of an evaluation whose folder and protocol names need escaping in LaTeX and Markdown."""
    protocol = "dreambench/x_y@1#aa&aa"
    scores = [
        Score("dreambench", AFTER_STAGE_3, "dino", 0.5, 0.4, 0.6, 750, protocol),
        Score("dreambench", "a|b\nc", "clip_t", 0.3, 0.2, 0.4, 750, protocol),
        *(Score("coco", system, "fid", 7.0, 6.0, 8.0, 500, COCO_PROTOCOL)
          for system in (TEXT, BEFORE_STAGE_3, AFTER_STAGE_3)),
    ]  # fmt: skip
    folder = write(tmp_path / r"a \input{x} $y$ ~^", protocol=protocol, scores=scores)
    assert main(["tables", folder, f"output={tmp_path / 'tables'}"]) == 0
    written = capsys.readouterr().out.splitlines()
    texts = {path.name: path.read_text() for path in (tmp_path / "tables").iterdir()}
    assert sorted(line.rpartition("/")[2] for line in written) == sorted(texts)
    tables, suffixes = ("table-1-dreambench", "table-1-coco", "table-2"), ("md", "tex", "html")
    assert set(texts) == {f"{table}.{suffix}" for table in tables for suffix in suffixes}
    return texts


def test_printed_numbers_are_separate_from_ours(files):
    for suffix in ["md", "tex", "html"]:
        table = files[f"table-1-dreambench.{suffix}"]
        printed, _, ours = table.partition("dreambench/x")
        for row in DREAMBENCH:
            assert row.system in printed and all(f"{value:.3f}" in printed for value in row.values if value is not None)
        assert "0.500 (0.400–0.600)".replace("–", "--" if suffix == "tex" else "–") in ours and "750" in ours
        assert AFTER_STAGE_3 not in printed and "SuTI" not in ours


def test_table_2_has_rows_of_stage_2(files):
    table = files["table-2.md"]
    assert all(row.system in table for row in ALIGNMENT) and table.count("fails") == 2
    assert BEFORE_STAGE_3 in table and TEXT in table and AFTER_STAGE_3 not in table
    assert AFTER_STAGE_3 in files["table-1-coco.md"] and all(row.system in files["table-1-coco.md"] for row in COCO)


def test_names_are_escaped_and_columns_agree(files):
    table = files["table-1-dreambench.tex"]
    name = r"a \textbackslash{}input\{x\} \$y\$ \textasciitilde{}\textasciicircum{}"
    assert rf"{name}: dreambench/x\_y@1\#aa\&aa" in table and r"DINO $\uparrow$" in table
    rows = [line for line in table.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {4} and len(rows) == len(DREAMBENCH) + 3
    assert "| a\\|b c | – |" in files["table-1-dreambench.md"]
    for name, table in files.items():
        for block in re.findall(r"(?:^\|.*\n)+", table, re.M) if name.endswith(".md") else []:
            assert len({line.replace("\\|", "").count("|") for line in block.splitlines()}) == 1


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
def test_runs_are_named_after_ablation_and_seed(tiny_model, tiny_stable_diffusion, tmp_path, config, name, stage):
    folder = write_run(tmp_path / "run", tiny_model, **config)
    system = run_system(folder, str(tiny_stable_diffusion), torch.device("cpu"))
    assert system.name == name and system.stage == stage


def test_patterns_select_finished_runs(tiny_model, tmp_path):
    folders = [write_run(tmp_path / name, tiny_model) for name in ("b-seed-0", "a-seed-1", "a-seed-0")]
    (folders[1] / "finished.json").unlink()
    assert run_folders([str(tmp_path / "*"), str(folders[0])]) == [folders[2], folders[0]]
    assert run_folders([str(tmp_path / "nothing-*"), str(folders[0])]) == [folders[0]]
    with pytest.raises(EvaluationError, match=r"a-seed-1' is not a finished run folder"):
        run_folders([str(folders[1])])
    with pytest.raises(EvaluationError, match=r"no finished run folder matches .*nothing-\*'"):
        run_folders([str(tmp_path / "nothing-*")])


def test_scores_have_the_fields_of_their_run(arguments, tiny_model, tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / "runs" / f"{seed}", tiny_model, ablation="decoder_12_layers", seed=seed)
    options = ["dreambench=null", "models.before_stage_3=null", "models.after_stage_3=null"]
    options += [f"output={tmp_path / 'evaluation'}", f"models.runs=['{tmp_path}/runs/*']"]
    config = load_config([*arguments, *options], EvaluationConfig)
    scores = evaluate(config)
    assert scores == read_results(tmp_path / "evaluation" / "results.json")
    assert {(s.system, s.experiment, s.stage, s.seed) for s in scores if s.metric == "fid"} == {
        ("Real images", None, None, None),
        (TEXT, None, None, None),
        ("decoder_12_layers, seed 0", "decoder_12_layers", "alignment", 0),
        ("decoder_12_layers, seed 1", "decoder_12_layers", "alignment", 1),
    }
    assert "decoder_12_layers, seed 1" in (tmp_path / "evaluation" / "report.html").read_text()
    with Image.open(tmp_path / "evaluation" / "sheets" / "captions.png") as sheet:
        assert sheet.width // (CELL + GAP) == 3, "caption, Stable Diffusion, and one run of the experiment"
    config.models.runs.append(str(write_run(tmp_path / "twice", tiny_model, ablation="decoder_12_layers")))
    with pytest.raises(EvaluationError, match=r"twice' is a second run called 'decoder_12_layers, seed 0'"):
        evaluate(config)


def runs(experiment: str, seed: int, fid: float, stage: str = "alignment") -> list[Score]:
    run = (COCO_PROTOCOL, experiment, stage, seed)
    name = f"{experiment}, seed {seed}"
    return [
        Score("coco", name, "fid", fid, fid - 1, fid + 1, 500, *run),
        Score("coco", name, "clip_t", fid / 100, 0.0, 0.2, 500, *run),
    ]


def table_2(*folders: str, output: Path) -> list[list[str]]:
    """Write the tables and return the title and rows of each group of Table 2."""
    assert main(["tables", *folders, f"output={output}"]) == 0
    blocks = (output / "table-2.md").read_text().split("\n\n")
    return [[title, *rows.splitlines()[2:]] for title, rows in zip(blocks[1::2], blocks[2::2], strict=False)]


def test_seeds_are_averaged_in_the_papers_order(tmp_path):
    scores = [Score("coco", TEXT, "fid", 6.66, 5.0, 8.0, 500, COCO_PROTOCOL), *runs("without_l_rec", 0, 13.0)]
    scores += [score for seed in (0, 1, 2) for score in runs("alignernet_24_layers", seed, 9 + seed)]
    scores += [*runs("decoder_12_layers", 0, 12.0), *runs("weighting_sds", 0, 7.0, stage="instruction_tuning")]
    printed, fixed, averaged, every = table_2(write(tmp_path / "one", scores=scores), output=tmp_path / "tables")
    assert "| AlignerNet of 24 layers | 9.55 | – | – |" in printed and str(printed).count("fails") == 2
    assert fixed[1:] == ["| Stable Diffusion (text) | 6.66 (5.00–8.00) | – | 500 |"]
    assert averaged == [
        f"one: {COCO_PROTOCOL}; mean over seeds (lowest–highest of a seed):",
        "| Decoder of 12 layers alone | 12.00 | 0.120 | 1 seed × 500 |",
        "| AlignerNet of 24 layers | 10.00 (9.00–11.00) | 0.100 (0.090–0.110) | 3 seeds × 500 |",
        "| without_l_rec | 13.00 | 0.130 | 1 seed × 500 |",
    ]
    assert every[2:4] == [
        "| AlignerNet of 24 layers, seed 0 | 9.00 (8.00–10.00) | 0.090 (0.000–0.200) | 500 |",
        "| AlignerNet of 24 layers, seed 1 | 10.00 (9.00–11.00) | 0.100 (0.000–0.200) | 500 |",
    ]
    assert "weighting_sds" not in str(every)
    assert "weighting_sds" in (tmp_path / "tables" / "table-1-coco.md").read_text()


def test_seeds_of_comparable_evaluations_are_averaged(tmp_path):
    folders = [
        write(tmp_path / f"seed-{seed}", scores=runs("alignernet_24_layers", seed, 9.0 + seed)) for seed in (0, 1)
    ]
    other = write(tmp_path / "other", scores=runs("alignernet_24_layers", 2, 99.0), **{"coco.fid": "another"})
    _, together, _, alone, _ = table_2(*folders, other, output=tmp_path / "tables")
    assert together[0].startswith("seed-0, seed-1: coco/x") and "9.50 (9.00–10.00)" in together[1]
    assert alone[1:] == ["| AlignerNet of 24 layers | 99.00 | 0.990 | 1 seed × 500 |"]
