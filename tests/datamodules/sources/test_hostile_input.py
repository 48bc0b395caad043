"""Documents and lists that name what they should not, and bombs: refused or bounded, never followed."""

import gzip
import json
import os
import pickle
import sys
from pathlib import Path

import pytest

from datamodules.errors import DataError
from tests.datamodules.bad_inputs import Marker, bomb
from tests.datamodules.sources import published
from tests.datamodules.sources.published import convert, samples


def test_hostile_documents_are_counted_one_by_one(tmp_path: Path) -> None:
    source = published.mmc4(tmp_path / "in", 2)
    marker, lines = tmp_path / "marker", (source / "docs_no_face_shard_0_v3.jsonl").read_text().splitlines()
    info = {"matched_text_index": 0, "matched_sim": 0.3}
    names = ["../../in/docs_no_face_shard_0_v3.jsonl", "pipe:touch marker", "bomb.png", "pickle.jpg", None, 3]
    published.write(source / "images/bomb.png", bomb(30_000, 30_000))
    published.write(source / "images/pickle.jpg", pickle.dumps(Marker(marker)))
    rows = [{"text_list": ["A fish."], "image_info": [info | {"image_name": name}]} for name in names]
    rows += [{"text_list": "A fish.", "image_info": []}, {"text_list": ["\ud800"], "image_info": []}]
    bad = [json.dumps(row) for row in rows] + ["[" * 100_000, "{", "[1]", '{"text_list": 1' + "0" * 5000 + "}"]
    published.write(source / "docs_no_face_shard_0_v3.jsonl", "\n".join([*lines, *bad]))
    done = convert("mmc4", source, tmp_path / "out", "max_bad_share=1")
    assert done.dropped == {"invalid_field": 1, "not_utf8": 1, "invalid_json": 4}
    assert done.filtered == {"image_count": len(names)}
    assert done.skipped == {
        "refused_path": 1, "missing_image": 1, "image_too_large": 1, "unreadable_image": 1, "invalid_field": 2
    }  # fmt: skip
    assert done.samples == 2 and not marker.exists()


def test_hostile_lists_of_pairs(tmp_path: Path) -> None:
    source = published.instructpix2pix(tmp_path / "in/set", 2)
    published.write(tmp_path / "up/prompt.json", "{}")
    listed = json.loads((source / "seeds.json").read_text())
    bad = [["../../up", ["1"]], ["/etc", ["1"]], ["shard-00/0000000", ["../../../up/1"]], ["..", []], 7]
    published.write(source / "seeds.json", json.dumps([*bad, *listed]))
    done = convert("instructpix2pix", source, tmp_path / "out", "max_bad_share=1")
    assert done.samples == 2 and done.dropped == {"refused_path": 3, "invalid_field": 2}


def test_decompression_bombs_are_bounded(tmp_path: Path) -> None:
    """One large record of several costs itself; an array of JSON is one record."""
    lines = b'{"text": "' + b"a" * 30_000_000 + b'"}\n{"text": "A fish."}\n'
    published.write(tmp_path / "a.jsonl.gz", gzip.compress(lines, 1))
    done = convert("text", tmp_path / "a.jsonl.gz", tmp_path / "out", "max_record_bytes=1000000")
    assert done.dropped == {"record_too_large": 1}
    assert [sample.text for sample in samples(tmp_path / "out")] == ["A fish."]
    published.write(tmp_path / "a.json.gz", gzip.compress(b"[" + b" " * 20_000_000 + b"]", 1))
    with pytest.raises(DataError, match="max_record_bytes=1000000"):
        convert("text", tmp_path / "a.json.gz", tmp_path / "none", "max_record_bytes=1000000")


def test_what_is_no_input_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file or folder"):
        convert("text", tmp_path / "absent", tmp_path / "out")
    os.mkfifo(tmp_path / "in.jsonl")
    with pytest.raises(DataError, match="no file or folder"):
        convert("text", tmp_path / "in.jsonl", tmp_path / "out")
    published.write(tmp_path / "in/a.doc", "")
    with pytest.raises(DataError, match=r"ends in \.jsonl"):
        convert("text", tmp_path / "in", tmp_path / "out")
    published.write(tmp_path / "in/list.csv", "id,url\n1,2\n")
    with pytest.raises(DataError, match="no column ImageID"):
        convert("openimages", tmp_path / "in", tmp_path / "out")
    published.write(tmp_path / "in/train_0.tar.gz", b"")
    with pytest.raises(DataError, match=r"train_0.tar.gz' is compressed.*gunzip"):
        convert("openimages", tmp_path / "in", tmp_path / "out")
    with pytest.raises(DataError, match=r"store=.*must be a folder, a \.tar or a \.zip"):
        convert("mmc4", tmp_path / "in", tmp_path / "out", f"store={tmp_path}/none")


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    published.write(tmp_path / "a.parquet", b"PAR1")
    with pytest.raises(DataError, match=r"kosmosg\[curate\]"):
        convert("text", tmp_path / "a.parquet", tmp_path / "out")
