"""Toyland on disk: the same bytes whoever draws it, resumed part by part, and read by the ordinary DataModules."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.indexed_shards import IndexedShards
from datamodules.sample import SCHEMA_VERSION
from datamodules.toyland.__main__ import main

SMALL = [
    "configs/toyland/data_short.yaml",
    "text.train=6", "captions.train=6", "interleaved.train=4", "constructed.train=5", "edit.train=5",
    *(f"{part}.val=2" for part in ("text", "captions", "interleaved", "constructed", "edit")),
    "dreambench.objects=2", "dreambench.live=1", "coco.images=6",
]  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "toyland"
    assert main([*SMALL, f"output={folder}", "processes=1"]) == 0
    return folder


def test_two_processes_write_what_one_does(world, tmp_path):
    other = tmp_path / "toyland"
    assert main([*SMALL, f"output={other}", "processes=2"]) == 0
    assert digests(other) == digests(world)


def test_what_stands_is_reused_and_what_is_missing_drawn_again(world, tmp_path):
    import shutil

    copy = tmp_path / "toyland"
    shutil.copytree(world, copy)
    shutil.rmtree(copy / "coco")
    kept = (copy / "dreambench" / "dreambench.json").stat().st_mtime_ns
    assert main([*SMALL, f"output={copy}", "processes=1"]) == 0
    assert digests(copy) == digests(world)
    assert (copy / "dreambench" / "dreambench.json").stat().st_mtime_ns == kept


def test_another_configuration_does_not_pass_for_this_one(world, capsys):
    assert main([*SMALL, f"output={world}", "seed=1"]) == 2
    assert "seed was 0 and is now 1" in capsys.readouterr().err


def test_every_part_has_its_samples(world):
    for part, count in {"text": 6, "captions": 6, "interleaved": 4, "constructed": 5, "edit": 5}.items():
        assert len(IndexedShards(str(world / "shards" / part / "train-*.tar"))) == count
        assert len(IndexedShards(str(world / "shards" / part / "val-*.tar"))) == 2
    assert SCHEMA_VERSION == 1


def test_dreambench_has_the_facts_and_the_images(world):
    facts = json.loads((world / "dreambench" / "dreambench.json").read_text())
    assert [s["kind"] for s in facts["subjects"].values()].count("live") == 1 and len(facts["subjects"]) == 3
    for kind in ("object", "live"):
        assert len(facts["prompts"][kind]["original"]) == len(facts["prompts"][kind]["modified"]) == 25
    for name, about in facts["subjects"].items():
        images = sorted((world / "dreambench" / name).glob("*.png"))
        assert len(images) == 4 and (world / "dreambench" / name / about["kept_image"]) in images
        assert len({np.asarray(Image.open(image)).tobytes() for image in images}) == 4


def test_coco_is_in_the_published_layout(world):
    captions = json.loads((world / "coco" / "annotations" / "captions_val2014.json").read_text())
    ids = {image["id"] for image in captions["images"]}
    assert len(ids) == 6 and {a["image_id"] for a in captions["annotations"]} <= ids
    assert all((world / "coco" / "val2014" / image["file_name"]).exists() for image in captions["images"])
