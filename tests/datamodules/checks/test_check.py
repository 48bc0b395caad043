"""kosmosg data check and show: what is dropped is what was injected, and what people see."""

import gzip
import json
import pickle
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from datamodules import cli
from datamodules.checks.check import TOKEN_EDGES, CheckConfig, check, histogram, shuffle_quality
from datamodules.data_config import DataConfig
from datamodules.errors import DataError, SampleError, printable
from datamodules.images import Limits
from datamodules.order import SampleOrder
from datamodules.reader import SampleReader
from datamodules.sample import EditSample, ImageSample
from datamodules.shards import LISTING, list_shards
from kosmosg.cli import main
from tests import tiny
from tests.datamodules import worlds
from tests.datamodules.test_sample import Marker, bomb

REPOSITORY = Path(cli.__file__).parents[2]


def run(*arguments: str) -> int:
    return main(["data", *arguments])


def every_kind(folder: Path, n: int = 5) -> str:
    edits = worlds.edits(n)
    edits[0].more = [(worlds.image(7), worlds.image(8)), (worlds.image(9), worlds.image(10))]
    images = [ImageSample(worlds.image(i), key=f"p{i}", metadata={"Author": "A"}) for i in range(n)]
    for kind, samples in (("t", worlds.texts(n)), ("c", worlds.captions(n)), ("i", worlds.interleaved(n)),
                          ("k", worlds.constructed(n)), ("e", edits), ("p", images)):  # fmt: skip
        worlds.write(folder, kind, samples)
    return str(folder / "*.tar")


def injected(tmp_path: Path) -> dict[str, list[dict[str, bytes]]]:
    """Bad samples by the reason for which they must be dropped."""
    good, fine = worlds.png(1), b"a dog in the snow"
    edit, constructed = worlds.edits(1)[0].encode(), worlds.constructed(1)[0].encode()
    document = worlds.interleaved(1)[0].encode()
    cut = lambda members, name: {key: value for key, value in members.items() if key != name}  # noqa: E731
    record = lambda **fields: {"json": json.dumps(fields).encode()}  # noqa: E731
    return {
        "unreadable_image": [
            {"png": b"junk", "txt": fine}, {"jpg": good[:50], "txt": fine}, {"png": b"", "txt": fine},
            edit | {"target.png": b"junk"}, constructed | {"1.white.png": good[:60]}, document | {"0.png": b"GIF"},
        ],
        "not_utf8": [{"png": good, "txt": b"\xc3("}, {"json": b"\xff\xfe"}],
        "empty_caption": [{"png": good, "txt": b" \n "}, record(kind="constructed", caption="", entities=[])],
        "empty_text": [record(kind="text", text=" "), record(kind="interleaved", segments=[]),
                       edit | record(kind="edit", caption="a", instruction="")],
        "missing_member": [{"png": good}, {"txt": fine}, cut(edit, "source.png"), cut(constructed, "0.background.png"),
                           edit | record(kind="edit", caption="a", instruction="b", pairs=2), record(kind="image")],
        "wrong_kind": [record(kind="video"), record()],
        "invalid_json": [{"json": b"{"}, {"json": b"[1]"}],
        "invalid_field": [record(kind="text", text=3), edit | record(kind="edit", instruction="b", pairs=0),
                          edit | record(kind="edit", instruction="b", pairs="2"),
                          record(kind="interleaved", segments=[3])],
        "refused_member": [{"png": good, "txt": fine, "pkl": pickle.dumps(Marker(tmp_path / "marker"))}],
        "image_too_large": [{"png": bomb(30_000, 30_000), "txt": fine}],
        "extreme_aspect_ratio": [{"png": bomb(2, 60_000), "txt": fine}],
    }  # fmt: skip


def test_dropped_is_what_was_injected(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bad = injected(tmp_path)
    groups = [(f"good{i}", {"png": worlds.png(i), "txt": b"a fish"}) for i in range(9)]
    groups += [(f"{reason}{i}", members) for reason, listed in bad.items() for i, members in enumerate(listed)]
    worlds.write_members(tmp_path / "a.tar", groups)
    (tmp_path / "junk.tar").write_bytes(b"not a tar" * 1000)
    assert run("check", str(tmp_path), "--json", "--processes", "1") == 0
    found = json.loads(capsys.readouterr().out)
    expected = {reason: len(listed) for reason, listed in bad.items()} | {"damaged_tar": 1}
    assert found["dropped"] == expected
    assert (found["samples"], found["good"]) == (9 + sum(expected.values()), 9)
    assert list(found["shards"]["unreadable"]) == ["junk.tar"]
    assert {item["key"] for item in found["examples"]["missing_member"]} == {f"missing_member{i}" for i in range(5)}
    assert not (tmp_path / "marker").exists()
    assert run("check", str(tmp_path / "a.tar"), "--processes", "1", "--max-bad-share", "0.5") == 1


def test_every_kind_is_counted(tmp_path: Path, tiny_tokenizer: Path) -> None:
    found = check(every_kind(tmp_path), CheckConfig(processes=1, tokenizer=str(tiny_tokenizer))).record()
    kinds = ("text", "caption", "interleaved", "constructed", "edit", "image")
    assert found["kinds"] == dict.fromkeys(kinds, 5) and found["good"] == 30 and not found["dropped"]
    assert found["images"] == 5 + 2 * 5 + 5 * 5 + 2 * 5 + 4 + 5
    assert found["image_sides"]["values"] == found["images"] and found["caption_tokens"]["unit"] == "pieces"
    assert (found["caption_tokens"]["values"], found["document_tokens"]["values"]) == (15, 10)


def test_clip_tokens_are_counted(tmp_path: Path) -> None:
    tiny.clip_tokenizer().save_pretrained(tmp_path / "clip")
    pattern = worlds.write(tmp_path / "c", "c", worlds.captions(1))
    found = check(pattern, CheckConfig(processes=1, tokenizer=str(tmp_path / "clip"))).record()["caption_tokens"]
    expected = len(tiny.clip_tokenizer()("a small dog number 0", add_special_tokens=False).input_ids)
    assert (found["unit"], found["min"]) == ("CLIP tokens", expected)
    with pytest.raises(DataError, match="no tokenizer"):
        check(pattern, CheckConfig(tokenizer=str(tmp_path)))


def test_shards_are_held_against_their_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = worlds.write(tmp_path, "t", worlds.texts(20))
    content = bytearray((tmp_path / "t-000001.tar").read_bytes())
    content[content.index(b"fish")] ^= 1  # still a sound text
    (tmp_path / "t-000001.tar").write_bytes(content)
    (tmp_path / "t-000002.tar").unlink()
    monkeypatch.chdir(tmp_path)
    for given in (pattern, "./t-*.tar", "{t,t}-*.tar", str(tmp_path), str(tmp_path / LISTING)):
        found = check(given, CheckConfig(processes=1)).record()
        assert found["shards"]["changed"] == ["t-000001.tar"] and found["dropped"] == {"missing_shard": 4}
    listing = tmp_path / LISTING
    listing.write_text(listing.read_text().replace('"samples": 8', '"samples": 5', 1))  # a sound shard that holds more
    assert check(pattern, CheckConfig(processes=1)).changed == ["t-000000.tar", "t-000001.tar"]
    listing.write_text(listing.read_text().replace('"version": 1', '"version": 9'))
    with pytest.raises(DataError, match="version 9"):
        check(pattern, CheckConfig(processes=1))


def cut(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:7000])


def cut_between_samples(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[: 4 * 1024 * 2])  # two members of one block each


def flip(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[3 * 4 * 512 + 2] ^= 1
    shard.write_bytes(content)


@pytest.mark.parametrize(
    "spoil",
    [cut, cut_between_samples, flip, *(partial(Path.write_bytes, data=data) for data in (bytes(9999), b"noise" * 999))],
)
def test_what_training_would_miss_is_counted_as_training_counts_it(tmp_path: Path, spoil) -> None:
    pattern = worlds.write(tmp_path, "c", worlds.captions(16))
    spoil(tmp_path / "c-000001.tar")
    shards = list_shards(pattern)
    reader = SampleReader(shards, SampleOrder(shards.samples, 0, 1, 1, 8, 100), "caption", Limits())
    dropped: Counter[str] = Counter()
    for number in range(len(shards)):
        try:
            reader(0, number)
        except SampleError as error:
            dropped[error.reason] += 1
    found = check(pattern, CheckConfig(processes=1))
    assert found.dropped == dropped and found.dropped and found.samples == 16
    assert found.changed == ["c-000001.tar"]


def test_a_compressed_shard_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    worlds.write(tmp_path, "c", worlds.captions(4))
    (tmp_path / "d.tar").write_bytes(gzip.compress((tmp_path / "c-000000.tar").read_bytes()))
    assert run("check", str(tmp_path), "--processes", "1", "--max-bad-share", "0.5") == 0
    printed = capsys.readouterr().out
    assert "unreadable: d.tar: damaged_tar: the file is compressed; decompress it" in printed


def test_the_quality_of_the_shuffle(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Few lanes and windows give a batch of few shards; a set of one window is fully shuffled."""
    few = shuffle_quality([100] * 50, DataConfig(lanes=1, window=2, block=50), 64)
    many = shuffle_quality([100] * 50, DataConfig(lanes=8, window=6, block=50), 64)
    assert few["shards_in_batch"] < 6 and 20 < many["shards_in_batch"] < 26  # 64 rows are of four lanes
    assert few["full_shuffle"] == many["full_shuffle"] == pytest.approx(50 * (1 - 0.98**64), abs=0.2)
    whole = shuffle_quality([100] * 50, DataConfig(window=50), 64)
    assert whole["shards_in_batch"] == pytest.approx(whole["full_shuffle"], rel=0.03)
    assert shuffle_quality([3, 0, 5], DataConfig(), 64)["full_shuffle"] == 2
    pattern = worlds.write(tmp_path, "t", worlds.texts(40))
    assert run("check", pattern, "--json", "--processes", "1", "--batch", "8", "--lanes", "1", "--window", "1") == 0
    assert json.loads(capsys.readouterr().out)["shuffle"]["shards_in_batch"] < 3


@pytest.mark.slow
def test_processes_change_nothing(tmp_path: Path) -> None:
    pattern = every_kind(tmp_path, 40)
    one, two = (check(pattern, CheckConfig(processes=n)).record() for n in (1, 2))
    assert one == two and one["good"] == 240


def test_the_sheet_has_a_row_for_every_kind(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pattern = every_kind(tmp_path)
    worlds.write_members(tmp_path / "y.tar", [("bad", {"png": b"junk", "txt": b"a dog"})])
    (tmp_path / "z.tar").write_bytes(b"not a tar")
    sheet = tmp_path / "sheet.png"
    assert run("check", pattern, "--processes", "1", "--sheet", str(sheet)) == 0
    with Image.open(sheet) as page:
        colours = {page.getpixel((x, y)) for x in range(0, page.width, 16) for y in range(0, page.height, 16)}
        assert {worlds.image(i).getpixel((0, 0)) for i in range(5)} <= colours
    printed = capsys.readouterr().out
    assert run("check", str(tmp_path / "y.tar"), "--captions-only", "--sheet", str(sheet), "--processes", "1") == 0
    assert "32 samples, 30 good" in printed and "unreadable_image" in printed and "█" in printed


def test_show_prints_a_sample_and_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pattern = every_kind(tmp_path)
    assert run("show", pattern, "--key", "e00000", "--output", str(tmp_path / "files")) == 0
    printed = capsys.readouterr().out
    assert "make it night" in printed and "16×16" in printed and "2.target.png" in printed
    assert {path.name for path in (tmp_path / "files").iterdir()} >= {"source.png", "1.source.png", "json"}
    assert run("show", pattern, "--key", "none") == 2 and "has the key 'none'" in capsys.readouterr().err
    assert run("show", pattern, "--index", "30") == 2 and "0 … 29" in capsys.readouterr().err


def test_what_a_sample_says_does_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = "a dog\x1b[2J\x07[bold]red[/bold] кошка"
    members = {"png": worlds.png(), "txt": text.encode(), "../../x": b"up"}
    worlds.write_members(tmp_path / "a.tar", [("k", members)])
    assert run("show", str(tmp_path / "a.tar"), "--output", str(tmp_path / "files")) == 0
    printed = capsys.readouterr().out
    assert "\x1b[2J" not in printed and "\\x1b[2J\\x07[bold]red[/bold] кошка" in printed
    assert all(path.parent == tmp_path / "files" for path in tmp_path.rglob("member*"))
    assert printable("\ud800") == "\\ud800"


def test_mistakes_are_told(capsys: pytest.CaptureFixture) -> None:
    for arguments, message in [
        (["check", "absent/*.tar"], "does not exist"),
        (["check", "pipe:ls"], "not a local path"),
        (["check", "a.tar", "--sheet", "a.jpg"], "ends in .png"),
        (["check", "a.tar", "--max-bad-share", "2"], "allowed: 0 … 1"),
        (["check", "a.tar", "--kind", "video"], "allowed: text, caption"),
        (["check", "a.tar", "--lanes", "0"], "--lanes is 0; allowed: at least 1"),
        (["convert", "text", "absent", "out"], "no file or folder 'absent'"),
        (["convert", "tsv", "absent", "out"], "'rows' has no value"),
        (["convert", "text", "absent", "out", "colunm=a"], "Did you mean"),
    ]:
        assert run(*arguments) == 2
        assert message in capsys.readouterr().err


def test_settings_are_listed(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("convert", "--keys", "mmc4")
    assert stopped.value.code == 0 and "min_similarity" in capsys.readouterr().out


def test_histograms() -> None:
    found = histogram(Counter((0, 4, 75, 76, 128, 129, 9000)), TOKEN_EDGES, "words")
    bars = dict(zip(found["edges"], found["counts"], strict=True))
    assert (bars[0], bars[60], bars[76], bars[86], bars[129], bars[8193]) == (2, 1, 1, 1, 1, 1)
    assert (found["values"], found["min"], found["max"]) == (7, 0, 9000)


def test_a_pair_of_an_edit_is_stored_under_its_number() -> None:
    sample = EditSample("a", "b", worlds.image(0), worlds.image(1), more=[(worlds.image(2), worlds.image(3))])
    assert set(sample.encode()) == {"json", "source.png", "target.png", "1.source.png", "1.target.png"}


@pytest.mark.slow
def test_the_command_runs(tmp_path: Path) -> None:
    worlds.write(tmp_path, "t", worlds.texts(3))
    command = [sys.executable, "-m", "kosmosg.cli", "data", "check", str(tmp_path / "t-*.tar"), "--json"]
    done = subprocess.run([*command, "--processes", "1"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["good"] == 3
