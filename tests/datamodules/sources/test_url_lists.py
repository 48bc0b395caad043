"""URL lists for img2dataset, and its output found again."""

import base64
import json
import tarfile
from pathlib import Path

import pyarrow.parquet
import pytest

from kosmosg.cli import main
from tests.datamodules.sources import published
from tests.datamodules.sources.published import convert


def listed(name: str, source: Path, output: Path) -> list[dict]:
    assert main(["data", "urls", name, str(source), str(output)]) == 0
    return pyarrow.parquet.read_table(output).to_pylist()


def downloaded(folder: Path, urls: list[dict]) -> Path:
    """What img2dataset writes for the list: the key is a number, the json tells the URL; each fourth link is dead."""
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for i, row in enumerate(urls):
            if i % 4 == 3:
                continue
            record = row | {"key": f"{i:09d}", "status": "success", "sha256": "", "width": 64, "height": 64}
            published.add(tar, f"{i:09d}.jpg", published.jpeg(i))
            published.add(tar, f"{i:09d}.json", json.dumps(record, indent=4).encode())
    published.write(folder / "00000_stats.json", json.dumps({"count": len(urls), "successes": len(urls) * 3 // 4}))
    return folder


def test_lists_of_documents(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sources = {"mmc4": published.mmc4(tmp_path / "mmc4", 4), "obelics": published.obelics(tmp_path / "obelics", 4)}
    with open(sources["mmc4"] / "docs_no_face_shard_0_v3.jsonl", "a") as stream:
        stream.write("{\n")
    first = {"mmc4": "http://example.org/000000000000.jpg", "obelics": "https://example.org/0/a.jpg"}
    for name, source in sources.items():
        urls = listed(name, source, tmp_path / f"{name}.parquet")
        assert "8 URLs" in capsys.readouterr().out and len(urls) == 8 and urls[0] == {"url": first[name]}
        store = downloaded(tmp_path / f"{name}-images", urls)
        done = convert(name, source, tmp_path / f"{name}-out", f"store={store}")
        assert (done.samples, done.skipped) == (4, {"missing_image": 2})
        assert done.dropped == ({"invalid_json": 1} if name == "mmc4" else {})


def test_open_images(tmp_path: Path) -> None:
    rows = published.open_images_rows(4)
    rows[3]["OriginalMD5"] = "no digest"
    source = published.open_images_list(tmp_path / "list.csv", rows)
    urls = listed("openimages", source, tmp_path / "urls.parquet")
    digest = base64.b64decode(rows[0]["OriginalMD5"]).hex()
    assert urls[0] == {"url": "https://example.org/0_o.jpg", "md5": digest} and urls[3]["md5"] is None
    done = convert("openimages", source, tmp_path / "out", f"store={downloaded(tmp_path / 'img2dataset', urls)}")
    assert (done.samples, done.filtered) == (3, {"missing_image": 1})


def test_a_set_without_urls_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    published.write(tmp_path / "a.jsonl", published.jsonl([{"text_list": []}]))
    assert main(["data", "urls", "mmc4", str(tmp_path / "a.jsonl"), str(tmp_path / "urls.parquet")]) == 2
    assert "1 unreadable" in capsys.readouterr().err and not (tmp_path / "urls.parquet").exists()
