"""Toyland on disk: the same bytes whoever draws it, resumed part by part, and read by the evaluation."""

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules import sample as schema
from datamodules.errors import DataError
from datamodules.images import load
from datamodules.processes import interrupts_delayed, ordered_map
from datamodules.shards import list_shards
from datamodules.tar import read_shard
from datamodules.toyland import data_sets
from datamodules.toyland.__main__ import main
from datamodules.toyland.config import Captions
from datamodules.toyland.pretrained.data import LABELS, LOOKS
from evaluation.config import EvaluationConfig
from evaluation.protocols.coco import Coco
from evaluation.protocols.dreambench import DreamBench
from kosmosg.config import load_config
from tests.conftest import REPOSITORY

SHORT = str(REPOSITORY / "configs" / "toyland" / "data_short.yaml")
SMALL = [
    SHORT,
    "text.train=6", "captions.train=6", "interleaved.train=4", "constructed.train=5", "edit.train=5",
    *(f"{part}.val=2" for part in ("text", "captions", "interleaved", "constructed", "edit")),
    "dreambench.objects=2", "dreambench.live=1", "coco.images=6",
]  # fmt: skip
COUNTS = {"text": 6, "captions": 6, "interleaved": 4, "constructed": 5, "edit": 5}


def build(folder: Path, *more: str, processes: int = 1) -> int:
    return main([*SMALL, f"output={folder}", f"processes={processes}", *more])


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "toyland"
    assert build(folder) == 0
    return folder


@pytest.fixture
def copy(world: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world, tmp_path / "toyland"))


def test_what_stands_is_reused_and_what_is_missing_drawn_again(world, copy):
    shutil.rmtree(copy / "coco")
    kept = (copy / "dreambench" / "dreambench.json").stat().st_mtime_ns
    assert build(copy) == 0
    assert digests(copy) == digests(world)
    assert (copy / "dreambench" / "dreambench.json").stat().st_mtime_ns == kept


def test_an_interrupted_part_is_drawn_again_and_finished_ones_are_kept(world, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "toyland"
    edit, drawn = data_sets.samples.MAKERS["edit"], []

    def interrupted(*arguments):
        drawn.append(True)
        if len(drawn) == 6:  # the first of the held-out samples: shards of the others are complete
            raise KeyboardInterrupt
        return edit(*arguments)

    monkeypatch.setitem(data_sets.samples.MAKERS, "edit", interrupted)
    assert build(folder) == 130
    assert "continues with" in capsys.readouterr().err
    assert (folder / "shards" / "constructed").is_dir() and not (folder / "shards" / "edit").exists()
    kept = (folder / "shards" / "constructed" / data_sets.RECORD).stat().st_mtime_ns
    monkeypatch.undo()
    assert build(folder) == 0
    assert digests(folder) == digests(world)
    assert (folder / "shards" / "constructed" / data_sets.RECORD).stat().st_mtime_ns == kept


def test_what_was_built_from_something_else_is_refused_and_left_alone(world, tmp_path, capsys, monkeypatch):
    before = digests(world)
    for change, told in (
        ("seed=1", "seed was 0 and is now 1"),
        ("coco.images=8", "coco.images was 6 and is now 8"),
        ("samples_per_shard=7", "samples_per_shard was 50 and is now 7"),
    ):
        assert build(world, change) == 2
        message = capsys.readouterr().err
        assert told in message and "make clean-toyland" in message
    with monkeypatch.context() as patch:
        patch.setattr(data_sets, "world_hash", lambda: "other")
        assert build(world) == 2
    assert "and is now 'other'" in capsys.readouterr().err and digests(world) == before
    (tmp_path / "coco" / "val2014").mkdir(parents=True)
    assert build(tmp_path) == 2
    assert "was not written by this command" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"coco", ".lock"}
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert build(tmp_path) == 2
    assert "another process is writing" in capsys.readouterr().err


def test_the_hash_of_the_world_is_of_every_file_that_draws(tmp_path, monkeypatch):
    folder = Path(shutil.copytree(data_sets.FOLDER, tmp_path / "toyland", ignore=shutil.ignore_patterns("weights")))
    monkeypatch.setattr(data_sets, "FOLDER", folder)
    before, same = data_sets.world_hash(), set()
    for file in folder.glob("*.py"):
        content = file.read_text()
        file.write_text(content + "CHANGED = True\n")
        if data_sets.world_hash() == before:
            same.add(file.name)
        file.write_text(content)
    assert data_sets.world_hash() == before and same == {"__init__.py", "__main__.py", "config.py"}
    (folder / "new.py").write_text("")
    assert data_sets.world_hash() != before


def test_every_sample_decodes_with_its_images_and_says_what_it_was_built_from(world):
    records = {path.parent.name: json.loads(path.read_text()) for path in world.rglob(data_sets.RECORD)}
    assert set(records) == {*COUNTS, "dreambench", "coco"} and records["constructed"]["constructed.other_render"] == 0.5
    assert {record["world"] for record in records.values()} == {data_sets.world_hash()}
    for part, count in COUNTS.items():
        kind = {"captions": "caption"}.get(part, part)
        for split, samples in (("train", count), ("val", 2)):
            shards = list_shards(str(world / "shards" / part / f"{split}-*.tar"))
            assert len(shards) == samples
            for shard, key, members in ((path.name, *found) for path in shards.paths for found in read_shard(path)):
                decoded = schema.decode(members, shard, key, kind=kind)
                images = [
                    schema.StoredImage(content, name, shard, key) for name, content in members.items() if "png" in name
                ]
                assert [load(image).size for image in images] == [(32, 32)] * len(images)
                assert bool(images) == (kind != "text") and decoded.key == key


def test_the_evaluation_reads_it(world):
    config = load_config(
        [str(REPOSITORY / "configs" / "toyland" / "evaluation.yaml"), "coco.captions=3"], EvaluationConfig
    )
    dreambench = DreamBench(config.dreambench, world / "dreambench")
    requests = dreambench.requests()
    single = [request for request in requests if len(request.inputs) == 1]
    assert len(single) == 3 * 25 and {request.unit for request in single} == set(dreambench.subjects)
    assert len(requests) == 3 * 25 + 3
    assert [subject.kind for subject in dreambench.subjects.values()].count("live") == 1
    for name in dreambench.subjects:
        images = dreambench.real_images(name)
        assert dreambench.kept_image(name) == images[0] and len(images) == 4
        others = dreambench.others(name)
        assert len({np.asarray(Image.open(image)).tobytes() for image in (*images, *others)}) == 4 + 7
        assert dreambench.subjects[name].labels.keys() == {"kind", "colour", "pattern"}
    for prompts in dreambench.protocol.prompts.values():
        groups = {group for labels in prompts.labels for group in labels} - {"colour"}
        assert groups == set(list(LABELS)[LOOKS:])
        known = [name in LABELS[group] for labels in prompts.labels for group, name in labels.items()]
        assert len(prompts.labels) == 25 and all(known)
    coco = Coco(config.coco, world / "coco")
    assert len(coco.requests()) == len(coco.references()) == len(coco.held_out_images()) == 3
    assert not {image.file for image in coco.held_out_images()} & set(coco.references())


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_ctrl_c_stops_all_processes_and_the_next_start_goes_on(world, tmp_path, forked):
    folder, more = tmp_path / "toyland", "edit.train=3000"  # long enough to be met at work
    command = [sys.executable, "-m", "datamodules.toyland", *SMALL, f"output={folder}", "processes=2", more]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 300
    while not list((folder / "shards").glob(".edit.*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in errors and "continues with" in errors
    while group_lives(process.pid):
        assert time.monotonic() < deadline, "processes are left behind"
        time.sleep(0.1)
    assert not (folder / "shards" / "edit").exists()
    assert build(folder, processes=2) == 0
    assert digests(folder) == digests(world), "two processes write what one does"


def test_an_interrupt_that_another_thread_takes_waits_for_the_end_of_the_block():
    begun, taken, passed = threading.Event(), threading.Event(), []

    def take():
        begun.wait(timeout=60)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        taken.set()

    thread = threading.Thread(target=take)
    thread.start()  # before the block: it does not inherit the mask
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), interrupts_delayed():
            begun.set()
            assert taken.wait(timeout=60)
            passed.append(sum(range(1000)))
        assert passed and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
        thread.join()


@pytest.mark.slow
def test_a_killed_drawing_process_is_told():
    others = set(multiprocessing.active_children())
    with pytest.raises(DataError, match="one of 2 processes was killed"):
        todo = data_sets.chunks("captions", "train", 64 * 40, 0, Captions())
        for _ in ordered_map(data_sets.draw_chunk, todo, 2):
            (victim, *_) = set(multiprocessing.active_children()) - others
            victim.kill()
