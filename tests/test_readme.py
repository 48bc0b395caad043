"""What the README says can be typed: its commands and its program run as written, and every file it names is there."""

import re
import shlex
from pathlib import Path

import pytest

import evaluate
import train
from kosmosg.cli import build_parser, main
from kosmosg.config import load_config
from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
INLINE = re.findall(r"`([^`\n]+)`", README)


def test_files_and_targets_that_are_named_exist() -> None:
    named = {
        path
        for text in INLINE
        for path in re.findall(r"(?:configs|docs|datamodules|lightning_modules|kosmosg)/[\w./-]*", text)
    }
    assert len(named) > 10
    gone = [path for path in sorted(named) if "…" not in path and not list(REPOSITORY.glob(path.rstrip("/.")))]
    assert not gone
    targets = set(re.findall(r"(?:`|^)make ([a-z][a-z0-9-]+)", README, re.MULTILINE))
    rules = set(re.findall(r"^([a-z0-9-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    assert targets and targets <= rules


def test_commands_take_their_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Configurations load with the overrides beside them, and `kosmosg` knows the options."""
    monkeypatch.chdir(REPOSITORY)
    loaded = 0
    for text in INLINE:
        words = shlex.split(text)
        if "…" in text or not words:
            continue
        if words[0] == "kosmosg" and len(words) > 1:
            build_parser().parse_args(words[1:])
        elif "train.py" in words[:-1]:
            arguments = words[words.index("train.py") + 1 :]
            load_config([word for word in arguments if word != "--help"], train.stage_schema)
        else:
            continue
        loaded += 1
    assert loaded > 5 and callable(evaluate.main)


@pytest.mark.slow
def test_the_program_and_the_command_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (command,) = re.findall(r"^kosmosg generate toyland .*$", README, re.MULTILINE)
    (tmp_path / "datamodules").symlink_to(REPOSITORY / "datamodules")
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "README.md", "exec"), {})
    assert (tmp_path / "boot-in-the-snow.png").is_file()
    assert main(shlex.split(command)[1:]) == 0
    assert (tmp_path / "images" / "image-0.png").is_file()
