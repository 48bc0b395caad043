"""Every benchmark runs at the smallest size and says what it promises; how fast it went is not asked."""

import json

import pytest

from benchmarks.__main__ import main
from benchmarks.report import with_section

MEASURED = ("stage1", "stage2", "stage3", "sampling", "evaluation")


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURED)
def test_benchmark_runs_and_reports(name: str, capsys: pytest.CaptureFixture) -> None:
    assert main([name, "--json", "size=tiny", "repetitions=1", "scaling=false"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["benchmark"] == name
    assert result["ratio"]["low"] <= result["ratio"]["median"] <= result["ratio"]["high"]
    assert result["seconds"]["ours"] > 0 and result["seconds"]["theirs"] > 0
    assert result["memory"]["ours_bytes"] > 0 and result["ceiling"]["share_of_ours"] > 0
    assert len(result["levers"]) > 1
    for lever in result["levers"]:
        assert lever["lever"] and lever["ratio"]["median"] > 0


@pytest.mark.slow
def test_processes_are_measured_together(capsys: pytest.CaptureFixture) -> None:
    assert main(["processes", "--json", "size=tiny", "repetitions=2"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {row["strategy"] for row in result["rows"]} == {"none", "ddp", "fsdp2"}
    for row in result["rows"]:
        assert row["seconds"] > 0 and row["ratio"]["low"] <= row["ratio"]["high"]
        if row["processes"] == 1:
            assert row["ratio"]["median"] == 1


def test_mistakes_are_answered(capsys: pytest.CaptureFixture) -> None:
    assert main(["stage4"]) == 2
    assert "stage1|stage2" in capsys.readouterr().err
    assert main(["stage2", "size=huge"]) == 2
    assert "size=huge is unknown; allowed: cpu, gpu, tiny" in capsys.readouterr().err


def test_a_page_keeps_its_words_around_a_section_that_is_written_anew() -> None:
    page = with_section("# Page\n\nWords.\n", "stage2 cpu", "| 1 |")
    page = with_section(page + "\nMore words.\n", "stage3 cpu", "| 2 |")
    again = with_section(page, "stage2 cpu", "| 3 |")
    assert "| 1 |" not in again and "Words." in again and "More words." in again
    assert again.index("| 3 |") < again.index("More words.") < again.index("| 2 |")
