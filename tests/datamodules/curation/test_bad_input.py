"""Images, shards and models that fail: what is lost is counted, what is good is kept, and there is a bound."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.curation.caption_filter import CaptionFilter
from datamodules.curation.chunks import Chunk, plan, read_chunk
from datamodules.curation.config import Curation, Input, Stored
from datamodules.curation.output import Output
from datamodules.curation.preparation import Prepare
from datamodules.curation.rows import Batch, alive, new_row
from datamodules.curation.stage_config import TextFilter
from datamodules.curation.tally import Tally
from datamodules.curation.work import Step, Work, attempt, run_step
from datamodules.errors import DataError
from datamodules.images import Limits, StoredImage
from tests.datamodules import worlds
from tests.datamodules.curation import world


def encoded(kind: str, mode: str = "RGB", size: tuple[int, int] = (40, 30), **options) -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (*size[::-1], 4), np.uint8)
    Image.fromarray(noise, "RGBA").convert("RGB").convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def bomb() -> bytes:
    """Ten kilobytes that would be 81 million pixels."""
    stream = io.BytesIO()
    Image.new("1", (9000, 9000)).save(stream, "PNG")
    return stream.getvalue()


JPEG = encoded("JPEG")
BAD = {
    "truncated": ({"jpg": JPEG[: len(JPEG) // 2]}, "unreadable_image"),
    "garbage": ({"jpg": b"\xff\xd8" + bytes(range(256))}, "unreadable_image"),
    "empty": ({"jpg": b""}, "unreadable_image"),
    "html": ({"jpg": b"<html>404</html>"}, "unreadable_image"),
    "bomb": ({"png": bomb()}, "image_too_large"),
    "strip": ({"png": encoded("PNG", size=(700, 1))}, "extreme_aspect_ratio"),
    "pixel": ({"png": encoded("PNG", size=(1, 1))}, "image_too_small"),
    "gif": ({"gif": encoded("GIF", "P")}, "missing_member"),
    "gif as jpg": ({"jpg": encoded("GIF", "P")}, "unreadable_image"),
    "pickle": ({"pyd": b"cos\nsystem\n(S'true'\ntR."}, "missing_member"),
    "text alone": ({"txt": b"a dog"}, "missing_member"),
    "float": ({"tif": encoded("TIFF", "F")}, "missing_member"),
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


def test_bad_images_in_shards_are_dropped_by_reason_and_good_ones_kept(tmp_path):
    bad = [(f"bad {name}", members) for name, (members, _) in BAD.items()]
    good = [(f"../../good {name}", {"jpg": data, "txt": b"x", "pickle": b"never read"}) for name, data in GOOD.items()]
    shards = worlds.write_members(tmp_path / "in" / "a.tar", [*bad, *good])
    config = Input(shards=shards, limits=LIMITS)
    (chunk,) = plan(config, 0.0).chunks
    step = Step("prepare", lambda: Prepare(Stored(side=16, min_side=8, format="png"), LIMITS))
    rows = run_step(step, step.build(), Work(chunk, read_chunk(chunk, config, given=False))).rows
    assert [row["dropped"]["reason"] for row in rows[: len(BAD)]] == [reason for _, reason in BAD.values()]
    assert all(StoredImage(row["image"], "i", "s", "k").load().size == (16, 16) for row in rows[len(BAD) :])
    assert len(alive(rows)) == len(GOOD)
    assert [row["dropped"]["filtered"] for row in rows[: len(BAD)]].count(True) == 1  # the small one is no fault


def test_bad_files_in_a_folder_are_dropped_and_the_order_is_that_of_names(tmp_path):
    for name, data in (
        ("b/2.jpg", JPEG),
        ("a/1.PNG", GOOD["grey"]),
        ("b/1.jpeg", b""),
        ("c.txt", b"x"),
        ("d.jpg", JPEG),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "e.jpg").symlink_to(tmp_path / "gone")
    config = Input(images=str(tmp_path), chunk_size=3)
    planned = plan(config, 0.0)
    rows = [row for chunk in planned.chunks for row in read_chunk(chunk, config, given=False)]
    assert [row["key"] for row in rows] == ["d.jpg", "e.jpg", "a/1.PNG", "b/1.jpeg", "b/2.jpg"]
    assert [row["key"] for row in rows if "dropped" in row] == ["e.jpg"]
    assert [len(chunk.files) for chunk in planned.chunks] == [3, 2]


def test_an_upright_picture_is_what_is_stored(tmp_path):
    picture = Image.new("RGB", (40, 60))
    picture.paste((255, 0, 0), (0, 0, 40, 30))
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 3  # upside down
    picture.save(stream, "PNG", exif=exif)
    (row,) = Prepare(Stored(side=8, min_side=8, format="png"), LIMITS)(
        [new_row(0, "s", "k") | {"data": stream.getvalue()}]
    )
    stored = StoredImage(row["image"], "i", "s", "k").load()
    assert stored.getpixel((4, 7)) == (255, 0, 0) and stored.getpixel((4, 0)) == (0, 0, 0)


def test_unreadable_shards_are_left_out_told_and_bounded(tmp_path, caplog):
    worlds.write_members(tmp_path / "a.tar", [("1", {"jpg": JPEG}), ("2", {"jpg": JPEG})])
    (tmp_path / "b.tar").write_bytes(b"no tar" * 1000)
    config = Input(shards=str(tmp_path / "*.tar"))
    planned = plan(config, 0.5)
    assert planned.unreadable_shards == ["b.tar"] and "b.tar" in caplog.text
    assert [(chunk.begin, chunk.end) for chunk in planned.chunks] == [(0, 2)]
    with pytest.raises(DataError, match="1 of 2 shards"):
        plan(config, 0.4)


def test_a_truncated_shard_loses_its_last_sample_alone(tmp_path):
    path = Path(worlds.write_members(tmp_path / "a.tar", [(f"k{i}", {"jpg": JPEG}) for i in range(4)]))
    # What is left reaches into the fourth image.
    path.write_bytes(path.read_bytes()[: 3 * (512 + -(-len(JPEG) // 512) * 512) + 512 + 100])
    config = Input(shards=str(path))
    (chunk,) = plan(config, 0.0).chunks
    rows = read_chunk(chunk, config, given=False)
    assert [row.get("dropped", {}).get("reason") for row in rows] == [None, None, None, "truncated_tar"]


def test_given_captions_are_read_and_bad_ones_dropped(tmp_path):
    groups = [("a", {"jpg": JPEG, "txt": b" a  dog\n"}), ("b", {"jpg": JPEG, "txt": b"\xff"}), ("c", {"jpg": JPEG})]
    config = Input(shards=worlds.write_members(tmp_path / "a.tar", groups))
    rows = read_chunk(plan(config, 0.0).chunks[0], config, given=True)
    assert rows[0]["given"] == "a dog"
    assert [row["dropped"]["reason"] for row in rows[1:]] == ["not_utf8", "missing_member"]


def test_blocked_short_long_and_circling_captions_are_left_out():
    captions = {
        "a Nude, painted": "blocked_text",
        "the blood bank": "blocked_text",
        "a denuded hill in autumn": None,
        "a dog": "caption_length",
        "word " * 61: "caption_length",
        "a man in a man in a man in a hat": "repeated_words",
        "dog dog dog dog dog": "repeated_words",
        "a cat wearing a hat, a dog wearing a hat and a fish": None,
    }
    rows = [new_row(i, "s", str(i)) | {"caption": text} for i, text in enumerate(captions)]
    judged = CaptionFilter(TextFilter(blocked=["nude", "blood bank"]))(rows)
    assert [row.get("dropped", {}).get("reason") for row in judged] == list(captions.values())
    assert len(alive(CaptionFilter(TextFilter(min_words=1))(rows[:2]))) == 2  # an empty list is off


class Moody:
    """Fails on the batches that hold one of some rows."""

    def __init__(self, numbers: set[int], error: Exception):
        self.numbers, self.error = numbers, error

    def __call__(self, batch: Batch) -> Batch:
        if self.numbers & {row["number"] for row in batch}:
            raise self.error
        return [row | {"seen": True} for row in batch]


def rows_of(count: int) -> Batch:
    return [new_row(i, "shard", f"key{i}") for i in range(count)]


def test_a_row_that_breaks_its_batch_is_dropped_alone():
    work = run_step(
        Step("masks", lambda: None, batch_size=4),
        Moody({2, 9}, RuntimeError("no mask")),
        Work(Chunk(0, "x"), rows_of(10)),
    )
    lost = {row["number"]: row["dropped"] for row in work.rows if "dropped" in row}
    assert sorted(lost) == [2, 9] and lost[2]["reason"] == "masks_failed" and "no mask" in lost[2]["detail"]
    assert [row["number"] for row in work.rows] == list(range(10)) and len(alive(work.rows)) == 8


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), MemoryError(), DataError("mistake")])
def test_faults_of_the_machine_are_nobodys_image(error):
    with pytest.raises(type(error)):
        attempt("masks", Moody({0}, error), rows_of(2))


def test_a_stage_that_loses_rows_is_found_out():
    with pytest.raises(RuntimeError, match="give back its rows"):
        attempt("masks", lambda batch: batch[1:], rows_of(2))


def test_a_broken_stage_leaves_its_chunk_undone(tmp_path):
    config = Curation(output=str(tmp_path), input=Input(images="x"), min_bad_count=3)
    work = Work(Chunk(0, "x", files=("y",)), rows_of(10))
    work = run_step(Step("caption", lambda: None), Moody({1, 2, 3}, RuntimeError("CUDA")), work)
    with pytest.raises(DataError, match="caption_failed for 3 of 10 images"):
        Output(config).publish(work)
    assert not list(tmp_path.rglob("*.json"))


def test_too_many_failures_stop_the_job_and_few_never_do():
    record = {"chunk": 0, "read": 10, "written": 6, "failed": {"unreadable_image": 4}, "filtered": {}}
    record |= {"entities": {"written": 0, "left_out": {}}, "iou": [], "shard": None, "timing": {}}
    Tally(max_bad_share=0.1, min_bad_count=5).add(record)
    Tally(max_bad_share=0.4, min_bad_count=1).add(record)
    with pytest.raises(DataError, match="4 of 10 images failed"):
        Tally(max_bad_share=0.3, min_bad_count=1).add(record)


def test_raising_the_bound_goes_on_where_it_stopped(tmp_path, capsys):
    shards = world.write_toyland(tmp_path / "in", count=5)
    rotten = tmp_path / "in" / "rotten.tar"
    worlds.write_members(rotten, [("x", {"png": b"rotten"}), ("y", {"png": b"rotten"})])
    pattern = str(tmp_path / "in" / "*.tar")
    assert shards and world.curate(pattern, tmp_path / "out") == 2
    assert "2 of 2 images failed (unreadable_image 2)" in capsys.readouterr().err
    assert world.curate(pattern, tmp_path / "out", "max_bad_share=0.5") == 2  # of those that are done, all are rotten
    assert world.curate(pattern, tmp_path / "out", "max_bad_share=0.5", "min_bad_count=3") == 0
    counts = world.manifest(tmp_path / "out")["curation"]
    assert counts["failed"] == {"unreadable_image": 2} and counts["images"] == 7
