"""The folder, tars and zips that a converter finds images in: regular files alone, read in place."""

import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from datamodules.errors import SampleError, ShardError
from datamodules.sources.files import Record
from datamodules.sources.image_store import ImageStore
from tests.datamodules.sources import published
from tests.datamodules.sources.published import convert

RECORD = Record(0, 0, "docs.jsonl", None)


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
    folder = tmp_path / "images"
    published.write(folder / "a/good.jpg", published.jpeg(0))
    published.write(tmp_path / "secret.jpg", published.jpeg(1))
    os.mkfifo(folder / "pipe.jpg")
    (folder / "folder.jpg").mkdir()
    links = {"zero.jpg": "/dev/zero", "out.jpg": "../secret.jpg", "circle.jpg": "circle.jpg", "up": ".."}
    for name, target in (links | {"inside.jpg": "a/good.jpg"}).items():
        os.symlink(target, folder / name)
    store = ImageStore(folder, 10**6)
    assert store.find(RECORD, "a/good.jpg") == store.find(RECORD, "inside.jpg") == published.jpeg(0)
    for names, reason in (
        (("../secret.jpg", "/etc/passwd", "a/../../secret.jpg", "..", ""), "refused_path"),
        (("a\0.jpg", "x" * 2000, "\ud800.jpg"), "unreadable_file"),
        (("..\\secret.jpg",), "missing_image"),
        (("pipe.jpg", "folder.jpg", "zero.jpg", "out.jpg", "circle.jpg", "up/secret.jpg"), "refused_path|unreadable"),
    ):
        for name in names:
            with pytest.raises(SampleError, match=reason):
                store.find(RECORD, name)


def test_a_tar_gives_regular_files_alone_and_unpacks_nothing(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        published.add(tar, "../../slip.jpg", published.jpeg(1))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, __file__
        tar.addfile(link)
    store = ImageStore(tmp_path, 10**6)
    assert store.find(RECORD, "slip.jpg") == published.jpeg(1) and not list(tmp_path.parent.rglob("slip*"))
    with pytest.raises(SampleError, match="missing_image"):
        store.find(RECORD, "link.jpg")


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
