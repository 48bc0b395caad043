"""Every benchmark runs at the smallest size and says what it promises; how fast it went is not asked."""

import json
from pathlib import Path

import pytest

from benchmarks import check
from benchmarks.__main__ import main, with_section

STAGES = ("language_modelling", "alignment", "instruction_tuning")
ONE_LAYER = [
    "size=tiny",
    "repetitions=1",
    "warmup=0",
    "model.mllm.layers=1",
    "model.mllm.vision.layers=1",
    *(f"model.{part}.{half}coder_layers=1" for part in ("aligner", "aligner_decoder") for half in ("en", "de")),
]


def results(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_check_measures_parts_beside_their_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "results.jsonl"
    assert main(["check", "instruction_tuning", "sampling", *ONE_LAYER, f"output={file}"]) == 0
    found = results(file)
    assert [result["part"] for result in found] == ["instruction_tuning", "sampling"]
    for result in found:
        assert result["rows_per_second"] > 0 and result["peak_bytes"] > 0
        assert result["machine"]["versions"]["torch"]
        if result["part"] != "sampling":
            assert result["dry_run_bytes"] > 0 and result["flops_per_second"] > 0 < result["peak_flops_per_second"]
    ratio = found[-1]["ratio"]
    assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"] and found[-1]["diffusers_rows_per_second"] > 0
    assert "| instruction_tuning, eager |" in capsys.readouterr().out


@pytest.mark.slow
def test_part_that_fails_or_runs_over_is_reported_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def out_of_memory(*_: object) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(check, "size_up", out_of_memory)
    file = tmp_path / "results.jsonl"
    assert main(["check", "alignment", "sampling", *ONE_LAYER, f"output={file}"]) == 1
    assert [("problem" in result, result["part"]) for result in results(file)] == [
        (True, "alignment"),
        (False, "sampling"),
    ]
    monkeypatch.undo()
    file.unlink()
    assert main(["check", "alignment", "sampling", *ONE_LAYER, "part_seconds=0.05", f"output={file}"]) == 1
    assert all("OutOfTimeError" in result["problem"] for result in results(file))
    assert "CUDA out of memory" in capsys.readouterr().out


def of_released_sum(variant: str) -> bool:
    """Whether it reads each document alone and counts padding, as the released code does."""
    changed = "packed" in variant or "padding out" in variant
    return (variant.startswith("released") and not changed) or "kept apart" in variant


@pytest.mark.slow
def test_released_ways_compute_the_same_loss(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    assert main(["released", *ONE_LAYER, f"output={file}"]) == 0
    for stage in STAGES:
        found = [result for result in results(file) if result["part"] == stage]
        assert len(found) > 2 and all(result["seconds"] > 0 for result in found)
        assert all(result["ratio"]["low"] <= result["ratio"]["median"] <= result["ratio"]["high"] for result in found)
        theirs = [result["loss"] for result in found if of_released_sum(result["variant"])]
        ours = [result["loss"] for result in found if not of_released_sum(result["variant"])]
        groups = [theirs + ours] if stage == "instruction_tuning" else [theirs, ours]
        for losses in groups:
            assert len(losses) > 1 and losses == pytest.approx([losses[0]] * len(losses), rel=1e-5), stage


@pytest.mark.slow
def test_loader_is_measured_beside_its_parts(capsys: pytest.CaptureFixture) -> None:
    small = [
        "samples=10",
        "batches=2",
        "batch_size=5",
        "captions=60",
        "memory_captions=3000",
        "real_captions=100",
        "listed_shards=100",
    ]
    assert main(["loader", *small]) == 0
    assert "captions" in capsys.readouterr().out


def test_mistakes_are_answered(capsys: pytest.CaptureFixture) -> None:
    for arguments, message in (
        (["stage4"], "check|released|loader"),
        (["check", "size=huge"], "huge"),
        (["check", "stage4", "size=tiny"], "check has no part 'stage4'; allowed: language_modelling"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_a_page_keeps_its_words_around_a_section_that_is_written_anew() -> None:
    page = with_section("# Page\n\nWords.\n", "check cpu", "| 1 |")
    page = with_section(page + "\nMore words.\n", "released cpu", "| 2 |")
    again = with_section(page, "check cpu", "| 3 |")
    assert "| 1 |" not in again and "Words." in again and "More words." in again
    assert again.index("| 3 |") < again.index("More words.") < again.index("| 2 |")
