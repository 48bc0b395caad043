"""Images, shards and models that fail: what is dropped is counted, what is good is kept, and there is a bound."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.curation.config import Caption, Curation, Input, Stored
from datamodules.curation.output import Output, describe
from datamodules.curation.reading import list_sources
from datamodules.curation.report import Counts
from datamodules.curation.rows import Batch, Row, attempt, drop, new_row
from datamodules.curation.stages import Chunk, Step, Worker, read_chunks
from datamodules.errors import DataError
from datamodules.images import Limits, StoredImage
from tests.datamodules import worlds
from tests.datamodules.bad_inputs import BOMB
from tests.datamodules.curation import world


def encoded(kind: str, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (*size[::-1], 4), np.uint8)
    Image.fromarray(noise, "RGBA").convert("RGB").convert(mode).save(stream, kind)
    return stream.getvalue()


JPEG = encoded("JPEG")
# What becomes of damaged images is in bad_inputs.py; here one of each reason.
BAD = {
    "truncated": ({"jpg": JPEG[: len(JPEG) // 2]}, "unreadable_image"),
    "gif as jpg": ({"jpg": encoded("GIF", "P")}, "unreadable_image"),
    "bomb": ({"png": BOMB}, "image_too_large"),
    "strip": ({"png": encoded("PNG", size=(700, 1))}, "extreme_aspect_ratio"),
    "pixel": ({"png": encoded("PNG", size=(1, 1))}, "image_too_small"),
    "gif": ({"gif": encoded("GIF", "P")}, "missing_member"),
    "pickle": ({"pyd": b"cos\nsystem\n(S'true'\ntR."}, "missing_member"),
    "text alone": ({"txt": b"a dog"}, "missing_member"),
    "huge member": ({"jpg": JPEG + bytes(200_000)}, "member_too_large"),
}
GOOD = {
    "jpeg": JPEG,
    "cmyk": encoded("JPEG", "CMYK"),
    "grey": encoded("PNG", "L"),
    "palette": encoded("PNG", "P"),
    "webp": encoded("WEBP"),
    "png as jpg": encoded("PNG"),
}
LIMITS = Limits(max_member_bytes=100_000)
STORED = Stored(side=16, min_side=8, format="png")


def prepared(given: bool = False, done: set[int] | None = None, **options) -> list[Chunk]:
    """Every chunk of an input, prepared."""
    config = Curation(input=Input(limits=LIMITS, **options), image=STORED, crops=world.SMALL_CROPS)
    config.caption = Caption(by="given" if given else "blip2")
    return [chunk for source in list_sources(config.input)[0] for chunk in read_chunks(source, config, done or ())]


def reasons(rows: Batch) -> list[str | None]:
    return [row.get("dropped", {}).get("reason") for row in rows]


def test_bad_images_in_shards_are_dropped_by_reason_and_good_ones_kept(tmp_path):
    bad = [(f"bad {name}", members) for name, (members, _) in BAD.items()]
    good = [(f"../../good {name}", {"jpg": data, "txt": b"x", "pickle": b"\x80"}) for name, data in GOOD.items()]
    (chunk,) = prepared(shards=worlds.write_members(tmp_path / "in" / "a.tar", [*bad, *good]))
    assert reasons(chunk.rows) == [reason for _, reason in BAD.values()] + [None] * len(GOOD)
    assert all(StoredImage(row["image"], "i", "s", "k").load().size == (16, 16) for row in chunk.rows[len(BAD) :])
    record = describe(chunk)
    assert record["images"] == len(BAD) + len(GOOD) and record["written"] == len(GOOD)
    assert record["filtered"] == {"image_too_small": 1} and sum(record["failed"].values()) == len(BAD) - 1
    assert [drop["key"] for drop in record["dropped"]] == [key for key, _ in bad]


def test_bad_files_in_a_folder_are_dropped_and_dot_files_are_not_images(tmp_path):
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere.jpg"
    for name, data in {
        "b/2.jpg": JPEG, "a/1.PNG": GOOD["grey"], "b/1.jpeg": b"", "c.txt": b"x", "d.jpg": JPEG, "._d.jpg": JPEG,
        ".trash/e.jpg": JPEG, "../elsewhere.jpg": JPEG, "big.png": bytes(LIMITS.max_member_bytes + 1),
    }.items():  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    os.mkfifo(folder / "pipe.jpg")
    links = {"gone": tmp_path / "gone", "link": elsewhere, "same": folder / "d.jpg", "zero": Path("/dev/zero")}
    for name, target in links.items():
        (folder / f"{name}.jpg").symlink_to(target)
    chunks = prepared(images=str(folder), chunk_size=4)
    rows = [row for chunk in chunks for row in chunk.rows]
    unreadable = dict.fromkeys(("gone.jpg", "link.jpg", "pipe.jpg", "zero.jpg"), "unreadable_file")
    first = {"big.png": "member_too_large", "d.jpg": None, "same.jpg": None, **unreadable}
    expected = [*sorted(first.items()), ("a/1.PNG", None), ("b/1.jpeg", "unreadable_image"), ("b/2.jpg", None)]
    assert list(zip((row["key"] for row in rows), reasons(rows), strict=True)) == expected
    assert [(chunk.source, chunk.part, len(chunk.rows), chunk.last) for chunk in chunks] == [
        (0, 0, 4, True), (1, 0, 4, True), (2, 0, 2, True)
    ]  # fmt: skip


def test_a_shard_is_cut_into_chunks_and_those_that_are_done_are_passed_over(tmp_path):
    shards = worlds.write_members(tmp_path / "a.tar", [(f"k{i}", {"jpg": JPEG}) for i in range(4)])
    chunks = prepared(shards=shards, chunk_size=2)
    assert [(chunk.part, chunk.last) for chunk in chunks] == [(0, False), (1, True)]
    assert [row["number"] for chunk in chunks for row in chunk.rows] == [0, 1, 0, 1]
    for done, kept in (({0}, chunks[1:]), ({1}, chunks[:1])):
        again = prepared(shards=shards, chunk_size=2, done=done)
        assert [chunk.rows for chunk in again] == [chunk.rows for chunk in kept]


def test_what_is_wrong_with_a_shard_costs_what_it_spoils(tmp_path):
    path = Path(worlds.write_members(tmp_path / "a.tar", [(f"k{i}", {"jpg": JPEG}) for i in range(4)]))
    # What is left reaches into the fourth image.
    path.write_bytes(path.read_bytes()[: 3 * (512 + -(-len(JPEG) // 512) * 512) + 512 + 100])
    (tmp_path / "b.tar").write_bytes(b"no tar" * 1000)
    chunks = prepared(shards=str(tmp_path / "*.tar"))
    assert [reasons(chunk.rows) for chunk in chunks] == [[None, None, None, "truncated_tar"], ["unreadable_shard"]]
    for share, refused in ((0.5, False), (0.4, True)):
        counts = Counts(Curation(input=Input(images="x"), max_bad_share=share), sources=2)
        counts.add(describe(chunks[0]))
        if refused:
            with pytest.raises(DataError, match="1 of 2 shards"):
                counts.add(describe(chunks[1]))
        else:
            counts.add(describe(chunks[1]))
            assert counts.finished == {0, 1} and counts.failed == {"truncated_tar": 1, "unreadable_shard": 1}


def test_given_captions_are_read_and_bad_ones_dropped(tmp_path):
    texts = {"a": b" a  dog\n", "b": "\ufeffa cat".encode(), "c": b"\xff", "d": None}
    groups = [(key, {"jpg": JPEG} | ({"txt": text} if text else {})) for key, text in texts.items()]
    (chunk,) = prepared(given=True, shards=worlds.write_members(tmp_path / "a.tar", groups))
    assert [row.get("caption") for row in chunk.rows] == ["a dog", "a cat", None, None]
    assert reasons(chunk.rows) == [None, None, "not_utf8", "missing_member"]


class Flaky:
    """Fails on the batches that hold one of some rows."""

    def __init__(self, numbers: set[int], error: Exception):
        self.numbers, self.error = numbers, error

    def __call__(self, batch: Batch) -> Batch:
        if self.numbers & {row["number"] for row in batch}:
            raise self.error
        return [row | {"seen": True} for row in batch]


def numbered(count: int) -> list[Row]:
    return [new_row("shard", f"key{i}") | {"number": i} for i in range(count)]


def test_a_row_that_breaks_its_batch_is_dropped_alone_and_the_machines_faults_drop_none():
    worker = Worker([Step("masks", lambda: Flaky({2, 9}, RuntimeError("no mask")), batch_size=4)])
    rows = worker(Chunk(0, 0, numbered(10))).rows
    assert [i for i, reason in enumerate(reasons(rows)) if reason == "masks_failed"] == [2, 9]
    assert "no mask" in rows[2]["dropped"]["detail"] and not rows[2]["dropped"]["filtered"]
    assert [row["number"] for row in rows] == list(range(10)) and sum("seen" in row for row in rows) == 8
    for error in [torch.OutOfMemoryError("full"), MemoryError(), DataError("mistake")]:
        with pytest.raises(type(error)):
            attempt("masks", Flaky({0}, error), numbered(2))
    with pytest.raises(RuntimeError, match="return its rows"):
        attempt("masks", lambda batch: batch[1:], numbered(2))


def test_a_broken_stage_leaves_its_chunk_undone(tmp_path):
    config = Curation(output=str(tmp_path), input=Input(images="x"), min_bad_count=3)
    chunk = Worker([Step("caption", lambda: Flaky({1, 2, 3}, RuntimeError("CUDA")))])(Chunk(0, 0, numbered(10)))
    with pytest.raises(DataError, match="caption_failed for 3 of 10 images"):
        Output(config).publish(chunk)
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(("share", "least", "refused"), [(0.1, 5, False), (0.4, 1, False), (0.3, 1, True)])
def test_too_many_failures_stop_the_job_and_few_never_do(share, least, refused):
    rows = numbered(10)
    rows[:4] = [drop(row, "unreadable_image", filtered=False) for row in rows[:4]]
    counts = Counts(Curation(input=Input(images="x"), max_bad_share=share, min_bad_count=least), sources=1)
    if refused:
        with pytest.raises(DataError, match="4 of 10 images failed"):
            counts.add(describe(Chunk(0, 0, rows, last=True)))
    else:
        counts.add(describe(Chunk(0, 0, rows, last=True)))
