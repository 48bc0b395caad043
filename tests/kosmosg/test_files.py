"""kosmosg/files.py: the old one or the new one, whole; also through kill -9, on a full disk, without exchange."""

import os
import signal
import sys
from pathlib import Path

import pytest

from kosmosg import files
from kosmosg.files import clear_leftovers, replaced, write_json, write_text
from tests.lightning_modules.processes import run_together


def fill(path: Path, text: str, folder: bool) -> Path:
    if folder:
        (path / "inner").mkdir(parents=True)
        path = path / "inner" / "content"
    path.write_text(text)
    return path


def read(path: Path) -> str:
    return (path / "inner" / "content" if path.is_dir() else path).read_text()


@pytest.fixture(params=[True, False], ids=["exchange", "two renames"])
def exchange(request, monkeypatch):
    """Both ways of replacing a folder: Linux's, and that of systems without it."""
    if not request.param:
        monkeypatch.setattr(files.sys, "platform", "other")


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_replaces_and_leaves_nothing(tmp_path, folder, exchange):
    target = tmp_path / "new" / "target"
    for text in ("first", "second"):
        with replaced(target) as temporary:
            assert temporary.parent == target.parent and temporary.name.startswith(".")
            fill(temporary, text, folder)
            assert not target.exists() or read(target) == "first"
        assert read(target) == text
        assert os.listdir(target.parent) == ["target"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_an_exception_leaves_the_old_one_alone(tmp_path, folder, error, exchange):
    fill(tmp_path / "target", "old", folder)
    with pytest.raises(error), replaced(tmp_path / "target") as temporary:
        fill(temporary, "new", folder)
        raise error
    assert read(tmp_path / "target") == "old"
    assert os.listdir(tmp_path) == ["target"]


def test_a_folder_takes_the_place_of_a_link_and_leaves_what_it_points_to(tmp_path, exchange):
    fill(tmp_path / "other", "other", folder=True)
    (tmp_path / "target").symlink_to(tmp_path / "other")
    with replaced(tmp_path / "target") as temporary:
        fill(temporary, "new", folder=True)
    assert not (tmp_path / "target").is_symlink() and read(tmp_path / "target") == "new"
    assert read(tmp_path / "other") == "other"
    assert sorted(os.listdir(tmp_path)) == ["other", "target"]


def test_a_file_never_replaces_a_folder(tmp_path):
    fill(tmp_path / "target", "old", folder=True)
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path / "target", "new")
    assert read(tmp_path / "target") == "old"
    assert os.listdir(tmp_path) == ["target"]


def test_names_as_long_as_the_file_system_takes(tmp_path):
    write_text(tmp_path / ("ä" * 127), "text")
    assert os.listdir(tmp_path) == ["ä" * 127]


def test_json_is_utf8(tmp_path):
    write_json(tmp_path / "x.json", {"name": "Käse"})
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == '{\n  "name": "Käse"\n}\n'


EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "open", "ctypes.dlsym", "shutil.rmtree")


def replace_and_die(target: Path, last: int) -> None:
    """Write the folder anew; killed when so many file operations are done."""
    events = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal events
        if event in EVENTS:
            events += 1
            if events > last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    with replaced(target) as temporary:
        for name in ("one", "two"):
            (temporary / name).mkdir(parents=True)
            (temporary / name / "content").write_text("new")


def test_killed_anywhere_there_is_the_old_one_or_the_new_one(tmp_path, exchange, request):
    target, states = tmp_path / "parent" / "target", set()
    for last in range(60):
        for name in ("one", "two"):
            if not (target / name).exists():
                (target / name).mkdir(parents=True)
            (target / name / "content").write_text("old")
        [code] = run_together(1, lambda last=last: replace_and_die(target, last), tmp_path / "log")
        if request.node.callspec.id == "exchange":
            assert target.exists()
        clear_leftovers(target.parent)
        assert os.listdir(target.parent) == ["target"]
        texts = {(target / name / "content").read_text() for name in ("one", "two")}
        assert len(texts) == 1
        states.add((code, *texts))
        if code == 0:
            break
    assert states == {(-signal.SIGKILL, "old"), (-signal.SIGKILL, "new"), (0, "new")}


def test_two_processes_write_one_file(tmp_path):
    """The last one wins; none meets the other's temporary."""
    with replaced(tmp_path / "x") as first, replaced(tmp_path / "x") as second:
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "x").read_text() == "first"
    assert os.listdir(tmp_path) == ["x"]
