"""What programs of the real world write: byte order marks, quotes, hidden files, packed and broken archives."""

import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from datamodules.errors import DataError, SampleError, ShardError
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
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = pyarrow.array([b"a dog", b"\xff", b"a boat"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"caption": texts}), tmp_path / "a.parquet")
    done = convert("captions", tmp_path / "a.parquet", tmp_path / "out")
    assert [sample.caption for sample in samples(tmp_path / "out")] == ["a dog", "a boat"]
    assert done.dropped == {"not_utf8": 1}


def test_utf_16_is_refused_by_name_not_read_as_text_with_nuls(tmp_path: Path) -> None:
    for name, code in (("a.tsv", "utf-16"), ("b.csv", "utf-16-be"), ("c.jsonl", "utf-32-be")):
        published.write(tmp_path / "in" / name, f'{BOM}caption\turl\n{{"caption": "a"}}\t1\n'.encode(code))
    published.write(tmp_path / "in/d.csv", "caption\na dog\n")
    done = convert("captions", tmp_path / "in", tmp_path / "out")
    assert done.dropped == {"not_utf8": 3} and "save it as UTF-8" in done.examples["not_utf8"][0]


def test_json_lines_end_at_newlines_alone(tmp_path: Path) -> None:
    content = '{"text": "a\u2028b"}\r\n{"text": "c\u0085d"}\n'
    published.write(tmp_path / "a.jsonl", content)
    convert("text", tmp_path / "a.jsonl", tmp_path / "out")
    assert [sample.text for sample in samples(tmp_path / "out")] == ["a\u2028b", "c\u0085d"]


def test_old_macs_end_lines_by_carriage_returns(tmp_path: Path) -> None:
    published.write(tmp_path / "a.txt", "one\rtwo\r\rthree")
    convert("text", tmp_path / "a.txt", tmp_path / "out", "documents=line")
    assert [sample.text for sample in samples(tmp_path / "out")] == ["one", "two", "three"]


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


def tar_of(*headers: tuple[bytes, bytes, bytes], rest: bytes = bytes(1024)) -> bytes:
    """A tar of (name, size field, type) without contents, with right checksums."""
    blocks = b""
    for name, size, kind in headers:
        block = bytearray(tarfile.TarInfo(name.decode()).tobuf())
        block[124:136], block[156:157] = size, kind
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        blocks += bytes(block)
    return blocks + rest


def extended(record: bytes) -> bytes:
    """A tar of a member and the extended header before it."""
    header = tar_of((b"x", b"%011o\0" % len(record), b"x"), rest=b"")
    return header + record.ljust(512, b"\0") + tar_of((b"a.jpg", b"00000000000\0", b"0"))


NEGATIVE = b"\xff" * 10 + b"\xfe\x00"  # base 256: -512
HUGE = b"\x80" + (10**10).to_bytes(11, "big")
HOSTILE_TARS = {
    "negative": tar_of((b"a.jpg", NEGATIVE, b"0")),
    "negative after a good one": tar_of((b"a.jpg", b"00000000000\0", b"0"), (b"b.jpg", NEGATIVE, b"0")),
    "negative long name": tar_of((b"a.jpg", NEGATIVE, b"L")),
    "negative extended header": tar_of((b"a.jpg", NEGATIVE, b"x")),
    "huge extended header": tar_of((b"a.jpg", HUGE, b"x")),
    "negative in an extended header": extended(b"12 size=-512\n"),
    "huge": tar_of((b"a.jpg", HUGE, b"0")),
    "damaged header": tar_of((b"a.jpg", b"00000000000\0", b"0"), rest=b"\xff" * 1024),
    "compressed": b"\x1f\x8b" + bytes(600),
    "empty": b"",
}


def test_hostile_tars_of_images_are_refused(tmp_path: Path) -> None:
    for case in HOSTILE_TARS:
        published.write(tmp_path / "a.tar", HOSTILE_TARS[case])
        with pytest.raises(ShardError, match=r"a\.tar"):
            ImageStore(tmp_path, 10**6)


def test_only_regular_files_inside_the_folder_are_images(tmp_path: Path) -> None:
    published.write(tmp_path / "images/good.jpg", published.jpeg(0))
    published.write(tmp_path / "secret.jpg", published.jpeg(1))
    os.mkfifo(tmp_path / "images/pipe.jpg")
    (tmp_path / "images/folder.jpg").mkdir()
    links = {"zero.jpg": "/dev/zero", "out.jpg": "../secret.jpg", "circle.jpg": "circle.jpg", "up": ".."}
    for name, target in links.items():
        os.symlink(target, tmp_path / "images" / name)
    os.symlink("good.jpg", tmp_path / "images/inside.jpg")
    store = ImageStore(tmp_path / "images", 10**6)
    assert store.find(RECORD, "inside.jpg") == published.jpeg(0)
    for name in ("pipe.jpg", "folder.jpg", "zero.jpg", "out.jpg", "circle.jpg", "up/secret.jpg"):
        with pytest.raises(SampleError, match=r"refused_path|unreadable_file"):
            store.find(RECORD, name)
    os.mkfifo(tmp_path / "in.jsonl")
    with pytest.raises(DataError, match="no file or folder"):
        convert("text", tmp_path / "in.jsonl", tmp_path / "out")


def zip_of(name: str, content: bytes, *, flag: int = 0, method: int | None = None) -> bytes:
    """A zip whose one member claims a flag or a method of compression."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    data = bytearray(stream.getvalue())
    for signature, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        place += data.index(signature)
        data[place] |= flag
        if method is not None:
            data[place + 2 : place + 4] = method.to_bytes(2, "little")
    return bytes(data)


@pytest.mark.parametrize("options", [{"flag": 1}, {"method": 99}, {"method": 6}])
def test_zips_that_cannot_be_opened_are_damaged_files(options: dict, tmp_path: Path) -> None:
    published.write(tmp_path / "in/a.jsonl.zip", zip_of("a.jsonl", b'{"text": "a"}', **options))
    published.write(tmp_path / "in/b.jsonl", '{"text": "b"}\n')
    done = convert("text", tmp_path / "in", tmp_path / "out")
    assert done.dropped == {"damaged_file": 1} and done.samples == 1
    assert "a.jsonl" in done.examples["damaged_file"][0]
    published.write(tmp_path / "images/a.zip", zip_of("a.jpg", published.jpeg(0), **options))
    with pytest.raises(SampleError, match=r"damaged_file.*a\.jpg"):
        ImageStore(tmp_path / "images", 10**6).find(RECORD, "a.jpg")


def test_names_in_archives_with_and_without_their_folders(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, name in enumerate(("./a/0.jpg", "./a/1.jpg", "./b/1.jpg", "./2.jpg", "./b/2.jpg")):
            published.add(tar, name, published.jpeg(number))
    store = ImageStore(tmp_path, 10**6)
    for name, number in (("a/0.jpg", 0), ("./a/0.jpg", 0), ("0.jpg", 0), ("b/1.jpg", 2), ("2.jpg", 3)):
        assert store.find(RECORD, name) == published.jpeg(number), name
    with pytest.raises(SampleError, match=r"ambiguous_image.*1\.jpg"):
        store.find(RECORD, "1.jpg")
    with pytest.raises(SampleError, match="missing_image"):
        store.find(RECORD, "c/0.jpg")


def test_a_zip_of_images_is_read_in_place_and_bounded(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/bomb.jpg", bytes(10_000_000))
        archive.writestr("a/good.jpg", published.jpeg(0))
    store = ImageStore(tmp_path, 10**5)
    assert store.find(RECORD, "a/good.jpg") == store.find(RECORD, "good.jpg") == published.jpeg(0)
    with pytest.raises(SampleError, match="member_too_large"):
        store.find(RECORD, "a/bomb.jpg")
    published.write(tmp_path / "a.zip", b"PK\3\4 not one")
    with pytest.raises(ShardError, match=r"a\.zip"):
        ImageStore(tmp_path, 10**5)


def test_a_file_of_another_set_costs_itself_alone(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    published.write(tmp_path / "in/a.json", f'["{"a" * 5000}"]')
    parquet.write_table(pyarrow.table({"other": ["a"]}), tmp_path / "in/b.parquet")
    parquet.write_table(pyarrow.table({"caption": ["a dog"]}), tmp_path / "in/c.parquet")
    done = convert("captions", tmp_path / "in", tmp_path / "out", "max_record_bytes=1000")
    assert done.samples == 1 and done.dropped == {"record_too_large": 1, "missing_column": 1}
