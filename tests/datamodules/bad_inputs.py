"""Everything that has gone wrong in shards, as data: the list behind the test and behind the table of docs/reading.md.

python -m tests.datamodules.bad_inputs        # prints the table
"""

import gzip
import io
import json
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from datamodules.shards import LISTING
from datamodules.tar import OpenFiles, Tar
from tests.datamodules import worlds

USED, DROPPED, FILTERED, REFUSED = "used", "dropped", "filtered", "refused"
WAYS = {
    DROPPED: "Dropped: replaced by another sample of its source, counted under the reason, named in the log",
    FILTERED: "Left out by a filter: replaced and counted, but no fault of the data",
    USED: "Used, nothing counted",
    REFUSED: "Refused, with the file and what to do",
}
FINE = b"a dog in the snow"
Members = dict[str, bytes]


@dataclass
class BadInput:
    """One thing that may be wrong: its name in the table, what becomes of it, and the name that it is counted by; for
    `REFUSED` a part of the message, else a remark."""

    name: str
    way: str
    reason: str
    members: Members | None = None  # of one sample
    entries: Callable[[tarfile.TarFile], None] | None = None  # adds tar entries by hand instead
    spoil: Callable[[Path, Path], str | None] | None = None  # a sound shard, given its path and the marker's
    kind: str = "caption"  # of the sample and its source
    count: int = 1  # samples lost
    last: bool = False  # nothing behind it in the tar can be read
    two: bool = False  # there is a second, sound shard
    during: bool = False  # the shard is spoilt when the set is listed already
    key: str = "bad"
    marker: Callable[[Path], Members] | None = None  # further members, given a path that must never come into being


class Marker:
    """Unpickling this makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def bomb(width: int, height: int, pixels: bytes = b"\0" * 999, depth: int = 8, colours: int = 2, more: bytes = b""):
    """A PNG of few bytes whose header promises many pixels."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(pixels))
    return b"\x89PNG\r\n\x1a\n" + header + more + data + png_chunk(b"IEND", b"")


def oriented(turn: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = turn
    return encoded(worlds.image(9), "JPEG", exif=exif)


def animated(kind: str) -> bytes:
    return encoded(Image.new("RGB", (9, 7)), kind, save_all=True, append_images=[Image.new("RGB", (9, 7), "red")])


def record(kind: str, **fields) -> Members:
    return {"json": json.dumps({"kind": kind, **fields}).encode()}


def edit(**fields) -> Members:
    return record("edit", **fields) | {"source.png": GOOD, "target.png": GOOD}


def document(*segments) -> Members:
    return record("interleaved", segments=list(segments))


def constructed(caption: str, *entities) -> Members:
    return record("constructed", caption=caption, entities=list(entities)) | {"target.png": GOOD}


def entry(name: str, content: bytes = b"", **changes) -> Callable[[tarfile.TarFile], None]:
    """Adds one entry with these header fields behind a sound caption of the same key."""

    def add(tar: tarfile.TarFile) -> None:
        worlds.add(tar, "bad.txt", FINE)
        header = tarfile.TarInfo(name)
        header.size = len(content)
        for item, value in changes.items():
            setattr(header, item, value)
        tar.addfile(header, io.BytesIO(content) if content else None)

    return add


def raw_name(name: bytes) -> Callable[[tarfile.TarFile], None]:
    def add(tar: tarfile.TarFile) -> None:
        for suffix, content in ((b".txt", FINE), (b".png", worlds.png())):
            header = tarfile.TarInfo((name + suffix).decode("utf-8", "surrogateescape"))
            header.size = len(content)
            block = header.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")
            tar.fileobj.write(block + content + bytes(-len(content) % 512))
            tar.offset += len(block) + len(content) + -len(content) % 512

    return add


def twice(tar: tarfile.TarFile) -> None:
    for suffix, content in (("txt", FINE), ("png", GOOD), ("png", worlds.png(7))):
        worlds.add(tar, f"bad.{suffix}", content)


def key_twice(tar: tarfile.TarFile) -> None:
    for name in ("bad.txt", "bad.png", "between.txt", "between.png", "bad.txt", "bad.png"):
        worlds.add(tar, name, FINE if name.endswith("txt") else GOOD)


def with_folder(tar: tarfile.TarFile) -> None:
    entry("bad", type=tarfile.DIRTYPE)(tar)
    worlds.add(tar, "bad.png", GOOD)


def negative_size(tar: tarfile.TarFile) -> None:
    header = bytearray(tarfile.TarInfo("bad.txt").tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = b"-0000001000\0"
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 256)
    tar.fileobj.write(bytes(header))
    tar.offset += 512


def long_pax_header(tar: tarfile.TarFile) -> None:
    header = tarfile.TarInfo("bad.txt")
    header.type, header.size = tarfile.XHDTYPE, 5_000_000_000
    tar.fileobj.write(header.tobuf(tarfile.USTAR_FORMAT))
    tar.offset += 512


def cut_third(shard: Path, marker: Path) -> None:
    """Breaks off inside the data of the third sample from the end."""
    groups = list(Tar(shard, OpenFiles()).groups())
    shard.write_bytes(shard.read_bytes()[: groups[-3].begin + 700])


def cut_last(shard: Path, marker: Path) -> None:
    with tarfile.open(shard) as tar:
        last = tar.getmembers()[-1]
    shard.write_bytes(shard.read_bytes()[: last.offset_data + 3])


def cut_between(shard: Path, marker: Path) -> None:
    shard.write_bytes(shard.read_bytes()[: list(Tar(shard, OpenFiles()).groups())[4].begin])


def flip(shard: Path, marker: Path) -> None:
    begin = list(Tar(shard, OpenFiles()).groups())[3].begin
    content = bytearray(shard.read_bytes())
    content[begin + 2] ^= 1
    shard.write_bytes(content)


def written(content: bytes) -> Callable[[Path, Path], None]:
    """Something else in the place of a listed shard."""
    return lambda shard, marker: shard.write_bytes(content) and None


def unlisted(shard: Path, marker: Path) -> None:
    (shard.parent / LISTING).unlink()


def remove(shard: Path, marker: Path) -> None:
    shard.unlink()


def remove_second(shard: Path, marker: Path) -> str:
    """Another set beside this one has lost a shard."""
    pattern = worlds.write(shard.parent, "second", worlds.captions(4), per_shard=2)
    (shard.parent / "second-000001.tar").unlink()
    return pattern


def lengthen(shard: Path, marker: Path) -> None:
    shard.write_bytes(shard.read_bytes() + bytes(512))


def empty_listing(shard: Path, marker: Path) -> None:
    (shard.parent / LISTING).write_bytes(b"{}")


def poisoned_listing(shard: Path, marker: Path) -> None:
    (shard.parent / LISTING).write_bytes(pickle.dumps(Marker(marker)))


GOOD = worlds.png(1)
BROKEN_EXIF = b"Exif\0\0II*\0" + b"\xff" * 4
GRAY = encoded(Image.new("L", (9, 7)), "PNG")
NOISE = bytes(range(256)) * 30
BOMB = bomb(9_000, 9_000, bytes(9_000 * 1_126), 1, 0)
COMMENT = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(32_000_000)))

IMAGES = [
    ("truncated JPEG", DROPPED, "unreadable_image", encoded(worlds.image(3, 200), "JPEG")[:500]),
    ("truncated PNG", DROPPED, "unreadable_image", GOOD[:60]),
    ("PNG with a flipped bit", DROPPED, "unreadable_image", GOOD[:45] + bytes([GOOD[45] ^ 4]) + GOOD[46:]),
    ("empty image file", DROPPED, "unreadable_image", b""),
    ("web page in place of an image (dead link)", DROPPED, "unreadable_image", b"<!doctype html><title>404</title>"),
    ("GIF", DROPPED, "unreadable_image", encoded(Image.new("RGB", (4, 4)), "GIF")),
    ("TIFF", DROPPED, "unreadable_image", encoded(Image.new("RGB", (4, 4)), "TIFF")),
    ("PostScript, which Pillow would give to Ghostscript", DROPPED, "unreadable_image", b"%!PS-Adobe-3.0 EPSF-3.0\n"),
    ("SVG", DROPPED, "unreadable_image", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    ("header of 400 megapixels", DROPPED, "image_too_large", bomb(20_000, 20_000)),
    ("81 megapixels in 10 kB (decompression bomb)", DROPPED, "image_too_large", BOMB),
    ("PNG with 32 MB of compressed comment", DROPPED, "unreadable_image", bomb(4, 4, more=COMMENT)),
    ("strip of 1 × 60,000 pixels", DROPPED, "extreme_aspect_ratio", bomb(1, 60_000)),
    ("image of 0 × 0 pixels", DROPPED, "unreadable_image", bomb(0, 0)),
    ("image of more bytes than `limits.max_member_bytes`", DROPPED, "member_too_large", b"\0" * 130_000),
    ("CMYK JPEG", USED, "as RGB", encoded(Image.new("CMYK", (9, 7)), "JPEG")),
    ("one pixel", USED, "", encoded(Image.new("RGB", (1, 1)), "PNG")),
    ("grey", USED, "as RGB", GRAY),
    ("black and white, 1 bit", USED, "as RGB", encoded(Image.new("1", (9, 7)), "PNG")),
    ("palette", USED, "as RGB", encoded(Image.new("P", (9, 7)), "PNG")),
    ("transparent", USED, "on white", encoded(Image.new("RGBA", (9, 7)), "WEBP")),
    ("transparent palette", USED, "on white", encoded(Image.new("P", (9, 7)), "PNG", transparency=0)),
    ("16 bits a channel", USED, "upper 8 bits", encoded(Image.new("I;16", (9, 7)), "PNG")),
    ("animated WebP", USED, "first frame", animated("WEBP")),
    ("animated PNG", USED, "first frame", animated("PNG")),
    ("EXIF orientation", USED, "turned upright", oriented(6)),
    ("invalid EXIF data", USED, "as stored", encoded(worlds.image(3), "JPEG", exif=BROKEN_EXIF)),
]

TEXTS = [
    ("caption that is not UTF-8", DROPPED, "not_utf8", b"caf\xe9"),
    ("caption in UTF-16", DROPPED, "not_utf8", "a dog".encode("utf-16")),
    ("empty caption", DROPPED, "empty_caption", b""),
    ("caption of blanks", DROPPED, "empty_caption", b" \n\t "),
    ("caption of 100 kB", FILTERED, "caption_too_long", b"a dog " * 17_000),
    ("caption of 60 kB without a blank", FILTERED, "caption_too_long", b"dog" * 20_000),
    ("NUL in a caption", USED, "a character", b"a \0 dog"),
    ("`<image>` written in a caption", USED, "ordinary text", b"a <image></image> dog"),
    ("`</s>` and `<pad>` written in a caption", USED, "ordinary text", b"a </s> dog <pad><pad>"),
    ("terminal escapes in a caption", USED, "escaped in the log", b"a \x1b[2J dog\r"),
    ("emoji, right-to-left marks", USED, "", "кошка 😀 \u202e dog".encode()),
]

RECORDS = [
    ("truncated JSON", DROPPED, "invalid_json", {"json": b'{"kind": "edit"'}, "edit"),
    ("JSON that is a list", DROPPED, "invalid_json", {"json": b"[1]"}, "edit"),
    ("JSON nested 100,000 deep", DROPPED, "invalid_json", {"json": b"[" * 60_000}, "text"),
    ("JSON number of 10,000 digits", DROPPED, "invalid_json", {"json": b'{"n": ' + b"1" * 10_000 + b"}"}, "text"),
    ("JSON that is not UTF-8", DROPPED, "not_utf8", {"json": b'{"kind": "text", "text": "\xff"}'}, "text"),
    ("half a surrogate pair", DROPPED, "not_utf8", {"json": b'{"kind": "text", "text": "a dog \\ud83d"}'}, "text"),
    ("unknown kind", DROPPED, "wrong_kind", record("video", text="a dog"), "text"),
    ("sample of another kind", DROPPED, "wrong_kind", record("text", text="a dog"), "edit"),
    ("kind that is a list", DROPPED, "wrong_kind", {"json": b'{"kind": ["text"]}'}, "text"),
    ("text that is a number", DROPPED, "invalid_field", record("text", text=7), "text"),
    ("text that is missing", DROPPED, "invalid_field", record("text"), "text"),
    ("empty text", DROPPED, "empty_text", record("text", text=" "), "text"),
    ("edit without an instruction", DROPPED, "invalid_field", edit(caption="a"), "edit"),
    ("edit with an empty instruction", DROPPED, "empty_text", edit(caption="a", instruction=" "), "edit"),
    ("edit whose caption is a number", DROPPED, "invalid_field", edit(caption=1, instruction="b"), "edit"),
    ("edit of no pairs", DROPPED, "invalid_field", edit(caption="a", instruction="b", pairs=0), "edit"),
    ("number of pairs that is a text", DROPPED, "invalid_field", edit(caption="a", instruction="b", pairs="2"), "edit"),
    ("edit without its second pair", DROPPED, "missing_member", edit(caption="a", instruction="b", pairs=2), "edit"),
    ("edit without its images", DROPPED, "missing_member", record("edit", caption="a", instruction="b"), "edit"),
    ("document without segments", DROPPED, "empty_text", document(), "interleaved"),
    ("segments that are a text", DROPPED, "invalid_field", record("interleaved", segments="a dog"), "interleaved"),
    ("segment of no known type", DROPPED, "invalid_field", document(3), "interleaved"),
    (
        "document that names a file outside the shard",
        DROPPED,
        "missing_member",
        document("a dog", {"image": "../../etc/passwd"}),
        "interleaved",
    ),
    (
        "document with one unreadable image of two",
        DROPPED,
        "unreadable_image",
        document("a dog", {"image": "0.png"}, {"image": "1.png"}) | {"0.png": GOOD, "1.png": b"junk"},
        "interleaved",
    ),
    ("entity without its crop", DROPPED, "missing_member", constructed("a dog", {"text": "dog"}), "constructed"),
    ("entity that is a text", DROPPED, "invalid_field", constructed("a dog", "dog"), "constructed"),
    (
        "entity that is not in the caption",
        USED,
        "caption alone",
        constructed("a dog", {"text": "fish"}) | {"0.background.png": GOOD, "0.white.png": GOOD},
        "constructed",
    ),
    ("constructed sample without a caption", DROPPED, "empty_caption", constructed(""), "constructed"),
    (
        "constructed sample without its target",
        DROPPED,
        "missing_member",
        record("constructed", caption="a dog", entities=[]),
        "constructed",
    ),
]

MEMBERS = [
    BadInput("pair without an image", DROPPED, "missing_member", {"txt": FINE}),
    BadInput("pair without a caption", DROPPED, "missing_member", {"png": GOOD}),
    BadInput("image with a wrong suffix", USED, "its content decides", {"txt": FINE, "jpg": GOOD}),
    BadInput("suffix in capitals", USED, "", {"TXT": FINE, "JPG": encoded(worlds.image(3), "JPEG")}),
    BadInput("members that the schema does not know", USED, "ignored", {"txt": FINE, "png": GOOD, "npy": b"\x93NUMPY"}),
    *(
        BadInput(
            f"member `{suffix}` that runs code when unpickled",
            DROPPED,
            "refused_member",
            {"txt": FINE, "png": GOOD},
            marker=lambda path, suffix=suffix: {suffix: pickle.dumps(Marker(path))},
        )
        for suffix in ("pkl", "pyd", "pt", "state.pth", "extra.pickle", "x.pkl.gz")
    ),
    BadInput("member twice", DROPPED, "duplicate_member", entries=twice),
    BadInput("key twice, with another between", USED, "two samples", entries=key_twice),
]

LINK = {"linkname": "/etc/passwd"}
ENTRIES = [
    BadInput("symbolic link", DROPPED, "refused_member", entries=entry("bad.png", type=tarfile.SYMTYPE, **LINK)),
    BadInput("hard link", DROPPED, "refused_member", entries=entry("bad.png", type=tarfile.LNKTYPE, **LINK)),
    BadInput("device", DROPPED, "refused_member", entries=entry("bad.png", type=tarfile.CHRTYPE, devmajor=1)),
    BadInput("named pipe", DROPPED, "refused_member", entries=entry("bad.png", type=tarfile.FIFOTYPE)),
    BadInput(
        "sparse file of 1 TB",
        DROPPED,
        "refused_member",
        entries=entry("bad.png", b"x" * 512, pax_headers={"GNU.sparse.map": "0,512", "GNU.sparse.size": str(10**12)}),
    ),
    BadInput(
        "file of 8 GB that is not there",
        DROPPED,
        "truncated_tar",
        entries=entry("bad.png", size=8**11 - 1),
        last=True,
    ),
    BadInput("header with a negative size", DROPPED, "damaged_tar", entries=negative_size, last=True),
    BadInput("extended header of 5 GB", DROPPED, "damaged_tar", entries=long_pax_header, last=True),
    BadInput("absolute path", USED, "a name, nothing is written", {"txt": FINE, "png": GOOD}, key="/etc/passwd"),
    BadInput("path with `../`", USED, "a name, nothing is written", {"txt": FINE, "png": GOOD}, key="../../../outside"),
    BadInput("name of 300 letters", USED, "", {"txt": FINE, "png": GOOD}, key="x" * 300),
    BadInput("name with terminal escapes", USED, "escaped in the log", {"txt": FINE, "png": GOOD}, key="bad\x1b[31m"),
    BadInput("name that is not UTF-8", USED, "escaped", entries=raw_name(b"bad\xff\xfe")),
    BadInput("folder among the members", USED, "ignored", entries=with_folder),
]

SHARDS = [
    BadInput("shard truncated after it was listed", DROPPED, "truncated_tar", spoil=cut_third, count=3),
    BadInput("shard truncated before it was listed", DROPPED, "truncated_tar", spoil=cut_last),
    BadInput("shard truncated between two samples", DROPPED, "truncated_tar", spoil=cut_between, count=4),
    BadInput("flipped bit in the header of the fourth of eight samples", DROPPED, "damaged_tar", spoil=flip, count=5),
    BadInput("shard deleted during the run", DROPPED, "unreachable_shard", spoil=remove, count=8, during=True),
    BadInput("random bytes in place of a shard", DROPPED, "damaged_tar", spoil=written(NOISE), count=8, two=True),
    BadInput("empty shard", DROPPED, "truncated_tar", spoil=written(b""), count=8, two=True),
    BadInput("shard of zeros", DROPPED, "truncated_tar", spoil=written(bytes(4096)), count=8, two=True),
    BadInput("compressed shard", DROPPED, "damaged_tar", spoil=written(gzip.compress(b"a" * 4096)), count=8, two=True),
    BadInput("shard that is larger than listed", REFUSED, "written anew", spoil=lengthen),
    BadInput("shard that is listed and missing", REFUSED, "is missing", spoil=remove_second),
    BadInput("shards without a listing", REFUSED, "kosmosg data index", spoil=unlisted),
    BadInput("listing without a list of shards", REFUSED, "not a list of shards", spoil=empty_listing),
    BadInput("listing that is a pickle", REFUSED, "not a list of shards", spoil=poisoned_listing),
    BadInput("folder without a shard", REFUSED, "no shard at", spoil=lambda shard, _: str(shard.parent.parent)),
    BadInput("pattern without a match", REFUSED, "no shard at", spoil=lambda shard, _: f"{shard.parent}/x-*.tar"),
    BadInput("`pipe:` URL", REFUSED, "not a local path", spoil=lambda _, marker: f"pipe:touch {marker}"),
    BadInput("pattern with a shell pipe", REFUSED, "not a local path", spoil=lambda _, marker: f"touch {marker} |"),
    BadInput("protocol that is not allowed", REFUSED, "not a local path", spoil=lambda *_: "http://example.org/a.tar"),
    BadInput("chain of protocols", REFUSED, "not a local path", spoil=lambda *_: "simplecache::s3://bucket/a.tar"),
]

BAD_INPUTS = {
    "Images": [BadInput(name, way, reason, {"txt": FINE, "png": data}) for name, way, reason, data in IMAGES],
    "Captions": [BadInput(name, way, reason, {"txt": text, "png": GOOD}) for name, way, reason, text in TEXTS],
    "JSON and its fields": [BadInput(*row[:4], kind=row[4]) for row in RECORDS],
    "Members of a sample": MEMBERS,
    "Tar entries": ENTRIES,
    "Shards and patterns": SHARDS,
}


def table() -> str:
    """The bad inputs as Markdown."""
    lines = []
    for part, inputs in BAD_INPUTS.items():
        lines += [f"| {part} | result | |", "|---|---|---|"]
        for bad in inputs:
            remark = f"`{bad.reason}`" if bad.way in (DROPPED, FILTERED) else bad.reason
            lines.append(f"| {bad.name} | {bad.way} | {f'“{remark}”' if bad.way == REFUSED else remark} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
