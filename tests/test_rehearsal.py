"""docs/recipes.md: its commands are read, are configurations of today, and one recipe is followed to its pictures."""

import shlex
from pathlib import Path

import pytest

from kosmosg.config import load_config
from tests import rehearsal
from train import stage_schema


def test_trainings_of_the_page_are_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(rehearsal.REPOSITORY)
    commands = [shlex.split(command) for known in rehearsal.recipes().values() for command in known]
    trainings = [words[words.index("train.py") + 1 :] for words in commands if "train.py" in words]
    started = [load_config(words[words[0] == "cache" :], stage_schema) for words in trainings if words[0] != "export"]
    assert {config.stage for config in started} == {"alignment", "instruction_tuning"} and len(started) >= 8
    assert rehearsal.recipes().keys() == {"A", "B", "C"}


def test_a_command_that_fails_fails_the_rehearsal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    page = tmp_path / "page.md"
    page.write_text("## A. One\n```bash\nkosmosg inspect \\\n    nowhere\n```\n")
    known = rehearsal.recipes(page)
    assert known == {"A": ["kosmosg inspect nowhere"]}
    monkeypatch.setattr(rehearsal, "recipes", lambda: known)
    monkeypatch.setattr(rehearsal, "write_models", lambda folder: None)
    assert rehearsal.main([f"--folder={tmp_path / 'work'}"]) == 1
    error = capsys.readouterr().err
    assert "kosmosg inspect nowhere" in error and "kosmosg: 'nowhere' does not exist" in error


@pytest.mark.slow
def test_one_gpu_is_followed_to_its_pictures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert rehearsal.main(["B", f"--folder={tmp_path}"]) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert told.count("resumed]") == 2 and (tmp_path / "pictures.png").is_file()
    work = tmp_path / "B"
    assert len(list((work / "pictures/beach").glob("*.png"))) == 4
    assert list((work / "data/instructions").glob("*.latents-*.safetensors"))
    assert (work / "runs/evaluation/results.json").is_file()
