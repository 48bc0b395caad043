"""Names that lead elsewhere, links, pickles and bombs: refused or bounded, never followed."""

import gzip
import io
import json
import pickle
import tarfile
from pathlib import Path

import pytest

from datamodules.errors import DataError, SampleError
from datamodules.sources.files import Record
from datamodules.sources.image_store import ImageStore
from tests.datamodules.bad_inputs import Marker, bomb
from tests.datamodules.sources import published
from tests.datamodules.sources.published import convert, samples

RECORD = Record(0, 0, "docs.jsonl", None)


def test_names_that_lead_out_are_refused(tmp_path: Path) -> None:
    for name, reason in [
        *((name, "refused_path") for name in ("../secret.jpg", "/etc/passwd", "a/../../secret.jpg", "..", "")),
        *((name, "unreadable_file") for name in ("a\0.jpg", "x" * 2000, "\ud800.jpg")),
        ("..\\secret.jpg", "missing_image"),
    ]:
        published.write(tmp_path / "secret.jpg", published.jpeg(0))
        published.write(tmp_path / "images/a/ok.jpg", published.jpeg(1))
        store = ImageStore(tmp_path / "images", 10**6)
        assert store.find(RECORD, "a/ok.jpg") == published.jpeg(1)
        with pytest.raises(SampleError, match=reason):
            store.find(RECORD, name)


def test_a_tar_gives_regular_files_alone_and_unpacks_nothing(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    published.write(tmp_path / "secret.jpg", published.jpeg(0))
    with tarfile.open(tmp_path / "images/a.tar", "w") as tar:
        published.add(tar, "../../slip.jpg", published.jpeg(1))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.jpg")
        tar.addfile(link)
    store = ImageStore(tmp_path / "images", 10**6)
    assert store.find(RECORD, "slip.jpg") == published.jpeg(1)
    assert not list(tmp_path.rglob("slip*"))
    with pytest.raises(Exception, match="missing_image"):
        store.find(RECORD, "link.jpg")


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


@pytest.mark.parametrize(
    "entry", [["../../up", ["1"]], ["/etc", ["1"]], ["shard-00/0000000", ["../../../up/1"]], ["..", []], 7]
)
def test_hostile_lists_of_pairs(entry: object, tmp_path: Path) -> None:
    source = published.instructpix2pix(tmp_path / "in/set", 2)
    published.write(tmp_path / "up/prompt.json", "{}")
    listed = json.loads((source / "seeds.json").read_text())
    published.write(source / "seeds.json", json.dumps([entry, *listed]))
    done = convert("instructpix2pix", source, tmp_path / "out")
    assert done.samples == 2 and sum(done.dropped.values()) == 1
    assert set(done.dropped) <= {"refused_path", "invalid_field"}


def test_a_decompression_bomb_is_one_large_record(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as stream:
        stream.write(b'{"text": "' + b"a" * 30_000_000 + b'"}\n{"text": "A fish."}\n')
    done = convert("text", tmp_path / "a.jsonl.gz", tmp_path / "out", "max_record_bytes=1000000")
    assert done.dropped == {"record_too_large": 1}
    assert [sample.text for sample in samples(tmp_path / "out")] == ["A fish."]


def test_what_is_no_input_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file or folder"):
        convert("text", tmp_path / "absent", tmp_path / "out")
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
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    published.write(tmp_path / "a.parquet", b"PAR1")
    with pytest.raises(DataError, match=r"kosmosg\[curate\]"):
        convert("text", tmp_path / "a.parquet", tmp_path / "out")


def test_bombs_inside_a_zip_of_json_are_bounded(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with gzip.GzipFile(fileobj=stream, mode="wb") as packed:
        packed.write(b"[" + b" " * 20_000_000 + b"]")
    published.write(tmp_path / "a.json.gz", stream.getvalue())
    with pytest.raises(DataError, match="max_record_bytes=1000000"):
        convert("text", tmp_path / "a.json.gz", tmp_path / "out", "max_record_bytes=1000000")
