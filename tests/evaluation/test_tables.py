"""The paper's tables from finished evaluations."""

import re

import pytest

from evaluate import main
from evaluation.images.systems import BEFORE_STAGE_3, TEXT_SYSTEMS
from evaluation.reports.paper import ALIGNMENT, COCO, DREAMBENCH
from evaluation.reports.tables import results_markdown
from evaluation.scores.results import Score, write_results
from kosmosg.models.stable_diffusion import StableDiffusion
from tests.evaluation.test_compare import AFTER, write
from tests.evaluation.test_report import NO_PARTS

STABLE_DIFFUSION_TEXT = TEXT_SYSTEMS[StableDiffusion]


@pytest.fixture
def files(tmp_path, capsys):
    folder = write(tmp_path / "run", protocol="dreambench/x_y@1#aa&aa")
    scores = [
        Score("dreambench", AFTER, "dino", 0.5, 0.4, 0.6, 750, "dreambench/x_y@1#aa&aa"),
        Score("dreambench", AFTER, "clip_t", 0.3, 0.2, 0.4, 750, "dreambench/x_y@1#aa&aa"),
        *(Score("coco", system, "fid", 7.0, 6.0, 8.0, 500, "coco/x@1#bbbb")
          for system in (STABLE_DIFFUSION_TEXT, BEFORE_STAGE_3, AFTER)),
    ]  # fmt: skip
    write_results(scores, folder / "results.json")
    assert main(["tables", str(folder), f"output={tmp_path / 'tables'}"]) == 0
    written = capsys.readouterr().out.splitlines()
    found = {path.name: path.read_text() for path in (tmp_path / "tables").iterdir()}
    assert sorted(line.rpartition("/")[2] for line in written) == sorted(found)
    return found


def test_all_three_forms_of_each_table(files):
    names = {f"{table}.{suffix}" for table in ("table-1-dreambench", "table-1-coco", "table-2")
             for suffix in ("md", "tex", "html")}  # fmt: skip
    assert set(files) == names


def test_printed_numbers_stand_apart_from_ours(files):
    for suffix in ["md", "tex", "html"]:
        table = files[f"table-1-dreambench.{suffix}"]
        printed, _, ours = table.partition("dreambench/x")
        for row in DREAMBENCH:
            assert row.system in printed and all(f"{value:.3f}" in printed for value in row.values if value is not None)
        assert "0.500 (0.400–0.600)".replace("–", "--" if suffix == "tex" else "–") in ours and "750" in ours
        assert AFTER not in printed and "SuTI" not in ours


def test_table_2_is_of_stage_2(files):
    table = files["table-2.md"]
    assert all(row.system in table for row in ALIGNMENT) and table.count("fails") == 2
    assert BEFORE_STAGE_3 in table and STABLE_DIFFUSION_TEXT in table and AFTER not in table
    assert AFTER in files["table-1-coco.md"] and all(row.system in files["table-1-coco.md"] for row in COCO)


def test_latex_is_escaped_and_balanced(files):
    table = files["table-1-dreambench.tex"]
    assert r"run: dreambench/x\_y@1\#aa\&aa" in table and r"DINO $\uparrow$" in table
    rows = [line for line in table.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {4} and len(rows) == len(DREAMBENCH) + 2


def test_names_are_escaped(tmp_path, capsys):
    """A folder may be called what it likes: nothing of it is a command of LaTeX or a column of Markdown."""
    names = {
        r"a \input{x} $y$ ~^": r"a \textbackslash{}input\{x\} \$y\$ \textasciitilde{}\textasciicircum{}",
        "a|b\nc": "a|b c",
    }
    for name, latex in names.items():
        folder = write(tmp_path / name, protocol="dreambench/x@1#aa")
        assert main(["tables", str(folder), f"output={tmp_path / 'tables'}"]) == 0
        assert latex + ": dreambench" in (tmp_path / "tables" / "table-1-dreambench.tex").read_text()
    row = Score("dreambench", "a|b\nc", "dino", 0.5, 0.4, 0.6, 750, "p@1#0")
    assert "| a\\|b c | 0.500 (0.400–0.600) |" in results_markdown([row], [], NO_PARTS)


def test_markdown_columns_agree(files):
    for name, table in files.items():
        if name.endswith(".md"):
            for block in re.findall(r"(?:^\|.*\n)+", table, re.M):
                assert len({line.count("|") for line in block.splitlines()}) == 1


def test_nothing_to_write(tmp_path, capsys):
    folder = write(tmp_path / "run")
    write_results([], folder / "results.json")
    assert main(["tables", str(folder)]) == 2
    assert "no scores for any of the paper's tables" in capsys.readouterr().err
    assert main(["tables"]) == 2
    assert "1 or more different evaluations" in capsys.readouterr().err
