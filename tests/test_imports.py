"""The rooms of docs/architecture.md know each other in one direction only."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import REPOSITORY

ROOMS = ("kosmosg", "datamodules", "lightning_modules", "callbacks", "evaluation", "train", "evaluate", "tests")
ALLOWED = {
    "kosmosg": {"kosmosg"},
    "datamodules": {"datamodules", "kosmosg"},
    "lightning_modules": {"lightning_modules", "kosmosg"},
    "callbacks": {"callbacks", "lightning_modules", "kosmosg"},
    "evaluation": {"evaluation", "kosmosg"},
}
# What a user of the model must not need to install or load.
FOREIGN_TO_KOSMOSG = {"lightning", "pytorch_lightning", "wandb", "webdataset"}


def imported(file: Path) -> Iterator[str]:
    """Top-level names of everything a file imports, wherever in it; dots for a relative import."""
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level or str(node.module).split(".")[0]


def test_rooms_are_known_in_one_direction() -> None:
    files = [file for room in ALLOWED for file in sorted((REPOSITORY / room).rglob("*.py"))]
    assert {file.relative_to(REPOSITORY).parts[0] for file in files} == ALLOWED.keys()
    for file in files:
        room = file.relative_to(REPOSITORY).parts[0]
        names = set(imported(file))
        strangers = (names & set(ROOMS)) - ALLOWED[room]
        assert not strangers, f"{file.relative_to(REPOSITORY)} may not import {sorted(strangers)}"
        if room == "kosmosg":
            assert not names & FOREIGN_TO_KOSMOSG, f"kosmosg may not import {sorted(names & FOREIGN_TO_KOSMOSG)}"
        assert not any(name.startswith(".") for name in names), f"{file.relative_to(REPOSITORY)} has a relative import"


def test_processes_that_decode_or_draw_start_without_the_libraries_of_models() -> None:
    """As many are started as there are cores: `kosmosg data check` and `convert`, and Toyland."""
    modules = "datamodules.checks.check, datamodules.sources.conversion, datamodules.toyland.data_sets"
    code = f"import sys, {modules}; print(sorted({{'diffusers', 'transformers', 'lightning'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
