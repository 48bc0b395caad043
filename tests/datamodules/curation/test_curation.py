"""Toyland through the whole curation: what comes out, what is resumed, what is refused."""

import fcntl
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from datamodules.curation.config import Curation, Toyland
from datamodules.curation.rows import attempt, new_row
from datamodules.curation.toyland import GroundTruth
from datamodules.images import encode_png, load
from datamodules.toyland.scene import Scene, render
from kosmosg.config import load_config
from tests.conftest import REPOSITORY
from tests.datamodules.curation import tiny_models, world


@pytest.fixture(scope="module")
def toyland(tmp_path_factory: pytest.TempPathFactory) -> str:
    return world.write_toyland(tmp_path_factory.mktemp("captions"))


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Arguments for one model in an actor: a safety checker that finds nothing."""
    checker = tiny_models.write_safety_checker(tmp_path_factory.mktemp("checker"), strict=False)
    return ("safety.enabled=true", f"safety.model={checker}", "safety.dtype=float32")


@pytest.fixture(scope="module")
def curated(ray_address, toyland, checked, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("curated") / "set"
    assert world.curate(toyland, output, *checked) == 0
    return output


@pytest.fixture
def copy(curated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(curated, tmp_path / "set"))


def test_images_become_constructed_samples(curated):
    counts, found = world.counts(curated), world.samples(curated)
    assert counts["images"] == world.IMAGES == counts["written"] + sum(counts["filtered"].values())
    assert len(found) == counts["written"] and counts["failed"] == {}
    assert sum(len(sample.entities) for sample, _ in found) == counts["entities"] == counts["mask_iou"]["n"]
    assert 0.9 < counts["mask_iou"]["mean"] < 1 and counts["mask_iou"]["min"] > 0.7
    assert [int(record["source"]["key"]) for _, record in found] == list(range(world.IMAGES))
    for sample, record in found:
        assert load(sample.target).size == (32, 32)
        for entity, listed in zip(sample.entities, record["entities"], strict=True):
            assert entity.text in sample.caption
            left, top, right, bottom = listed["box"]
            assert load(entity.background).size == load(entity.white).size == (right - left, bottom - top)
    report = (curated / "curation" / "report.md").read_text()
    assert f"{counts['written']} of {world.IMAGES} images" in report and "| safety | 16 |" in report
    assert (curated / "curation" / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_without_ray_the_bytes_are_the_same(toyland, checked, curated, tmp_path):
    config = load_config(world.arguments(toyland, tmp_path / "set", *checked), Curation)
    assert world.digests(world.curate_here(config)) == world.digests(curated)


def test_a_chunk_without_a_record_is_done_again_and_others_are_kept(toyland, checked, curated, copy, capsys):
    (copy / "curation" / "counts.json").unlink()
    (copy / "curation" / "records" / "000000-0001.json").unlink()
    (copy / "train-000000-0001.tar").write_bytes(b"half a shard")
    (copy / "curation" / "temporary" / "cut-off").mkdir(parents=True)
    kept = (copy / "train-000000-0002.tar").stat().st_mtime_ns
    assert world.curate(toyland, copy, *checked) == 0
    assert world.digests(copy) == world.digests(curated)
    assert (copy / "train-000000-0002.tar").stat().st_mtime_ns == kept
    assert not (copy / "curation" / "temporary").exists()
    assert world.curate(toyland, copy, *checked, "max_bad_share=0.5", "safety.pool.actors=2") == 0
    assert "is finished" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_and_stopped_it_loses_and_doubles_nothing(ray_address, toyland, tmp_path):
    output = tmp_path / "set"
    command = [sys.executable, "-m", "datamodules.curation", *world.arguments(toyland, output)]
    for wanted, number, status in ((1, signal.SIGKILL, -9), (2, signal.SIGTERM, 143)):
        process = subprocess.Popen([*command, f"ray.address={ray_address}"], cwd=REPOSITORY, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while len(list((output / "curation" / "records").glob("*.json"))) < wanted and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait() == status
    assert not (output / "curation" / "counts.json").exists()
    assert world.curate(toyland, output) == 0
    uninterrupted = load_config(world.arguments(toyland, tmp_path / "uninterrupted"), Curation)
    assert world.digests(output) == world.digests(world.curate_here(uninterrupted))


def test_another_configuration_is_refused(toyland, checked, curated, capsys):
    for change, message in [
        ("crops.threshold=0.5", "crops.threshold was 0.4 and is now 0.5"),
        ("seed=1", "seed was 0 and is now 1"),
        ("input.chunk_size=5", "input.chunk_size was 4 and is now 5"),
        ("engine=ray", "'engine' was removed. Curation"),
        ("report.sheet=3", "'report' was removed. 'report.sheet' is now 'sheet'"),
        ("input.images=x", "one of input.images"),
    ]:
        before = world.digests(curated)
        assert world.curate(toyland, curated, *checked, change) == 2
        assert message in capsys.readouterr().err and world.digests(curated) == before


def test_other_images_another_program_and_a_second_launch_are_refused(curated, checked, tmp_path, capsys):
    other = world.write_toyland(tmp_path / "other", count=6)
    assert world.curate(other, curated, *checked) == 2
    assert "input was" in capsys.readouterr().err
    assert world.curate(other, tmp_path / "other") == 2
    assert "shards of another program" in capsys.readouterr().err
    with open(curated / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert world.curate(other, curated) == 2
    assert "another process is writing" in capsys.readouterr().err


def test_a_mistake_that_made_nothing_may_be_corrected_in_place(ray_address, toyland, tmp_path, capsys):
    wrong = ("safety.enabled=true", "safety.model=/nowhere")
    assert world.curate(toyland, tmp_path / "set", *wrong) == 2
    assert "safety.model='/nowhere' cannot be loaded" in capsys.readouterr().err
    assert world.curate(toyland, tmp_path / "set", *wrong, "safety.pool.actors=99") == 2
    assert "Ray has 3. Reduce pool.actors; or set ray.cpus=100" in capsys.readouterr().err
    (tmp_path / "set" / "train-000000-0000.tar").write_bytes(b"killed before its record")
    world.curate_here(load_config(world.arguments(toyland, tmp_path / "set", "input.chunk_size=8"), Curation))
    assert len(world.samples(tmp_path / "set")) == world.IMAGES


def test_without_ray_installed_the_extra_is_named(toyland, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert world.curate(toyland, tmp_path / "set") == 2
    assert "kosmosg[curate]" in capsys.readouterr().err


def test_images_of_another_toyland_fail(toyland):
    truth = GroundTruth(Toyland(), seed=0)
    rows = [new_row("s", key) | {"image": encode_png(render(Scene(())).image)} for key in ("000000001", "x")]
    failed = [attempt("caption", truth.caption, [row])[0]["dropped"] for row in rows]
    assert [drop["reason"] for drop in failed] == ["not_toyland"] * 2
