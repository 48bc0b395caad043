"""What programs of the real world write: byte order marks, quotes, hidden files, packed and broken archives."""

import tarfile
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from datamodules.errors import SampleError
from datamodules.sample import decode
from datamodules.sources.files import Record
from datamodules.sources.image_store import ImageStore
from tests.datamodules.sources import published
from tests.datamodules.sources.published import convert, samples

RECORD = Record(0, 0, "docs.jsonl", None)
BOM = "\ufeff"


def captions(tmp_path: Path, name: str, content: bytes | str, *settings: str):
    published.write(tmp_path / "in" / name, content)
    done = convert("captions", tmp_path / "in" / name, tmp_path / "out", "max_bad_share=1", *settings)
    return [sample.caption for sample in samples(tmp_path / "out")], done.dropped


LONG = "x" * 200_000


def test_csv_rows_are_logical_records(tmp_path: Path) -> None:
    cases = [
        ('url,caption\r\n1,"a red boat\r\non the sea"\r\n2,a dog\r\n', ["a red boat\r\non the sea", "a dog"], {}),
        ("url,caption\r1,a boat\r2,a dog\r", ["a boat", "a dog"], {}),
        ('\n\nurl,caption\n\n1,"say ""hi"", dog"\n', ['say "hi", dog'], {}),
        ("url,caption\n1,a boat,more\n2\n3,a dog\n", ["a dog"], {"invalid_row": 2}),
        ('url,caption\n1,"a boat\non the sea",10\n2,a dog\n', ["a dog"], {"invalid_row": 1}),
        ('url,caption\n1,"a boat\n2,a dog\n3,a bird\n', ["a dog", "a bird"], {"invalid_row": 1}),
        ('url,caption\n1,"a boat\n2,a dog\n3,"a bird"\n', ["a dog", "a bird"], {"invalid_row": 1}),
        ('url,caption\n1,"a" boat\n2,a dog\n', ["a dog"], {"invalid_row": 1}),
        (f"url,caption\n1,{LONG}\n2,a dog\n", ["a dog"], {"invalid_row": 1}),
        (b"url,caption\n\xff,a boat\n2,\xff\n3,a\0dog\n", ["a boat", "a\0dog"], {"not_utf8": 1}),
        ("url,caption\n1,a dog\u2028\u0085at sea\n", ["a dog\u2028\u0085at sea"], {}),
    ]
    for number, (content, expected, dropped) in enumerate(cases):
        assert captions(tmp_path / str(number), "a.csv", content) == (expected, dropped)


def test_tsv_rows_that_quotes_do_not_fit_are_read_without_them(tmp_path: Path) -> None:
    cases = [
        ('"quoted" cat\thttp://y\na "red" dog\thttp://z\n', ['"quoted" cat', 'a "red" dog'], {}),
        ('"a boat\nat ""sea"""\thttp://x\na dog\thttp://y\n', ['a boat\nat "sea"', "a dog"], {}),
        ('"a boat\thttp://x\na dog\thttp://y\n', ['"a boat', "a dog"], {}),
        ("a dog\thttp://x\na boat\n", ["a dog"], {"invalid_row": 1}),
    ]
    for number, (content, expected, dropped) in enumerate(cases):
        assert captions(tmp_path / str(number), "a.tsv", content, "column=0") == (expected, dropped)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    cases = [
        ("a.csv", f"{BOM}caption,url\r\na dog,1\r\n"),
        ("a.csv", f'{BOM}"caption",url\na dog,1\n'),
        ("a.tsv", f"{BOM}caption\turl\na dog\t1\n"),
        ("a.jsonl", f'{BOM}{{"caption": "a dog"}}\n'),
        ("a.json", f'{BOM}[{{"caption": "a dog"}}]'),
        ("a.json", f'{BOM}{{"caption": "a dog"}}\n'),
    ]
    for number, (name, content) in enumerate(cases):
        assert captions(tmp_path / str(number), name, content) == (["a dog"], {})


def test_lines_end_as_their_format_says(tmp_path: Path) -> None:
    """Lines of JSON at newlines alone; those of texts at the carriage returns of old Macs, too."""
    published.write(tmp_path / "a.jsonl", '{"text": "a\u2028b"}\r\n{"text": "c\u0085d"}\n')
    published.write(tmp_path / "b.txt", "one\rtwo\r\rthree")
    for name, expected in (("a.jsonl", ["a\u2028b", "c\u0085d"]), ("b.txt", ["one", "two", "three"])):
        convert("text", tmp_path / name, tmp_path / "out" / name, "documents=line")
        assert [sample.text for sample in samples(tmp_path / "out" / name)] == expected


def test_a_byte_order_mark_at_the_start_of_texts_and_members(tmp_path: Path) -> None:
    published.write(tmp_path / "in/a.txt", f"{BOM}a dog\r\n\r\nat sea\r\n")
    published.write(tmp_path / "in/b.txt", BOM)
    with zipfile.ZipFile(tmp_path / "in/c.txt.zip", "w") as archive:
        archive.writestr("1.txt", f"{BOM}one")
        archive.writestr("2.txt", f"{BOM}two")
        archive.writestr("__MACOSX/._2.txt", b"\0\5\x16\7")
    done = convert("text", tmp_path / "in", tmp_path / "out", "documents=paragraph")
    assert [sample.text for sample in samples(tmp_path / "out")] == ["a dog", "at sea", "one", "two"]
    assert done.dropped == {"empty_text": 1}
    sample = decode({"txt": f"{BOM}a dog".encode(), "png": b""}, "s", "k")
    assert sample.caption == "a dog"  # type: ignore[union-attr]
    assert decode({"json": f'{BOM}{{"kind": "text", "text": "a dog"}}'.encode()}, "s", "k").text == "a dog"  # type: ignore[union-attr]
    with pytest.raises(SampleError, match="empty_caption"):
        decode({"txt": BOM.encode()}, "s", "k")


def test_a_text_of_a_parquet_file_that_is_not_utf_8_costs_its_row(tmp_path: Path) -> None:
    texts = pyarrow.array([b"a dog", b"\xff", b"a boat"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"caption": texts}), tmp_path / "a.parquet")
    done = convert("captions", tmp_path / "a.parquet", tmp_path / "out")
    assert [sample.caption for sample in samples(tmp_path / "out")] == ["a dog", "a boat"]
    assert done.dropped == {"not_utf8": 1}


def test_utf_16_is_refused_by_name_not_read_as_text_with_nuls(tmp_path: Path) -> None:
    for name, code in (("a.tsv", "utf-16"), ("b.csv", "utf-16-be"), ("c.jsonl", "utf-32-be")):
        published.write(tmp_path / "in" / name, f'{BOM}caption\turl\n{{"caption": "a"}}\t1\n'.encode(code))
    published.write(tmp_path / "in/d.csv", "caption\na dog\n")
    done = convert("captions", tmp_path / "in", tmp_path / "out")
    assert done.dropped == {"not_utf8": 3} and "save it as UTF-8" in done.examples["not_utf8"][0]


def test_hidden_files_are_passed_over_in_every_folder_that_is_listed(tmp_path: Path) -> None:
    source = published.instructpix2pix(tmp_path / "pairs", 2)
    (source / "seeds.json").unlink()
    listed = convert("instructpix2pix", source, tmp_path / "listed")
    for path in [path for path in source.rglob("*") if path.is_file()]:
        published.write(path.with_name(f"._{path.name}"), b"\0\5\x16\7")
    published.write(source / ".Trashes/shard-00/0000009/prompt.json", "{}")
    assert convert("instructpix2pix", source, tmp_path / "again").shards == listed.shards
    published.write(tmp_path / "text/a.jsonl", '{"text": "a"}\n')
    published.write(tmp_path / "text/._a.jsonl", b"\0\5\x16\7\n")
    published.write(tmp_path / "text/.ipynb_checkpoints/a.jsonl", '{"text": "b"}\n')
    assert convert("text", tmp_path / "text", tmp_path / "out").records == 1
    published.write(tmp_path / "images/._a.tar", b"\0\5\x16\7")
    with tarfile.open(tmp_path / "images/b.tar", "w") as tar:
        published.add(tar, "000.jpg", published.jpeg(0))
        published.add(tar, "._000.jpg", b"\0\5\x16\7")
        published.add(tar, "000.json", b'{"url": "http://x/0"}')
    store = ImageStore(tmp_path / "images", 10**6)
    assert store.find(RECORD, "http://x/0") == published.jpeg(0)
    with pytest.raises(SampleError, match="missing_image"):
        store.find(RECORD, "._000.jpg")


def test_a_file_of_another_set_costs_itself_alone(tmp_path: Path) -> None:
    published.write(tmp_path / "in/a.json", f'["{"a" * 5000}"]')
    published.write(tmp_path / "in/b.parquet", published.parquet([{"other": "a"}]))
    published.write(tmp_path / "in/c.parquet", published.parquet([{"caption": "a dog"}]))
    done = convert("captions", tmp_path / "in", tmp_path / "out", "max_record_bytes=1000")
    assert done.samples == 1 and done.dropped == {"record_too_large": 1, "missing_column": 1}
