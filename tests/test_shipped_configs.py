"""Every shipped configuration fits its program, by the commands in its own header."""

import re
import shlex
from pathlib import Path

import pytest

import train
from datamodules.curation.config import Curation
from datamodules.toyland.__main__ import DEFAULTS, ToylandData
from evaluation.config import EvaluationConfig
from kosmosg.config import load_config
from tests.conftest import REPOSITORY

SCHEMAS = {
    "train.py": train.stage_schema,
    "evaluate.py": EvaluationConfig,
    "datamodules.curation": Curation,
    "datamodules.toyland": ToylandData,
}
COMMAND = re.compile(r"^#   .*?(train\.py|evaluate\.py|-m \S+) (.*?)(?:  +#.*)?$", re.MULTILINE)
FILES = sorted(REPOSITORY.glob("configs/**/*.yaml"))
# What other files extend, what W&B reads, and what a program reads by itself; other tests load them.
PIECES = (
    "protocols/",
    "sweeps/",
    "model/kosmosg",
    "model/toyland",
    "ablations/run",
    "table_2/run",
    "toyland/data.yaml",
)


def commands(file: Path) -> list[tuple[str, list[str]]]:
    """Program and arguments of each command in the comment at a file's head."""
    head = re.split(r"^(?!#)", file.read_text(), maxsplit=1, flags=re.MULTILINE)[0]
    found = COMMAND.findall(re.sub(r"\s*\\\n#\s+", " ", head))
    return [(program.removeprefix("-m "), shlex.split(rest)) for program, rest in found]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(REPOSITORY / "configs")))
def test_the_commands_of_a_shipped_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    name, named = str(file.relative_to(REPOSITORY)), False
    for program, arguments in commands(file):
        if arguments[:1] == ["tables"]:
            continue
        named |= name in arguments
        given = {"train.py": ["run=r"], "datamodules.toyland": [DEFAULTS]}.get(program, [])
        load_config([*given, *arguments], SCHEMAS[program])
    assert named or any(piece in name for piece in PIECES), "a header shows the command that reads the file"


@pytest.mark.parametrize("stage", train.STAGES)
def test_short_forms_fit_every_stage(stage: str) -> None:
    for form, steps in (("short", 4), ("half", 400)):
        files = [str(REPOSITORY / "configs" / "toyland" / f"{name}.yaml") for name in (stage, form)]
        experiment = load_config(files, train.stage_schema)
        assert (experiment.stage, experiment.trainer.max_steps) == (stage, steps)
