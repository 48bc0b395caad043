"""What README and docs say can be typed: commands take their arguments, and the README's files are there."""

import re
import shlex
from pathlib import Path

import pytest

import train
from evaluation.config import EvaluationConfig
from kosmosg.cli import build_parser, main
from kosmosg.config import load_config
from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
PAGES = [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("docs/*.md"))]
SCHEMAS = {"train.py": train.stage_schema, "evaluate.py": EvaluationConfig}
NO_CONFIGURATION = ("export", "score", "requests", "compare", "tables")  # commands that take folders
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_take_their_arguments(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configurations load with the overrides beside them, and `kosmosg` knows the options."""
    monkeypatch.chdir(REPOSITORY)
    commands = typed(page.read_text(), inline=page.name == "README.md")
    for text in commands:
        words = shlex.split(text, comments=True)
        if words[0] == "kosmosg":
            build_parser().parse_args(words[1:])
            continue
        program = next(word for word in words if word in SCHEMAS)
        arguments = [word for word in words[words.index(program) + 1 :] if word != "--help"]
        if arguments[:1] in (["cache"], []) or not arguments[0].startswith(NO_CONFIGURATION):
            load_config([word for word in arguments if word != "cache"], SCHEMAS[program])
    assert commands or page.name not in ("README.md", "training.md", "conversion.md", "recipes.md")


def typed(text: str, inline: bool) -> list[str]:
    """Commands of code blocks, and those in sentences; `…` stands for what is left out."""
    blocks = "\n".join(re.findall(r"```(?:sh|bash)?\n(.*?)```", text, re.DOTALL))
    found = re.sub(r"\s*\\\n\s*", " ", blocks).split("\n") + (INLINE if inline else [])
    begins = (
        r"(kosmosg (generate|convert|export|inspect|app|data|push) |((python|torchrun .*) )?(train|evaluate)\.py [^ ])"
    )
    return [line for line in found if re.match(begins, line) and "…" not in line]


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
