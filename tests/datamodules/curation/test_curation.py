"""Toyland through the whole curation by Ray: what comes out, what is resumed, what is refused."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
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

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    """One Ray for all tests: it takes seconds to start, and some of a core while it runs."""
    if os.environ.get("CI") != "true":
        pytest.importorskip("ray", reason="the extra [curate] is not installed")
    import ray

    from datamodules.curation.run import start_ray

    start_ray(cpus=2)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="module")
def toyland(tmp_path_factory: pytest.TempPathFactory) -> str:
    return world.write_toyland(tmp_path_factory.mktemp("captions"))


@pytest.fixture(scope="module")
def curated(ray_address: str, toyland: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed, stopped and finished."""
    output = tmp_path_factory.mktemp("curated") / "set"
    command = [sys.executable, "-m", "datamodules.curation", *world.arguments(toyland, output)]
    for wanted, number, status in ((1, signal.SIGKILL, -9), (2, signal.SIGTERM, 143)):
        process = subprocess.Popen([*command, f"ray.address={ray_address}"], cwd=REPOSITORY, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while len(list((output / "curation" / "records").glob("*.json"))) < wanted:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait() == status
    assert not (output / "curation" / "counts.json").exists()
    assert world.curate(toyland, output) == 0
    return output


def test_images_become_constructed_samples(curated: Path) -> None:
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
    assert f"{counts['written']} of {world.IMAGES} images" in (curated / "curation" / "report.md").read_text()
    assert (curated / "curation" / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_however_it_was_interrupted_the_bytes_are_those_of_a_run_without_ray(curated, toyland, tmp_path, capsys):
    config = load_config(world.arguments(toyland, tmp_path / "whole"), Curation)
    expected = world.digests(world.curate_here(config))
    assert world.digests(curated) == expected
    cut = Path(shutil.copytree(curated, tmp_path / "set"))
    (cut / "curation" / "counts.json").unlink()
    (cut / "curation" / "records" / "000000-0001.json").unlink()
    (cut / "train-000000-0001.tar").write_bytes(b"half a shard")
    (cut / "curation" / "temporary" / "cut-off").mkdir(parents=True)
    kept = (cut / "train-000000-0002.tar").stat().st_mtime_ns
    assert world.curate(toyland, cut) == 0
    assert world.digests(cut) == expected and not (cut / "curation" / "temporary").exists()
    assert (cut / "train-000000-0002.tar").stat().st_mtime_ns == kept
    assert world.curate(toyland, cut, "max_bad_share=0.5", "safety.pool.actors=2") == 0
    assert "is finished" in capsys.readouterr().out


def test_a_model_in_an_actor_and_a_mistake_that_made_nothing(ray_address, toyland, tmp_path, capsys):
    """What cannot be loaded may be corrected in place; what a killed run left before its record is done again."""
    output, wrong = tmp_path / "set", ("safety.enabled=true", "safety.model=/nowhere")
    assert world.curate(toyland, output, *wrong) == 2
    assert "safety.model='/nowhere' cannot be loaded" in capsys.readouterr().err
    assert world.curate(toyland, output, *wrong, "safety.pool.actors=99") == 2
    assert "Ray has 2. Reduce pool.actors; or set ray.cpus=100" in capsys.readouterr().err
    (output / "train-000000-0000.tar").write_bytes(b"killed before its record")
    checker = tiny_models.write_safety_checker(tmp_path / "checker", strict=False)
    right = ("safety.enabled=true", f"safety.model={checker}", "safety.dtype=float32", "input.chunk_size=8")
    assert world.curate(toyland, output, *right) == 0
    assert "| safety | 16 |" in (output / "curation" / "report.md").read_text()
    whole = world.curate_here(load_config(world.arguments(toyland, tmp_path / "whole", *right), Curation))
    assert world.digests(whole) == world.digests(output) and len(world.samples(output)) == world.IMAGES


REFUSALS = (
    ("crops.threshold=0.5", "crops.threshold was 0.4 and is now 0.5"),
    ("seed=1", "seed was 0 and is now 1"),
    ("input.chunk_size=5", "input.chunk_size was 4 and is now 5"),
    ("input.shards={other}", "input was"),
    ("input.images=x", "one of input.images"),
    ("engine=ray", "'engine' was removed. Curation"),
    ("report.sheet=3", "'report' was removed. 'report.sheet' is now 'sheet'"),
    ("input.shards={other} output={foreign}", "shards of another program"),
    ("output={locked}", "another process is writing"),
    ("output={new}", "kosmosg[curate]"),
)


def test_what_is_refused_leaves_everything_as_it_is(curated, toyland, tmp_path, capsys, monkeypatch, subtests):
    places = {name: tmp_path / name for name in ("foreign", "locked", "new")}
    places["other"] = world.write_toyland(places["foreign"], count=6)
    places["locked"].mkdir()
    monkeypatch.setitem(sys.modules, "ray", None)
    before = world.digests(curated)
    with open(places["locked"] / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for given, message in REFUSALS:
            with subtests.test(given):
                assert world.curate(toyland, curated, *given.format(**places).split()) == 2
                assert message in capsys.readouterr().err and world.digests(curated) == before


def test_images_of_another_toyland_fail(toyland):
    truth = GroundTruth(Toyland(), seed=0)
    rows = [new_row("s", key) | {"image": encode_png(render(Scene(())).image)} for key in ("000000001", "x")]
    failed = [attempt("caption", truth.caption, [row])[0]["dropped"] for row in rows]
    assert [drop["reason"] for drop in failed] == ["not_toyland"] * 2
