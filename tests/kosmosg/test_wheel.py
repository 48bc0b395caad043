"""The wheel holds kosmosg alone and works without the repository; an editable install of a clone has every room."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow

ROOMS = ("callbacks", "configs", "datamodules", "evaluation", "kosmosg", "lightning_modules")
FILES = ("LICENSE", "README.md", "evaluate.py", "pyproject.toml", "train.py")
SITE_PACKAGES = Path(sysconfig.get_paths()["purelib"])
OUTSIDE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(*command: str | Path, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, **options)


def pip(*arguments: str | Path, **options) -> None:
    done = run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, **options)
    assert done.returncode == 0, done.stdout + done.stderr


def environment(folder: Path, *install: str | Path) -> Path:
    """An empty virtual environment with what pip installs, given the dependencies of this one, but not its kosmosg."""
    assert run(sys.executable, "-m", "venv", "--without-pip", folder).returncode == 0
    backend = folder / "backend"  # the build runs in the empty environment
    backend.mkdir()
    for part in (*SITE_PACKAGES.glob("setuptools*"), SITE_PACKAGES / "_distutils_hack"):
        (backend / part.name).symlink_to(part)
    options = ("install", "--no-deps", "--no-index", "--no-build-isolation")
    pip("--python", folder / "bin" / "python", *options, *install, env=os.environ | {"PYTHONPATH": str(backend)})
    # A folder that a .pth file names is searched, but its own .pth files, as of an editable install, are not read.
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(f"{SITE_PACKAGES}\n")
    return folder / "bin"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, since a build leaves files where it runs."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ROOMS:
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(REPOSITORY / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder, clone)
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_holds_kosmosg_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"kosmosg"}
    on_disk = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "kosmosg").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == on_disk


# In one process, as libraries take seconds to load.
PROGRAM = """
import json, sys
import kosmosg
from kosmosg.cli import main

print(kosmosg.__file__)
print([main(command) for command in json.loads(sys.argv[1])])
"""


def test_the_wheel_works_by_itself(wheel, tmp_path, tiny_model, tiny_pipeline):
    empty = tmp_path / "empty"
    empty.mkdir()
    programs = environment(tmp_path / "environment", wheel)
    options = {"cwd": empty, "env": OUTSIDE}
    assert "generate" in run(programs / "kosmosg", "--help", **options).stdout

    Image.new("RGB", (70, 80), "sienna").save(empty / "dog.png")
    spm, dictionary = (str(tiny_model / "tokenizer" / name) for name in ("sentencepiece.bpe.model", "dict.txt"))
    prompt = ["<i> in the snow", "--images", "dog.png", "--steps", "2", "--output", "drawn"]
    commands = [
        ["generate", str(tiny_pipeline), *prompt],
        ["export", str(tiny_model), "model.pt"],
        ["convert", "model.pt", "out", "--spm", spm, "--dict", dictionary],
        *(["data", *arguments] for arguments in ([], ["check", "x.tar", "--json"], ["--help"])),
    ]
    done = run(programs / "python", "-c", PROGRAM, json.dumps(commands), **options)
    assert Path(done.stdout.splitlines()[0]).is_relative_to(tmp_path / "environment"), done.stderr
    assert done.stdout.endswith("[0, 0, 0, 2, 2, 2]\n"), done.stderr
    assert done.stderr.count("kosmosg: 'data' needs a clone of the repository") == 3
    assert [file.name for file in (empty / "drawn").iterdir()] == ["image-0.png"]
    assert (empty / "model.pt").is_file() and (empty / "out" / "mllm").is_dir()


def test_an_editable_install_has_every_room(clone, tmp_path):
    programs = environment(tmp_path / "environment", "--editable", clone)
    options = {"cwd": tmp_path, "env": OUTSIDE}
    done = run(programs / "kosmosg", "data", "--help", **options)
    assert done.returncode == 0 and "convert" in done.stdout, done.stderr
    code = "import importlib.util as i, sys; print(*(i.find_spec(room).origin for room in sys.argv[1:]), sep='\\n')"
    rooms = [room for room in ROOMS if room != "configs"]
    done = run(programs / "python", "-c", code, *rooms, "datamodules.toyland.data_sets", **options)
    found = [Path(line) for line in done.stdout.splitlines()]
    assert len(found) == len(rooms) + 1 and all(file.is_relative_to(clone) for file in found), done.stderr
