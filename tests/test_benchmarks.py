"""Every benchmark runs at the smallest size and says what it promises; how fast it went is not asked."""

import json

import pytest

from benchmarks.__main__ import main

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


def test_mistakes_are_answered(capsys: pytest.CaptureFixture) -> None:
    assert main(["stage4"]) == 2
    assert "stage1|stage2" in capsys.readouterr().err
    assert main(["stage2", "size=huge"]) == 2
    assert "size=huge is unknown; allowed: cpu, gpu, tiny" in capsys.readouterr().err
