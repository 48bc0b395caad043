"""`kosmosg data check` and `show`: what is counted, how well shards shuffle, and what people see.

That every bad input is counted as training counts it is in tests/datamodules/test_bad_inputs.py.
"""

import json
import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from datamodules.checks.check import CheckConfig, check, shuffle_quality
from datamodules.data_config import DataConfig
from datamodules.errors import DataError, printable
from datamodules.sample import ImageSample
from datamodules.shards import LISTING
from kosmosg.cli import main
from tests import tiny
from tests.datamodules import worlds


def run(*arguments: str | Path) -> int:
    return main(["data", *map(str, arguments)])


def every_kind(folder: Path, n: int = 5) -> str:
    edits = worlds.edits(n)
    edits[0].more = [(worlds.image(7), worlds.image(8)), (worlds.image(9), worlds.image(10))]
    images = [ImageSample(worlds.image(i), key=f"p{i}", metadata={"Author": "A"}) for i in range(n)]
    for kind, samples in (("t", worlds.texts(n)), ("c", worlds.captions(n)), ("i", worlds.interleaved(n)),
                          ("k", worlds.constructed(n)), ("e", edits), ("p", images)):  # fmt: skip
        worlds.write(folder, kind, samples)
    return str(folder / "*.tar")


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


def test_what_is_dropped_is_reported_with_examples_and_bounded(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bad = {"missing_member": {"png": worlds.png()}, "unreadable_image": {"png": b"junk", "txt": b"a dog"}}
    groups = [(f"good{i}", {"png": worlds.png(i), "txt": b"a fish"}) for i in range(9)]
    groups += [(f"{reason}{i}", members) for reason, members in bad.items() for i in range(3)]
    worlds.write_members(tmp_path / "a.tar", groups)
    (tmp_path / "junk.tar").write_bytes(b"not a tar" * 1000)
    assert run("check", tmp_path, "--json", "--processes", "1") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dropped"] == {"missing_member": 3, "unreadable_image": 3, "damaged_tar": 1}
    assert (found["samples"], found["good"]) == (16, 9) and list(found["shards"]["unreadable"]) == ["junk.tar"]
    assert {item["key"] for item in found["examples"]["missing_member"]} == {f"missing_member{i}" for i in range(3)}
    assert run("check", tmp_path / "a.tar", "--processes", "1", "--max-bad-share", "0.3") == 1
    assert run("check", tmp_path / "a.tar", "--processes", "1", "--max-bad-share", "0.5") == 0


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


def test_processes_change_nothing(tmp_path: Path, forked: None) -> None:
    pattern = every_kind(tmp_path, 40)
    one, two = (check(pattern, CheckConfig(processes=n)).record() for n in (1, 2))
    assert one == two and one["good"] == 240


def test_the_sheet_shows_samples_of_every_kind(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pattern, sheet = every_kind(tmp_path), tmp_path / "sheet.png"
    assert run("check", pattern, "--processes", "1", "--sheet", sheet) == 0
    with Image.open(sheet) as page:
        colours = {page.getpixel((x, y)) for x in range(0, page.width, 16) for y in range(0, page.height, 16)}
    assert {worlds.image(i).getpixel((0, 0)) for i in range(5)} <= colours
    assert "30 samples, 30 good" in capsys.readouterr().out
    worlds.write_members(tmp_path / "junk" / "a.tar", [("bad", {"png": b"junk", "txt": b"a dog"})])
    (tmp_path / "junk" / "b.tar").write_bytes(b"not a tar" * 1000)
    given = ["--captions-only", "--sheet", sheet, "--processes", "1", "--max-bad-share", "1"]
    assert run("check", tmp_path / "junk", *given) == 0
    assert "unreadable: b.tar: damaged_tar" in capsys.readouterr().out


def test_show_prints_a_sample_and_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pattern = every_kind(tmp_path)
    assert run("show", pattern, "--key", "e00000", "--output", tmp_path / "files") == 0
    printed = capsys.readouterr().out
    assert "make it night" in printed and "16×16" in printed and "2.target.png" in printed
    assert {path.name for path in (tmp_path / "files").iterdir()} >= {"source.png", "1.source.png", "json"}
    assert run("show", pattern, "--key", "none") == 2 and "has the key 'none'" in capsys.readouterr().err
    assert run("show", pattern, "--index", "30") == 2 and "0 … 29" in capsys.readouterr().err


def test_what_a_sample_says_does_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = "a dog\x1b[2J\x07[bold]red[/bold] кошка"
    members = {"png": worlds.png(), "txt": text.encode(), "../../x": b"up"}
    worlds.write_members(tmp_path / "a.tar", [("k", members)])
    assert run("show", tmp_path / "a.tar", "--output", tmp_path / "files") == 0
    printed = capsys.readouterr().out
    assert "\x1b[2J" not in printed and "\\x1b[2J\\x07[bold]red[/bold] кошка" in printed
    assert all(path.parent == tmp_path / "files" for path in tmp_path.rglob("member*"))
    assert printable("\ud800") == "\\ud800"


REFUSALS = (
    ("check absent/*.tar", "does not exist"),
    ("check pipe:ls", "not a local path"),
    ("check a.tar --sheet a.jpg", "ends in .png"),
    ("check a.tar --max-bad-share 2", "allowed: 0 … 1"),
    ("check a.tar --kind video", "allowed: text, caption"),
    ("check a.tar --lanes 0", "--lanes is 0; allowed: at least 1"),
    ("convert text absent out", "no file or folder 'absent'"),
    ("convert tsv absent out", "'rows' has no value"),
    ("convert text absent out colunm=a", "Did you mean"),
    ("index absent", "no shard at"),
    ("index pipe:ls --output a.json", "not a local path"),
    ("index simplecache::s3://bucket/a.tar --output a.json", "not a local path"),
    ("index a.tar --output a.txt", "ends in .json"),
)


def test_mistakes_are_told_by_every_command(subtests: pytest.Subtests, capsys: pytest.CaptureFixture) -> None:
    for command, message in REFUSALS:
        with subtests.test(command):
            assert run(*command.split()) == 2
            assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        run("convert", "--keys", "mmc4")
    assert stopped.value.code == 0 and "min_similarity" in capsys.readouterr().out


def test_a_closed_pipe_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of `kosmosg data convert --keys mmc4 | head`."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert run("convert", "--keys", "mmc4") == 0
