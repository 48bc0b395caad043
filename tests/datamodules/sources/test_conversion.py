"""Every published layout, converted, checked and read back; interrupted conversions; the released code's rows."""

import bz2
import gzip
import io
import json
import lzma
import multiprocessing
import os
import signal
import zipfile
from collections import Counter
from pathlib import Path

import pyarrow
import pytest

from datamodules.checks.check import CheckConfig, check
from datamodules.errors import DataError
from datamodules.images import load
from datamodules.shard_writer import ShardWriter
from datamodules.sources import conversion
from kosmosg.config import ConfigError
from tests.datamodules.sources import published
from tests.datamodules.sources.published import checked, convert, samples, stored

LAYOUT_CASES = {
    "mmc4": (published.mmc4, "mmc4", (), "interleaved", 6),
    "obelics": (published.obelics, "obelics", (), "interleaved", 6),
    "instructpix2pix": (published.instructpix2pix, "instructpix2pix", (), "edit", 8),
    "openimages": (published.open_images, "openimages", (), "image", 8),
    "openimages-tar": (lambda folder: published.open_images(folder, packed=True), "openimages", (), "image", 8),
    "narratives": (published.open_images, "openimages", ("narratives={source}/narratives",), "caption", 8),
    "tsv-openimage": (lambda f: published.tsv(f / "a.tsv", "openimage"), "tsv", ("rows=openimage",), "constructed", 6),
    "tsv-edit": (lambda f: published.tsv(f / "a.tsv", "instructpix2pix"), "tsv", ("rows=instructpix2pix",), "edit", 6),
    "tsv-laion": (lambda f: published.tsv(f / "a.tsv", "laion"), "tsv", ("rows=laion",), "caption", 6),
}


@pytest.mark.parametrize("case", LAYOUT_CASES)
def test_every_layout_becomes_sound_samples(case: str, tmp_path: Path) -> None:
    write, layout, settings, kind, count = LAYOUT_CASES[case]
    source = write(tmp_path / "in")
    done = convert(layout, source, tmp_path / "out", *(item.format(source=source) for item in settings))
    assert (done.samples, done.records) == (count, count)
    found = checked(tmp_path / "out")
    assert (found["good"], found["kinds"], found["dropped"]) == (count, {kind: count}, {})


def test_img2dataset_shards_are_read_in_place(tmp_path: Path) -> None:
    folder = published.img2dataset(tmp_path)
    found = check(str(folder / "*.tar"), CheckConfig(processes=1, kind="caption")).record()
    assert (found["samples"], found["good"], found["kinds"]) == (12, 12, {"caption": 12})
    assert found["caption_tokens"]["max"] == 3 and found["image_sides"]["min"] == published.SIDE


def test_images_of_documents_keep_their_places(tmp_path: Path) -> None:
    """MMC4's before their sentences; those of OBELICS, found by URL, in their order."""
    source = published.mmc4(tmp_path / "in", 1)
    words = lambda folder: [item if isinstance(item, str) else "*" for item in samples(folder)[0].segments]  # noqa: E731
    convert("mmc4", source, tmp_path / "a")
    convert("mmc4", source, tmp_path / "b", "image_first=false", "min_similarity=0.25")
    assert words(tmp_path / "a") == ["*", "Look at the fish. A dog is beside it.", "*", "The boat swims away!"]
    assert words(tmp_path / "b") == ["Look at the fish. A dog is beside it. The boat swims away!", "*"]
    convert("obelics", published.obelics(tmp_path / "obelics", 2), tmp_path / "c")
    segments = samples(tmp_path / "c")[1].segments
    assert [type(item) is str for item in segments] == [False, True, False, True]
    shown = [load(item).getpixel((1, 1)) for item in segments if not isinstance(item, str)]
    assert shown == [published.Image.open(io.BytesIO(published.jpeg(i))).getpixel((1, 1)) for i in (2, 3)]


def test_missing_images_cost_the_document_nothing_else(tmp_path: Path) -> None:
    source = published.mmc4(tmp_path / "in", 4)
    for i, name in enumerate(("000000000000.jpg", "000001000000.jpg", "000001000001.jpg")):
        path = source / "images" / name
        path.write_bytes(b"not an image") if i == 0 else path.unlink()
    done = convert("mmc4", source, tmp_path / "out")
    assert done.skipped == {"unreadable_image": 1, "missing_image": 2}
    assert done.filtered == {"image_count": 1} and done.samples == 3
    assert len(samples(tmp_path / "out")[0].segments) == 3


def test_pairs_of_a_prompt_stay_together_and_broken_ones_are_skipped(tmp_path: Path) -> None:
    source = published.instructpix2pix(tmp_path / "in", 3)
    (source / "shard-00/0000002/1020_1.jpg").write_bytes(b"")
    (source / "shard-00/0000000/1000_0.jpg").unlink()
    done = convert("instructpix2pix", source, tmp_path / "out")
    assert [len(sample.pairs) for sample in samples(tmp_path / "out")] == [2, 2]
    assert done.skipped == {"unreadable_image": 1} and done.dropped == {"missing_image": 1}
    assert samples(tmp_path / "out")[0].caption == "a small dog"
    assert convert("instructpix2pix", source, tmp_path / "apart", "pairs=apart").samples == 4
    assert {len(sample.pairs) for sample in samples(tmp_path / "apart")} == {1}


def test_instructpix2pix_without_its_list_in_splits_on_two_processes_and_as_the_hub_has_it(
    tmp_path: Path, forked: None
) -> None:
    source, small = published.instructpix2pix(tmp_path / "in", 20), "samples_per_shard=7"
    whole = convert("instructpix2pix", source, tmp_path / "listed", small)
    assert convert("instructpix2pix", source, tmp_path / "two", small, "processes=2").shards == whole.shards
    sizes = [convert("instructpix2pix", source, tmp_path / name, f"split={name}").samples for name in ("train", "val")]
    (source / "seeds.json").unlink()
    assert convert("instructpix2pix", source, tmp_path / "found", small).shards == whole.shards
    assert sizes == [18, 1] and len(whole.shards) == 3
    image = {"bytes": published.jpeg(0), "path": None}
    row = {"original_prompt": "a fish", "original_image": image, "edit_prompt": "make it night", "edited_image": image}
    rows = [row, row | {"original_prompt": None}, row | {"edit_prompt": ""}, row | {"edited_image": None}]
    published.write(tmp_path / "hub/train-00000.parquet", published.parquet(rows))
    done = convert("instructpix2pix", tmp_path / "hub", tmp_path / "out")
    assert [sample.caption for sample in samples(tmp_path / "out")] == ["a fish", ""]
    assert done.dropped == {"empty_text": 1, "missing_image": 1}


def test_open_images_are_turned_and_carry_their_licence(tmp_path: Path) -> None:
    for name, packed in (("folder", False), ("tar", True)):
        convert("openimages", published.open_images(tmp_path / "in" / name, packed=packed), tmp_path / name)
        _, key, members = stored(tmp_path / name)[1]
        record = json.loads(members["json"])
        assert key == published.image_id(1) and (record["Author"], record["Title"]) == ("A, B", 'The "title"')
        assert [load(sample.image).size for sample in samples(tmp_path / name)[:2]] == [(80, 64), (64, 80)]


TEXTS = ["A fish. It swims.", "The dog sleeps!\nIt dreams.", "Look, a boat."]
LINES = published.jsonl([{"content": text, "id": i} for i, text in enumerate(TEXTS)]).encode()
TABLE = json.dumps([{"content": text} for text in TEXTS], indent=1).encode()


def zipped(name: str, content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, content)
    return stream.getvalue()


def test_text_in_every_form(tmp_path: Path, subtests: pytest.Subtests) -> None:
    forms = {
        "a.jsonl": LINES, "lines.json": LINES, "a.json": TABLE, "a.json.gz": gzip.compress(TABLE),
        "a.jsonl.gz": gzip.compress(LINES), "a.jsonl.bz2": bz2.compress(LINES), "a.jsonl.xz": lzma.compress(LINES),
        "a.jsonl.zst": pyarrow.compress(LINES, "zstd", asbytes=True), "a.jsonl.zip": zipped("../../c4.jsonl", LINES),
        "a.parquet": published.parquet([{"content": text} for text in TEXTS], row_group_size=2),
    }  # fmt: skip
    for name, content in forms.items():
        with subtests.test(name):
            convert("text", published.write(tmp_path / name, content), tmp_path / "out" / name, "column=content")
            assert [sample.text for sample in samples(tmp_path / "out" / name)] == TEXTS


def test_plain_text_is_divided_into_documents_as_asked(tmp_path: Path) -> None:
    published.write(tmp_path / "in/a.txt", "One.\nTwo.\n\nThree.\n\n")
    published.write(tmp_path / "in/b/c.txt", "\r\nFour.\r\n")
    for documents, expected in (
        ("file", ["One.\nTwo.\n\nThree.", "Four."]),
        ("paragraph", ["One.\nTwo.", "Three.", "Four."]),
        ("line", ["One.", "Two.", "Three.", "Four."]),
    ):
        convert("text", tmp_path / "in", tmp_path / documents, f"documents={documents}")
        assert [sample.text for sample in samples(tmp_path / documents)] == expected


def test_long_documents_are_divided_where_it_hurts_least(tmp_path: Path) -> None:
    text = "\n\n".join(" ".join(f"Sentence {i} of {j}." for i in range(9)) for j in range(4))
    published.write(tmp_path / "a.jsonl", published.jsonl([{"text": text}, {"text": "x" * 250}]))
    convert("text", tmp_path / "a.jsonl", tmp_path / "out", "max_characters=100", "samples_per_shard=2")
    parts = [sample.text for sample in samples(tmp_path / "out")]
    assert all(0 < len(part) <= 100 for part in parts) and parts[-3:] == ["x" * 100, "x" * 100, "x" * 50]
    assert " ".join(parts[:-3]) == text.replace("\n\n", " ") and all(part.endswith(".") for part in parts[:-3])


def test_captions_of_published_tables(tmp_path: Path) -> None:
    published.write(tmp_path / "cc3m.tsv", 'a "red fish\thttp://a\n\thttp://b\na dog\thttp://c\n')
    published.write(tmp_path / "laion.jsonl", published.jsonl(
        [{"TEXT": "a bird", "WIDTH": w, "HEIGHT": 500} for w in (400, 383, None, "9" * 5000)]))  # fmt: skip
    first = convert("captions", tmp_path / "cc3m.tsv", tmp_path / "a", "column=0")
    assert [sample.caption for sample in samples(tmp_path / "a")] == ['a "red fish', "a dog"]
    assert first.dropped == {"empty_caption": 1}
    sizes = ("column=TEXT", "width=WIDTH", "height=HEIGHT", "min_side=384")
    second = convert("captions", tmp_path / "laion.jsonl", tmp_path / "b", *sizes)
    assert second.filtered == {"image_too_small": 1, "size_not_integer": 2} and second.samples == 1
    assert checked(tmp_path / "a", captions_only=True)["good"] == 2
    assert checked(tmp_path / "a")["dropped"] == {"missing_member": 2}


def killed_at(place: str, count: int, *arguments: str | Path) -> None:
    """`convert` in a process that kill -9 ends at the call number `count` of `place`, before it does anything."""

    def run() -> None:
        with pytest.MonkeyPatch.context() as patch:
            owner, name = (ShardWriter, "write") if place == "write" else (conversion, "write_json")
            real, left = getattr(owner, name), [count]

            def call(*values: object) -> None:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                real(*values)

            patch.setattr(owner, name, call)
            convert(*arguments)  # type: ignore[arg-type]

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def test_a_killed_conversion_continues_to_the_same_bytes(tmp_path: Path, subtests: pytest.Subtests) -> None:
    rows = [{"text": f"Fish {i}. " * (1 + i % 4)} if i % 5 else {"text": None} for i in range(12)]
    rows[9] = {"text": "A long document. " * 20}  # four samples, so that a shard ends inside a record
    published.write(tmp_path / "in/a.jsonl", published.jsonl(rows[:7]))
    published.write(tmp_path / "in/b.jsonl", published.jsonl(rows[7:]))
    settings = ("samples_per_shard=2", "max_characters=100", "min_characters=9", "max_bad_share=1")
    whole = convert("text", tmp_path / "in", tmp_path / "whole", *settings)
    assert (whole.samples, len(whole.shards), whole.dropped, whole.filtered) == (
        10, 5, {"invalid_field": 3}, {"text_too_short": 2})  # fmt: skip
    kills = {"write": (0, 2, 5, 9), "progress": (0, 3, 6)}
    for place, count in ((place, count) for place, counts in kills.items() for count in counts):
        with subtests.test(f"{place} {count}"):
            cut = tmp_path / f"{place}-{count}"
            killed_at(place, count, "text", tmp_path / "in", cut, *settings)
            assert convert("text", tmp_path / "in", cut, *settings) == whole
            for path in (path for path in (tmp_path / "whole").iterdir() if path.name != ".lock"):
                assert (cut / path.name).read_bytes() == path.read_bytes(), path.name
            assert not list(cut.glob("*.partial"))
            assert convert("text", tmp_path / "in", cut, *settings) == whole


def test_progress_is_not_written_after_each_of_many_shards(tmp_path: Path) -> None:
    source = published.write(tmp_path / "a.jsonl", published.jsonl([{"text": f"Fish {i}."} for i in range(122)]))
    whole = convert("text", source, tmp_path / "whole", "samples_per_shard=1")
    killed_at("write", 119, "text", source, tmp_path / "cut", "samples_per_shard=1")
    saved = json.loads((tmp_path / "cut/train.conversion.json").read_text())
    assert 110 <= len(saved["shards"]) < len(list((tmp_path / "cut").glob("*.tar"))) == 119
    assert convert("text", source, tmp_path / "cut", "samples_per_shard=1") == whole


def test_other_settings_or_input_are_refused_beside_what_stands(tmp_path: Path) -> None:
    source = published.write(tmp_path / "a.jsonl", published.jsonl([{"text": text} for text in TEXTS]))
    convert("text", source, tmp_path / "out")
    with pytest.raises(DataError, match=r"min_characters was 1 and is now 5"):
        convert("text", source, tmp_path / "out", "min_characters=5")
    assert convert("text", source, tmp_path / "out", "max_bad_share=0.5").complete
    with pytest.raises(DataError, match=r"val-000000.tar. exists, but no val\.conversion\.json"):
        published.write(tmp_path / "out/val-000000.tar", b"")
        convert("text", source, tmp_path / "out", "prefix=val")
    with pytest.raises(ConfigError, match=r"min_charcters.*Did you mean"):
        convert("text", source, tmp_path / "b", "min_charcters=5")


def test_rotten_input_stops_the_conversion(tmp_path: Path) -> None:
    rows = [{"text": "a fish"} if i % 2 else {} for i in range(300)]
    source = published.write(tmp_path / "a.jsonl", published.jsonl(rows))
    with pytest.raises(DataError, match=r"max_bad_share is 0\.05.*missing_column 1\d\d"):
        convert("text", source, tmp_path / "out")


def test_a_reduced_image_is_a_jpeg_of_the_size_asked_for(tmp_path: Path) -> None:
    source = published.open_images(tmp_path / "in", 3)
    convert("openimages", source, tmp_path / "out", "images.shorter_side=32")
    assert all("jpg" in members for *_, members in stored(tmp_path / "out"))
    assert [load(sample.image).size for sample in samples(tmp_path / "out")] == [(40, 32), (32, 40), (40, 32)]
    found = convert("openimages", source, tmp_path / "none", "images.min_side=64")
    assert found.samples == 3
    with pytest.raises(DataError, match="image_too_small 3"):
        convert("openimages", source, tmp_path / "none", "images.min_side=65", "prefix=val")


def test_reasons_are_exactly_what_was_injected(tmp_path: Path) -> None:
    good = published.encoded(0)
    rows = {
        "wrong_columns": ["a", "a\tb\tc", f"a fish\tfish\t{good}"],
        "invalid_base64": [f"a fish\tfish\t{good}\t{good}\t*", f"a fish\tfish\t{good}\t{good}\t{good[:-1]}"],
        "unreadable_image": [f"a fish\tfish\t{good}\t{good}\tYWJj"],
        "empty_caption": [f"\tfish\t{good}\t{good}\t{good}"],
        "empty_text": [f"a fish\tfish,\t{good}\t{good}\t{good}\t{good}\t{good}"],
        "not_utf8": [b"\xff\tfish\t" + "\t".join([good] * 3).encode()],
        "record_too_large": ["x" * 200_000],
    }
    lines = [line.encode() if isinstance(line, str) else line for listed in rows.values() for line in listed]
    sound = f"a fish\tfish\t{good}\t{good}\t{good}".encode()
    published.write(tmp_path / "in/a.tsv", b"\n".join([sound, *(line for bad in lines for line in (bad, sound))]))
    settings = ("rows=openimage", "max_bad_share=1", "max_record_bytes=100000")
    done = convert("tsv", tmp_path / "in", tmp_path / "out", *settings)
    assert Counter(done.dropped) == {reason: len(listed) for reason, listed in rows.items()}
    assert done.samples == len(lines) + 1 == checked(tmp_path / "out")["good"]


def test_a_damaged_file_loses_what_is_damaged_alone(tmp_path: Path, subtests: pytest.Subtests) -> None:
    content = published.jsonl([{"text": f"Fish {i}."} for i in range(2000)]).encode()
    files = {"a.jsonl.gz": gzip.compress(content), "a.jsonl.xz": lzma.compress(content)}
    files |= {"a.jsonl.zip": b"PK\x03\x04 not one", "a.parquet": b"PAR1 not one"}
    for name, whole in files.items():
        with subtests.test(name):
            compressed = name.endswith(("gz", "xz"))
            source = tmp_path / name.replace(".", "-")
            published.write(source / name, whole[: -len(whole) // 4] if compressed else whole)
            published.write(source / "b.jsonl", published.jsonl([{"text": "whole"}]))
            done = convert("text", source, source / "out")
            assert done.dropped == {"damaged_file": 1}
            assert samples(source / "out")[-1].text == "whole" and (done.samples > 100) == compressed
