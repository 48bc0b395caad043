"""Toyland through the whole curation: what comes out, what is resumed, what is refused."""

import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from datamodules.curation.toyland import iou, true_mask
from datamodules.images import load
from datamodules.toyland.samples import sample_generator
from datamodules.toyland.scene import render, sample_scene
from tests.conftest import REPOSITORY
from tests.datamodules.curation import world


@pytest.fixture(scope="module")
def toyland(tmp_path_factory: pytest.TempPathFactory) -> str:
    return world.write_toyland(tmp_path_factory.mktemp("captions"))


@pytest.fixture(scope="module")
def curated(toyland: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("curated") / "set"
    assert world.curate(toyland, output) == 0
    return output


@pytest.fixture
def copy(curated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(curated, tmp_path / "set"))


def test_pictures_become_constructed_samples(curated):
    counts = world.manifest(curated)["curation"]
    found = world.samples(curated)
    assert counts["images"] == world.IMAGES == counts["written"] + sum(counts["filtered"].values())
    assert len(found) == counts["written"] and counts["failed"] == {}
    assert sum(len(sample.entities) for sample, _ in found) == counts["entities"]["written"] == counts["mask_iou"]["n"]
    for sample, record in found:
        assert load(sample.target).size == (32, 32)
        assert record["source"]["shard"].startswith("train-") and record["source"]["key"].isdigit()
        for entity, told in zip(sample.entities, record["entities"], strict=True):
            assert entity.text in sample.caption
            left, top, right, bottom = told["box"]
            assert load(entity.background).size == load(entity.white).size == (right - left, bottom - top)


def test_masks_are_recovered_from_bad_heat(curated):
    scores = world.manifest(curated)["curation"]["mask_iou"]
    assert 0.9 < scores["mean"] < 1 and scores["least"] > 0.7


@pytest.mark.parametrize("reach", [0, 3])
def test_the_masks_are_worth_what_threshold_dilation_and_largest_region_make_of_them(toyland, tmp_path, reach):
    clean = ("toyland.blur=0", "toyland.noise=0", "toyland.specks=0", "toyland.heat_side=32")
    assert world.curate(toyland, tmp_path / "set", *clean, f"crops.dilation={reach / 32}") == 0
    seen = []
    for _, record in world.samples(tmp_path / "set"):
        scene = sample_scene(sample_generator(0, "captions", "train", int(record["source"]["key"])))
        for told in record["entities"]:
            true = true_mask(scene, render(scene).masks, told["text"])
            wide = ndimage.maximum_filter(true, reach) if reach else true
            regions, count = ndimage.label(wide)
            largest = max(((regions == i + 1) for i in range(count)), key=np.sum)
            assert told["iou"] == iou(largest, true)
            seen.append(told["iou"])
    assert max(seen) == 1.0 if reach == 0 else max(seen) < 0.9


def test_a_finished_curation_is_left_alone(toyland, copy, capsys):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*.tar")}
    assert world.curate(toyland, copy) == 0
    assert "stands" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*.tar")} == before


def test_a_chunk_without_a_record_is_done_again_and_others_are_kept(toyland, curated, copy):
    (copy / "train.manifest.json").unlink()
    (copy / "curation" / "records" / "000001.json").unlink()
    (copy / "train-000001.tar").write_bytes(b"half a shard")
    (copy / "curation" / "scratch" / "000001-cut-off").mkdir(parents=True)
    kept = (copy / "train-000002.tar").stat().st_mtime_ns
    assert world.curate(toyland, copy) == 0
    assert world.digests(copy) == world.digests(curated)
    assert (copy / "train-000002.tar").stat().st_mtime_ns == kept
    assert not (copy / "curation" / "scratch").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("crops.threshold=0.5", "crops.threshold was 0.4 and is now 0.5"),
        ("seed=1", "seed was 0 and is now 1"),
        ("input.chunk_size=5", "input.chunk_size was 4 and is now 5"),
    ],
)
def test_another_configuration_is_refused(toyland, curated, capsys, change, told):
    before = world.digests(curated)
    assert world.curate(toyland, curated, change) == 2
    assert told in capsys.readouterr().err and world.digests(curated) == before


def test_other_pictures_and_another_toyland_are_refused(curated, tmp_path, capsys):
    other = world.write_toyland(tmp_path / "other", count=6)
    assert world.curate(other, curated) == 2
    assert "input was" in capsys.readouterr().err
    assert world.curate(other, tmp_path / "set", "toyland.seed=7") == 2
    assert "not_toyland" in capsys.readouterr().err


def test_a_mistake_that_made_nothing_may_be_mended_in_place(toyland, tmp_path, capsys):
    assert world.curate(toyland, tmp_path / "set", "masks.by=clipseg", "masks.model=/nowhere") == 2
    assert "masks.model='/nowhere'" in capsys.readouterr().err
    (tmp_path / "set" / "train-000000.tar").write_bytes(b"killed before its record")
    assert world.curate(toyland, tmp_path / "set", "input.chunk_size=8") == 0
    assert world.samples(tmp_path / "set")


def test_a_second_launch_and_a_foreign_folder_are_refused(toyland, copy, tmp_path, capsys):
    with open(copy / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert world.curate(toyland, copy) == 2
    assert "another process is writing" in capsys.readouterr().err
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "other-000000.tar").write_bytes(b"")
    assert world.curate(toyland, tmp_path / "foreign") == 2
    assert "somebody else" in capsys.readouterr().err


def test_the_report_tells_counts_cost_and_that_it_extrapolates(curated):
    text = (curated / "curation" / "report.md").read_text()
    counts = world.manifest(curated)["curation"]
    assert f"{counts['written']} of {world.IMAGES} images" in text
    assert "extrapolation, not a measurement" in text and "9,000,000" in text and "| masks |" in text
    assert (curated / "curation" / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_ray_missing_is_told_with_its_extra(toyland, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    assert world.curate(toyland, tmp_path / "set", "engine=ray") == 2
    assert "kosmosg[curate]" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_again_and_again_it_loses_and_doubles_nothing(toyland, curated, tmp_path):
    output = tmp_path / "set"
    context = multiprocessing.get_context("fork")
    killed = 0
    for wanted in (1, 2, 4):
        process = context.Process(target=world.curate, args=(toyland, output))
        process.start()
        deadline = time.monotonic() + 120
        # Right after a record, and in the midst of a shard: wherever the next chunk is by then.
        while len(list((output / "curation" / "records").glob("*.json"))) < wanted and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed == 3 and not (output / "train.manifest.json").exists()
    assert world.curate(toyland, output) == 0
    assert world.digests(output) == world.digests(curated)
    assert len({json.dumps(record["source"]) for _, record in world.samples(output)}) == len(world.samples(output))


@pytest.mark.slow
def test_ray_writes_the_bytes_of_the_local_runner(toyland, curated, tmp_path, monkeypatch):
    if os.environ.get("CI") != "true":
        pytest.importorskip("ray", reason="the extra [curate] is not installed")
    monkeypatch.chdir(REPOSITORY)
    pools = ("engine=ray", "ray.cpus=3", "ray.prepare.actors=2")
    assert world.curate(toyland, tmp_path / "set", *pools) == 0
    assert world.digests(tmp_path / "set") == world.digests(curated)
