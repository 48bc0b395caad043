"""docs/recipes.md: one recipe is followed to its pictures; that all are configurations of today: test_readme.py."""

from pathlib import Path

import pytest

from tests import rehearsal


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
    assert capsys.readouterr().out.count("resumed]") == 2
    work = tmp_path / "B"
    assert len(list((work / "pictures/beach").glob("*.png"))) == 4
    assert list((work / "data/instructions").glob("*.latents-*.safetensors"))
    assert (work / "runs/evaluation/results.json").is_file()
